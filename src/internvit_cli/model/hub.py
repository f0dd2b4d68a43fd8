"""Ask the Hugging Face hub once, with a time limit, and report failures in one line without secrets.

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
"""Total time to wait for the hub, for whatever reason it is slow: names, connections, proxies or answers."""

OFFLINE_MODE = "offline mode is on"

Value = TypeVar("Value")


class HubUnavailableError(ModelError):
    """The hub cannot be reached, and the cache does not hold the file; a known model may not need it."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The hub's answer for a revision."""

    commit: str
    """The commit, as 40 hex digits."""
    files: frozenset[str]
    """The names of all its files."""


@lru_cache(maxsize=64)
def ask(repo: str, revision: str | None) -> Commit:
    """Ask the hub for the current commit of a revision. Answers are cached in this process, failures are not.

    Raises:
        HubUnavailableError: There is no answer within `TIMEOUT_SECONDS`.
        ModelError: There is no such model or revision, or access to it is denied.
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
            f"{repo}: there is no such model on the hub, or it is private",
            "check the name; set HF_TOKEN if it is private",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{repo}: there is no revision {revision!r}", "give a branch, tag or commit that exists"
        ) from error
    except _transport_errors() as error:
        waited = time.monotonic() - started
        raise HubUnavailableError(
            f"{repo}: the hub cannot be reached ({_reason(error)}, after {waited:.1f} s)"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubUnavailableError(f"{repo}: the answer is not from the Hugging Face hub") from error
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise ModelError(f"{repo}: the hub returned no commit")
    return Commit(info.sha, files)


def download(repo: str, commit: str, filename: str, observer: Observer = SILENT) -> str | None:
    """Fetch a file of a commit into the hub cache and return its path; None if the commit has no such file.

    Call `ask` first, because huggingface_hub alone retries for half a minute without network.

    Args:
        repo: The hub id.
        commit: The commit, 40 hex digits.
        filename: The name of the file in the repository.
        observer: Receives the progress of the download.

    Raises:
        HubUnavailableError: The hub cannot be reached.
        ModelError: Access is denied, or the download failed.
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
    """Yield options that make huggingface_hub report to a phase instead of drawing."""
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
    """Return a progress bar class for huggingface_hub that draws nothing and reports its count to a phase.

    Large files have two bars, one for received and one for written bytes; the phase follows the first of them.
    """
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        monitor_interval = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **(options | {"file": _DiscardedOutput(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            is_drawn: bool | None = super().update(n)
            phase.at(max(phase.state.done, int(self.n)), int(self.total) if self.total else None)
            return is_drawn

    return Bar


class _DiscardedOutput:
    """A text stream that discards its output."""

    def write(self, text: str) -> None:
        """Discard the text."""

    def flush(self) -> None:
        """Do nothing, because there is no buffer."""


def is_offline() -> bool:
    """Return whether huggingface_hub is set to offline mode, for example by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _within_time(action: Callable[[], Value]) -> Value:
    """Run an action in a thread that is abandoned if it takes too long.

    The timeout of a request does not limit its total time: looking up a name has no timeout, and each address of a host
    and each byte of an answer may take that long.
    """
    outcome: queue.SimpleQueue[Value | Exception] = queue.SimpleQueue()

    def act() -> None:
        try:
            outcome.put(action())
        except Exception as error:  # noqa: BLE001 - raised again in the calling thread
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
    """Return the errors of a failed request, for whichever HTTP library this huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _reason(error: Exception) -> str:
    """Return a short reason without URLs and tokens."""
    if isinstance(error, TimeoutError):
        return "no answer"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"HTTP {status}"
    cause: BaseException | None = error
    while cause is not None:  # the error of an HTTP library comes before that of the system
        if isinstance(cause, OSError) and cause.strerror:
            return str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
