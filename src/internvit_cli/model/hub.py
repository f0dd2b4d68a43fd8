"""The Hugging Face hub: asked once, for a bounded time, one line on failure, no secrets shown.

HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honored by huggingface_hub itself.
"""

from __future__ import annotations

import inspect
import queue
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from internvit_cli.errors import ModelError
from internvit_cli.model.hub_cache import COMMIT
from internvit_cli.runtime.observer import BYTES, SILENT, Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from internvit_cli.runtime.observer import Phase

TIMEOUT_SECONDS = 10.0
"""The longest that the hub is waited for, whatever is slow about it: names, connections, proxies or answers."""

OFFLINE_MODE = "offline mode is on"

Value = TypeVar("Value")


class HubUnavailableError(ModelError):
    """The hub cannot be reached and its cache does not hold the file: a known model may do without."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What the hub says of a revision."""

    commit: str
    """40 hex digits."""
    files: frozenset[str]
    """Names of all its files."""


@lru_cache(maxsize=64)
def ask(repo: str, revision: str | None) -> Commit:
    """Ask the hub for the commit that a revision names now. An answer is kept for this process, a failure is not.

    Raises:
        HubUnavailableError: no answer within `TIMEOUT_SECONDS`.
        ModelError: no such model or revision, or no access to it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    started = time.monotonic()
    try:
        info = _within_time(lambda: HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_SECONDS))
        files = frozenset(file.rfilename for file in info.siblings or ())
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
        waited = time.monotonic() - started
        raise HubUnavailableError(
            f"{repo}: the hub cannot be reached ({_reason(error)}, after {waited:.1f} s)"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubUnavailableError(f"{repo}: what answers in the place of the hub is not the hub") from error
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise ModelError(f"{repo}: the hub names no commit")
    return Commit(info.sha, files)


def download(repo: str, commit: str, filename: str, observer: Observer = SILENT) -> str | None:
    """Fetch one file of a commit to the hub cache and return its path; None when the commit has no such file.

    Whoever calls this has asked the hub before: huggingface_hub alone repeats for half a minute without network.

    Args:
        repo: hub id.
        commit: 40 hex digits.
        filename: in the repository.
        observer: told how many bytes have come.

    Raises:
        HubUnavailableError: the hub cannot be reached.
        ModelError: no access, or the download failed.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        with observer.phase(f"fetching {filename}", BYTES) as phase, _reporting(phase) as options:
            path: str = hf_hub_download(repo, filename, revision=commit, etag_timeout=TIMEOUT_SECONDS, **options)
            return path
    except LocalEntryNotFoundError as error:
        raise HubUnavailableError(f"{repo}: {filename} cannot be fetched: the hub cannot be reached") from error
    except EntryNotFoundError:
        return None
    except _transport_errors() as error:
        raise ModelError(
            f"{repo}: {filename} cannot be fetched ({_reason(error)})", "run the same command again"
        ) from error


@contextmanager
def _reporting(phase: Phase) -> Iterator[dict[str, Any]]:
    """Yield the options with which huggingface_hub tells a phase how far it is, and draws nothing itself."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        yield {"tqdm_class": _bar_that_tells(phase)}
        return
    was_disabled = are_progress_bars_disabled()
    if not was_disabled:
        disable_progress_bars()
    try:
        yield {}
    finally:
        if not was_disabled:
            enable_progress_bars()


def _bar_that_tells(phase: Phase) -> type:
    """Return a progress bar for huggingface_hub that draws nothing and tells a phase what it counts.

    Large files have two bars, one for what has come and one for what is written; the phase goes by the first of them.
    """
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        monitor_interval = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **(options | {"file": _Nowhere(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            is_drawn: bool | None = super().update(n)
            phase.at(max(phase.state.done, int(self.n)), int(self.total) if self.total else None)
            return is_drawn

    return Bar


class _Nowhere:
    """A file for what is not to be seen."""

    def write(self, text: str) -> None:
        """Drop it."""

    def flush(self) -> None:
        """Nothing: there is no buffer."""


def is_offline() -> bool:
    """Return whether huggingface_hub was told to stay offline, as HF_HUB_OFFLINE does."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _within_time(action: Callable[[], Value]) -> Value:
    """Do something in a thread of its own that is left behind when it takes too long.

    The timeout of a request is none of the whole: looking up a name knows no bound, and every address of a host and
    every byte of an answer may take that long again.
    """
    outcome: queue.SimpleQueue[Value | Exception] = queue.SimpleQueue()

    def act() -> None:
        try:
            outcome.put(action())
        except Exception as error:  # noqa: BLE001 - raised again in the thread that asked
            outcome.put(error)

    threading.Thread(target=act, name="internvit-hub", daemon=True).start()
    try:
        result = outcome.get(timeout=TIMEOUT_SECONDS)
    except queue.Empty:
        raise TimeoutError("no answer") from None
    if isinstance(result, Exception):
        raise result
    return result


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a failed request raises, whichever HTTP library this huggingface_hub uses: its error's own bases."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _reason(error: Exception) -> str:
    """Return a few words that hold neither URL nor token."""
    if isinstance(error, TimeoutError):
        return "no answer"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"HTTP {status}"
    cause: BaseException | None = error
    while cause is not None:  # an HTTP library's own error stands before the system's
        if isinstance(cause, OSError) and cause.strerror:
            return str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
