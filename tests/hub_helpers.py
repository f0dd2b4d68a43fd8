"""A hub cache as `hf download` leaves it, and a hub that answers or does not."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub import constants

from internvit_cli.model import hub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


def hf_download(
    cache: Path,
    repo: str,
    files: Path,
    *,
    commit: str = COMMIT,
    ref: str | None = "main",
    without: Iterable[str] = (),
    absent: Iterable[str] = (),
) -> Path:
    """Lay out a cache as `hf download REPO` does: blobs by digest, a snapshot of links to them, and a ref.

    Args:
        cache: HF_HUB_CACHE.
        repo: hub id.
        files: a folder with what the hub has.
        commit: of the snapshot.
        ref: the branch that it is of; None for a download by commit.
        without: names that did not arrive.
        absent: names that the hub was asked for in vain.

    Returns:
        The snapshot.
    """
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for path in sorted(files.iterdir()):
        if path.name in without:
            continue
        data = path.read_bytes()
        name = hashlib.sha256(data).hexdigest()
        (root / "blobs" / name).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    if ref is not None:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    for name in absent:
        (root / ".no_exist" / commit).mkdir(parents=True, exist_ok=True)
        (root / ".no_exist" / commit / name).touch()
    return snapshot


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, *, offline: bool = True) -> None:
    """Make a folder this process's hub cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub.ask.cache_clear()


def answer(
    monkeypatch: pytest.MonkeyPatch,
    *,
    error: Exception | None = None,
    commit: str = COMMIT,
    files: Iterable[str] = ("config.json",),
    download: Callable[..., str] | None = None,
) -> list[Any]:
    """Stand in for the hub: it answers, or fails with an error. Returns the list of what it is asked."""
    asked: list[Any] = []
    siblings = [SimpleNamespace(rfilename=name) for name in files]

    class Api:
        def model_info(self, repo: str, revision: str | None = None, **_: Any) -> Any:
            asked.append((repo, revision))
            if error is not None:
                raise error
            return SimpleNamespace(sha=commit, siblings=siblings)

    def refuse(repo: str, filename: str, **_: Any) -> str:
        raise AssertionError(f"{filename} is fetched")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download or refuse)
    hub.ask.cache_clear()
    return asked
