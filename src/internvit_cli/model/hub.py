"""Files of a model on the Hugging Face hub, through its own cache: one try, one line on failure, no secrets shown.

HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honoured by huggingface_hub itself.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache

from internvit_cli.errors import ModelError

TIMEOUT_SECONDS = 10.0

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubUnavailableError(ModelError):
    """The hub can't be reached and its cache does not hold the file: a known model may do without."""


def resolve_commit(repo: str, revision: str | None, *, offline: bool = False) -> str:
    """The commit, 40 hex digits, that a revision names now; without network the one the cache holds.

    Raises:
        HubUnavailableError: no network, or offline, and nothing in the cache.
        ModelError: no such model or revision, or no access to it.
    """
    cached = _cached_commit(repo, revision)
    if cached is not None and (offline or _is_offline() or cached == revision):
        return cached
    if offline or _is_offline():
        raise HubUnavailableError(f"{repo}: not in the hub cache, and offline mode is on")
    try:
        return _ask_commit(repo, revision)
    except HubUnavailableError:
        if cached is None:
            raise
        return cached


def fetch(repo: str, commit: str, filename: str, *, offline: bool = False) -> str | None:
    """Path of one file of a commit in the hub cache, fetched if need be; None when the commit has no such file.

    Raises:
        HubUnavailableError: no network, or offline, and not in the cache.
        ModelError: no access, or the download failed.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(repo, filename, revision=commit)
    if isinstance(cached, str):
        return cached
    if cached is not None:  # the cache remembers that the commit has no such file
        return None
    if offline or _is_offline():
        raise HubUnavailableError(f"{repo}: {filename} is not in the hub cache, and offline mode is on")
    _ask_commit(repo, commit)  # one quick try: hf_hub_download alone repeats for half a minute without network
    try:
        return hf_hub_download(repo, filename, revision=commit, etag_timeout=TIMEOUT_SECONDS)
    except LocalEntryNotFoundError as error:
        raise HubUnavailableError(f"{repo}: {filename} can't be fetched: the hub can't be reached") from error
    except EntryNotFoundError:
        return None
    except _transport_errors() as error:
        raise ModelError(
            f"{repo}: {filename} can't be fetched ({_reason(error)})", "run the same command again"
        ) from error


@lru_cache(maxsize=64)
def _ask_commit(repo: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_SECONDS).sha
    except GatedRepoError as error:
        raise ModelError(
            f"{repo}: access is restricted", f"ask for it at https://huggingface.co/{repo}, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo}: no such model on the hub, or a private one", "check the name; set HF_TOKEN if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo}: no revision {revision!r}", "give a branch, tag or commit that exists") from error
    except _transport_errors() as error:
        raise HubUnavailableError(f"{repo}: the hub can't be reached ({_reason(error)})") from error
    if commit is None or not _COMMIT.fullmatch(commit):
        raise ModelError(f"{repo}: the hub names no commit")
    return commit


def cached_file(repo: str, filename: str) -> str | None:
    """Path of a file of a repository's main branch in the hub cache; None when it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, filename)
    return path if isinstance(path, str) else None


def _cached_commit(repo: str, revision: str | None) -> str | None:
    """The commit whose config.json the cache holds for a revision: files lie under snapshots/COMMIT/."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repo, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(f"{repo!r}: not a valid hub id") from error
    return os.path.basename(os.path.dirname(path)) if isinstance(path, str) else None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a failed request raises, whichever HTTP library this huggingface_hub uses: its error's own bases."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _reason(error: Exception) -> str:
    """A few words that hold neither URL nor token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"HTTP {status}"
    strerror = getattr(error, "strerror", None)
    return str(strerror) if strerror else type(error).__name__
