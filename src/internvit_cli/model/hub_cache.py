"""Read what the hub cache holds of a model from its folders, without fetching anything and without huggingface_hub.

The layout is that of huggingface_hub, which `hf download` writes: `models--OWNER--NAME` holds `refs/REVISION` with the
latest known commit of a branch or tag, `snapshots/COMMIT` with a link to each file that was fetched, and
`.no_exist/COMMIT` with an empty file for each file that is missing on the hub.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from internvit_cli.errors import ModelError, UsageError
from internvit_cli.runtime.untrusted import read_bounded

COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"

_REPO_FOLDER = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([A-Za-z0-9][\w.-]*)", re.ASCII)
_LONGEST_REF = 256


@dataclass(frozen=True, slots=True)
class CachedModel:
    """The folder of a repository in a hub cache, which may not exist."""

    repo: str
    """The hub id, for messages."""
    folder: str
    """The path, such as `~/.cache/huggingface/hub/models--OpenGVLab--InternViT-300M-448px-V2_5`."""

    @classmethod
    def of(cls, repo: str) -> CachedModel:
        """Return the folder of a hub id in the cache that HF_HUB_CACHE or HF_HOME sets."""
        from huggingface_hub import constants

        return cls(repo, os.path.join(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}"))

    def commit(self, revision: str | None) -> str | None:
        """Return the commit of a revision if its snapshot is cached; None if it is not.

        Without a revision, it is the latest known commit of `main`. If that is not cached, as after a download by
        commit, which names no branch, it is the only cached one.

        Raises:
            ModelError: `main` is not cached, but several other commits are.
        """
        named = revision if revision and COMMIT.fullmatch(revision) else self._ref(revision or MAIN)
        if named and self.files(named):
            return named
        if revision is not None:
            return None
        others = self.snapshots()
        if len(others) > 1:
            raise ModelError(
                f"{self.repo}: the hub cache holds {len(others)} commits, and none of them is known to be main",
                f"choose one with --revision: {', '.join(others)}",
            )
        return others[0] if others else None

    def is_main(self, commit: str) -> bool:
        """Return whether this commit was that of `main` when the hub was last asked."""
        return self._ref(MAIN) == commit

    def snapshots(self) -> list[str]:
        """Return the commits with at least one cached file, sorted."""
        return sorted(name for name in _names(os.path.join(self.folder, "snapshots")) if self.files(name))

    def snapshot(self, commit: str) -> str:
        """Return the folder of a commit's files."""
        return os.path.join(self.folder, "snapshots", commit)

    def files(self, commit: str) -> frozenset[str]:
        """Return the names of the cached files of a commit, without links to deleted blobs."""
        folder = self.snapshot(commit)
        return frozenset(name for name in _names(folder) if os.path.isfile(os.path.join(folder, name)))

    def find(self, commit: str, filename: str) -> str | None:
        """Return the path of a cached file of a commit; None if it is not cached."""
        path = os.path.join(self.snapshot(commit), filename)
        return path if os.path.exists(path) else None

    def is_known_absent(self, commit: str, filename: str) -> bool:
        """Return whether the hub once reported that the commit has no such file."""
        return os.path.exists(os.path.join(self.folder, ".no_exist", commit, filename))

    def _ref(self, revision: str) -> str | None:
        try:
            text = read_bounded(os.path.join(self.folder, "refs", revision), _LONGEST_REF)
        except OSError:
            return None
        commit = text.decode("ascii", "replace").strip()
        return commit if COMMIT.fullmatch(commit) else None


def repo_of_folder(name: str) -> str | None:
    """Return the hub id for the name of a cache folder, such as `models--OpenGVLab--InternVL3-1B`."""
    match = _REPO_FOLDER.fullmatch(name)
    return f"{match[1]}/{match[2]}" if match else None


def snapshot_in(folder: str, revision: str | None) -> str | None:
    """Return the snapshot to use for a folder of a hub cache or its `snapshots`; None for other folders.

    Args:
        folder: A folder named by the user, such as `models--OpenGVLab--InternVL3-1B` copied from another machine.
        revision: A branch, tag or commit; None means main, or the only commit.

    Raises:
        UsageError: The folder does not hold the revision.
        ModelError: The folder holds several commits, of which none is known to be main, or none at all.
    """
    folder = os.path.abspath(folder)
    if os.path.basename(folder) == "snapshots":
        folder = os.path.dirname(folder)
    if not os.path.isdir(os.path.join(folder, "snapshots")) or os.path.exists(os.path.join(folder, "config.json")):
        return None
    cached = CachedModel(folder, folder)
    commit = cached.commit(revision)
    if commit is not None:
        return cached.snapshot(commit)
    if revision is None:
        raise ModelError(f"{folder}: a folder of the hub cache without any files of a model", "download it again")
    raise UsageError(
        f"--revision {revision}: {folder} does not hold it", f"it has {', '.join(cached.snapshots()) or 'no commit'}"
    )


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
