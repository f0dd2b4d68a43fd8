"""What PyTorch sees of this machine, for `internvit doctor`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from internvit_cli.extract.results import package_version


@dataclass(frozen=True, slots=True)
class Card:
    """One CUDA device."""

    name: str
    memory: int
    """Bytes."""
    free: int
    capability: tuple[int, int]

    @property
    def has_bfloat16(self) -> bool:
        """Whether it computes in bfloat16 by itself."""
        return self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """Whether it is a Hopper or later."""
        return self.capability >= (9, 0)


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """PyTorch and its devices."""

    version: str
    cuda: str
    """Version of CUDA that it was built with; empty for a build without."""
    cards: tuple[Card, ...]
    has_apple_gpu: bool
    triton: str
    """Version; empty when it is not installed."""
    cpu: str
    """The processor's instructions that PyTorch uses, such as AVX512."""
    problem: str = ""
    """Why CUDA is of no use although this build has it."""


def torch_facts() -> TorchFacts:
    """Look at PyTorch; a driver that does not work is a problem, not an error."""
    cards: list[Card] = []
    problem = ""
    cuda = torch.version.cuda or ""
    if cuda:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            cards = [_card(number) for number in range(torch.cuda.device_count())]
        except RuntimeError as error:
            problem = str(error).strip().splitlines()[0]
    return TorchFacts(
        version=torch.__version__,
        cuda=cuda,
        cards=tuple(cards),
        has_apple_gpu=torch.backends.mps.is_available(),
        triton=package_version("triton"),
        cpu=torch.backends.cpu.get_cpu_capability(),
        problem=problem,
    )


def _card(number: int) -> Card:
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    return Card(properties.name, total, free, (properties.major, properties.minor))
