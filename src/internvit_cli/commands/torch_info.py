"""Report what PyTorch detects on this machine, for `internvit doctor`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from internvit_cli.extract.results import package_version


@dataclass(frozen=True, slots=True)
class CudaCard:
    """A CUDA device."""

    name: str
    memory: int
    """Bytes."""
    free: int
    capability: tuple[int, int]

    @property
    def has_bfloat16(self) -> bool:
        """Whether the card supports bfloat16 natively."""
        return self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """Whether the card is a Hopper or later."""
        return self.capability >= (9, 0)


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """PyTorch and its devices."""

    version: str
    cuda: str
    """The version of CUDA of the build; empty if it has none."""
    cards: tuple[CudaCard, ...]
    has_apple_gpu: bool
    triton: str
    """The version of Triton; empty if it is not installed."""
    cpu: str
    """The instruction set of the processor that PyTorch uses, such as AVX512."""
    problem: str = ""
    """Why CUDA does not work although this build has it; empty if it works."""


def torch_facts() -> TorchFacts:
    """Return the facts about PyTorch; a broken driver is reported as a problem instead of an error."""
    cards: list[CudaCard] = []
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


def _card(number: int) -> CudaCard:
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    return CudaCard(properties.name, total, free, (properties.major, properties.minor))
