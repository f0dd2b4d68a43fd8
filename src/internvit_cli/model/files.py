"""Locate the files of a checkpoint in a folder, or in a commit on the hub and its cache."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from internvit_cli.config import DEFAULT_MODEL
from internvit_cli.errors import ModelError
from internvit_cli.model.hub import OFFLINE_MODE, HubUnavailableError, ask, download, is_offline
from internvit_cli.model.hub_cache import COMMIT, CachedModel
from internvit_cli.model.pixels import PREPROCESSOR_FILE, PROCESSOR_FILE
from internvit_cli.runtime.observer import SILENT, Observer

if TYPE_CHECKING:
    from internvit_cli.model.card import ModelCard

TINY_RANDOM = "tiny-random"
RANDOM_WEIGHTS = f"{TINY_RANDOM} has random weights: its features carry no meaning, and only serve to try the tool"
"""The warning for the model that is built in memory, which only serves to try the tool."""

OFFLINE_HINT = f"pass the directory of a checkpoint as --model, or try the tool with --model {TINY_RANDOM}"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STANDARD_WEIGHTS = frozenset({SINGLE_FILE, INDEX_FILE})
WEIGHTS_SUFFIX = ".safetensors"


class CheckpointFiles(Protocol):
    """The files of a checkpoint, without opening them."""

    @property
    def where(self) -> str:
        """The name of the checkpoint in messages."""
        ...

    def names(self) -> frozenset[str]:
        """Return the names of all files.

        Raises:
            ModelError: The hub has to be asked, and does not answer.
        """
        ...

    def find(self, filename: str) -> str | None:
        """Return the path of a file, and fetch it if needed; None if the checkpoint has no such file.

        Raises:
            ModelError: The file cannot be fetched.
        """
        ...

    def lacks(self, filename: str) -> bool:
        """Return whether it is certain that the checkpoint has no such file."""
        ...

    def need(self, filename: str) -> str:
        """Return the path of a required file.

        Raises:
            ModelError: The file does not exist or cannot be fetched; the hint says how to get it.
        """
        ...


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Files in a folder."""

    folder: str

    @property
    def where(self) -> str:
        """The path of the folder."""
        return self.folder

    def names(self) -> frozenset[str]:
        """Return the names of all entries of the folder, of any type."""
        try:
            return frozenset(os.listdir(self.folder))
        except OSError as error:
            raise ModelError(f"{self.folder}: {error.strerror or error}", OFFLINE_HINT) from error

    def find(self, filename: str) -> str | None:
        """Return the path of an entry, which may be a broken link; None if there is none."""
        path = os.path.join(self.folder, filename)
        return path if os.path.lexists(path) else None

    def lacks(self, filename: str) -> bool:
        """Return whether there is no such entry."""
        return self.find(filename) is None

    def need(self, filename: str) -> str:
        """Return the path of a required entry."""
        path = self.find(filename)
        if path is None:
            raise self.lacking(filename)
        return path

    def lacking(self, filename: str) -> ModelError:
        """Return the error that the folder has no such file."""
        return ModelError(f"{os.path.join(self.folder, filename)}: No such file or directory", OFFLINE_HINT)


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of a commit on the hub: those in the cache and, unless offline, those that can be fetched."""

    repo: str
    commit: str
    offline: str = ""
    """Why nothing is fetched; empty if files may be fetched."""
    listed: frozenset[str] | None = None
    """All files of the commit, if the hub was asked; None if the cache is enough."""
    observer: Observer = field(default=SILENT, compare=False, repr=False)
    """Receives the progress of downloads."""

    @property
    def where(self) -> str:
        """The hub id."""
        return self.repo

    @property
    def cached(self) -> CachedModel:
        """The model's folder in the cache."""
        return CachedModel.of(self.repo)

    @property
    def has_weights(self) -> bool:
        """Whether the cache holds any weights of the commit."""
        return any(name.endswith(WEIGHTS_SUFFIX) for name in self.cached.files(self.commit))

    def names(self) -> frozenset[str]:
        """Return the cached files if they are enough or nothing may be fetched, otherwise the hub's list."""
        if self.listed is not None:
            return self.listed
        here = self.cached.files(self.commit)
        if self.offline or STANDARD_WEIGHTS & here:
            return here
        try:
            return ask(self.repo, self.commit).files
        except HubUnavailableError:
            if self.has_weights:
                return here
            raise

    def find(self, filename: str) -> str | None:
        """Return the path of a file in the cache, and fetch it if needed; None if the commit has no such file."""
        path = self.cached.find(self.commit, filename)
        return path if path is not None or self.listed is None else self._fetch(filename)

    def _fetch(self, filename: str) -> str | None:
        listed = ask(self.repo, self.commit).files if self.listed is None else self.listed
        return download(self.repo, self.commit, filename, self.observer) if filename in listed else None

    def lacks(self, filename: str) -> bool:
        """Return whether the hub said that the commit has no such file."""
        if self.listed is not None:
            return filename not in self.listed
        return self.cached.is_known_absent(self.commit, filename)

    def need(self, filename: str) -> str:
        """Return the path of a required file."""
        path = self.cached.find(self.commit, filename)
        if path is None and not self.offline:
            path = self._fetch(filename)
        if path is None:
            raise self.lacking(filename)
        return path

    def lacking(self, filename: str) -> ModelError:
        """Return the error that the commit, or its part in the cache, has no such file."""
        if self.offline and not self.lacks(filename):
            return self.missing(filename)
        return ModelError(
            f"{self.repo}: there is no {filename}", "name the repository of an InternViT or InternVL model"
        )

    def missing(self, what: str) -> HubUnavailableError:
        """Return the error that a part of the commit is not in the cache and cannot be fetched."""
        return HubUnavailableError(f"{self.repo}: {what} is not in the hub cache, and {self.offline}", self._hint(what))

    def _hint(self, what: str) -> str:
        others = [commit for commit in self.cached.snapshots() if commit != self.commit]
        whole = [commit for commit in others if self.cached.find(commit, what)]
        instead = f", or use the older files there: --revision {whole[0]}" if whole else ""
        return download_hint(self.repo) + instead


def download_hint(repo: str) -> str:
    """Return a hint on how to get a model onto a machine without network access."""
    return f"run `hf download {repo}` on a machine that can reach the hub; or {OFFLINE_HINT}"


def locate_on_hub(repo: str, revision: str | None, *, offline: bool = False) -> tuple[HubFiles, str]:
    """Find the commit for a revision of a model on the hub, and decide whether its files may be fetched.

    Args:
        repo: The hub id.
        revision: A branch, tag or commit; None means main.
        offline: Whether not to ask the hub, as with the variable HF_HUB_OFFLINE.

    Returns:
        The files, and a note for the user if they may differ from those on the hub now; otherwise the note is empty.

    Raises:
        HubUnavailableError: The hub was not asked or did not answer, and the cache does not hold the revision.
        ModelError: There is no such model or revision, or access to it is denied.
    """
    cached = CachedModel.of(repo)
    reason = OFFLINE_MODE if offline or is_offline() else ""
    if not reason and revision is not None and COMMIT.fullmatch(revision) and _is_whole(cached, revision):
        return HubFiles(repo, revision), ""
    if not reason:
        try:
            answer = ask(repo, revision)
            return HubFiles(repo, answer.commit, listed=answer.files), ""
        except HubUnavailableError as error:
            reason = error.message.removeprefix(f"{repo}: ")
    commit = cached.commit(revision)
    if commit is None:
        raise HubUnavailableError(f"{repo}: not in the hub cache, and {reason}", download_hint(repo))
    return HubFiles(repo, commit, reason), _note(cached, commit, revision, reason)


def _is_whole(cached: CachedModel, commit: str) -> bool:
    """Return whether the cache holds enough of a commit, which never changes, so that the hub need not be asked.

    Some of its shards may be missing, but not the file that decides how pixels are normalized: that file is optional,
    so nothing else would reveal that it is missing.
    """
    here = cached.files(commit)
    is_processor_known = any(
        name in here or cached.is_known_absent(commit, name) for name in (PREPROCESSOR_FILE, PROCESSOR_FILE)
    )
    return bool(STANDARD_WEIGHTS & here) and is_processor_known


def _note(cached: CachedModel, commit: str, revision: str | None, reason: str) -> str:
    if reason != OFFLINE_MODE:
        return f"{reason}: commit {commit[:12]} of the hub cache is used; HF_HUB_OFFLINE=1 avoids the attempt"
    if revision is None and not cached.is_main(commit):
        return f"main of {cached.repo} is not in the hub cache, so its only cached commit is used, {commit[:12]}"
    return ""


def files_of(card: ModelCard, observer: Observer = SILENT) -> CheckpointFiles:
    """Return the files of a described model.

    Args:
        card: The model.
        observer: Receives the progress of downloads.

    Raises:
        ModelError: Only the description of the model is known.
    """
    if card.origin == "directory" and card.directory is not None:
        return FolderFiles(card.directory)
    if card.origin == "hub" and card.revision is not None:
        return HubFiles(card.name, card.revision, card.offline, observer=observer)
    hint = download_hint(card.name if "/" in card.name else DEFAULT_MODEL)
    raise ModelError(f"{card.name}: the weights are not available", hint)
