"""Parse the values of --model, without opening checkpoints and without asking the hub."""

from __future__ import annotations

import difflib
import os
import re
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.config import DEFAULT_MODEL
from internvit_cli.errors import ModelError, UsageError
from internvit_cli.model.card import recorded_name
from internvit_cli.model.files import OFFLINE_HINT, TINY_RANDOM, WEIGHTS_SUFFIX
from internvit_cli.model.hub_cache import repo_of_folder, snapshot_in
from internvit_cli.model.published import BY_NAME, KnownModel
from internvit_cli.model.weights import FOREIGN_WEIGHTS, PICKLES, foreign_refusal, is_set_of_weights, pickle_refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com"})
_MARKS = frozenset({"tree", "blob", "resolve", "raw", "commit", "commits"})
"""Path segments before a revision in the address of a page."""

_OTHER_PARTS = frozenset({"datasets", "spaces", "collections", "papers", "blog", "docs", "models"})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w.][\w./-]{0,254}", re.ASCII)
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|(?:www\.)?(?:huggingface\.co|hf\.co)/)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ModelName:
    """A parsed --model, in which exactly one of `directory`, `repo` and `is_built_in` is set."""

    directory: str | None = None
    repo: str | None = None
    """Hub id."""
    is_built_in: bool = False
    revision: str | None = None
    """A branch, tag or commit on the hub; None means main."""
    weights_file: str | None = None
    """The file of weights or the index that the user named."""
    known: KnownModel | None = None
    """The facts about a published encoder that need no files."""

    @property
    def recorded(self) -> str:
        """The name of the model in feature files."""
        return recorded_name(self.repo or TINY_RANDOM, self.directory, self.weights_file)


def parse_model_name(name: str, revision: str | None = None) -> ModelName:
    """Parse a --model and a --revision.

    Args:
        name: tiny-random, an alias (in any case), a hub id, the address of a model's page on the hub, the folder of a
            checkpoint, a folder of the hub cache, or a file of weights beside its config.json.
        revision: A branch, tag or commit on the hub.

    Raises:
        ModelError: The name is none of these; the hint says what may have been meant.
        UsageError: The revision is invalid, or the model has no revisions.
    """
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"--revision {revision!r} is not a branch, tag or commit", "give a name such as main")
    if name == TINY_RANDOM:
        _refuse_revision(revision, "is built in memory")
        return ModelName(is_built_in=True)
    name = os.path.expanduser(name)  # for variables and configuration files, in which no shell expands ~
    if _URL.match(name):
        return _of_address(name, revision)
    known = BY_NAME.get(name.casefold())
    if os.path.isdir(name) and (known is None or os.path.exists(os.path.join(name, "config.json"))):
        return _of_folder(name, revision)
    if known is not None:
        return ModelName(repo=known.repo, revision=revision, known=known)
    if os.path.lexists(name) or _is_weights(name):
        return _of_file(name, revision)
    repo = repo_of_folder(name)
    _check_hub_id(repo or name)
    return _of_repo(repo or name, revision)


def _of_repo(repo: str, revision: str | None, weights_file: str | None = None) -> ModelName:
    known = BY_NAME.get(repo.casefold())
    return ModelName(
        repo=known.repo if known else repo,
        revision=revision,
        weights_file=weights_file,
        known=known if weights_file is None else None,
    )


def _of_folder(name: str, revision: str | None) -> ModelName:
    snapshot = snapshot_in(name, revision)
    if snapshot is not None:
        return ModelName(directory=snapshot)
    _refuse_revision(revision, "is a directory")
    return ModelName(directory=name)


def _of_file(name: str, revision: str | None) -> ModelName:
    _refuse_revision(revision, "is a file")
    folder, filename = os.path.split(name)
    if not os.path.exists(name):
        raise ModelError(f"{name}: there is no such file", OFFLINE_HINT)
    weights_file = _file_within(filename, folder or ".")
    if weights_file is not None or filename == "config.json" or filename.endswith(WEIGHTS_SUFFIX):
        return ModelName(directory=folder or ".", weights_file=weights_file)
    raise ModelError(f"{name}: neither the folder of a checkpoint nor a {WEIGHTS_SUFFIX} file", OFFLINE_HINT)


def _of_address(address: str, revision: str | None) -> ModelName:
    """Parse an address such as https://huggingface.co/OpenGVLab/InternVL3-1B/tree/main, or hf://OWNER/NAME@REVISION."""
    scheme, _, rest = address.rpartition("://")
    host, _, path = rest.partition("#")[0].partition("?")[0].partition("/")
    if scheme.casefold() == "hf":
        return _of_parts([host, *path.split("/")], address, revision)
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if scheme.casefold() not in {"", "http", "https"} or host.casefold() not in HUB_HOSTS | {endpoint.casefold()}:
        raise ModelError(f"{address}: not an address of the Hugging Face hub", "download the model and name its folder")
    return _of_parts(path.split("/"), address, revision)


def _of_parts(parts: Sequence[str], address: str, revision: str | None) -> ModelName:
    parts = [urllib.parse.unquote(part) for part in parts if part]
    if len(parts) < 2 or parts[0] in _OTHER_PARTS:
        raise ModelError(f"{address}: not the page of a model", f"it looks like https://huggingface.co/{DEFAULT_MODEL}")
    owner, name, *rest = parts
    name, _, named = name.removesuffix(".git").partition("@")
    filename = None
    if len(rest) > 1 and rest[0] in _MARKS:
        mark, named, *inner = rest
    else:
        mark, inner = "", [] if rest and rest[0] in {"discussions", *_MARKS} else rest
    if inner:
        if len(inner) > 1 or mark == "tree":
            raise ModelError(
                f"{address}: a folder within the repository of a model",
                "download it (hf download) and name that folder",
            )
        filename = _file_within(inner[0], address)
    revisions = {found for found in (revision, named) if found and found != "main"} or {revision or ""}
    if len(revisions) > 1:
        raise UsageError(f"--revision {revision}: the address says {named}", "leave one of them out")
    found = revisions.pop() or None
    if found is not None and (not _REVISION.fullmatch(found) or ".." in found):
        raise ModelError(f"{address}: {found!r} is not a branch, tag or commit", "copy the address of the model's page")
    repo = f"{owner}/{name}"
    _check_hub_id(repo)
    return _of_repo(repo, found, filename)


def _file_within(filename: str, where: str) -> str | None:
    """Return the name of a file that holds a whole set of weights, or is its index; None for other files.

    Raises:
        ModelError: The file holds weights in another format.
    """
    if filename.endswith(PICKLES):
        raise pickle_refusal(where, filename)
    kind = FOREIGN_WEIGHTS.get(os.path.splitext(filename)[1].lower())
    if kind is not None:
        raise foreign_refusal(where, filename, kind)
    return filename if is_set_of_weights(filename) else None


def _is_weights(name: str) -> bool:
    return name.casefold().endswith((*PICKLES, *FOREIGN_WEIGHTS, WEIGHTS_SUFFIX))


def _refuse_revision(revision: str | None, because: str) -> None:
    if revision is not None:
        raise UsageError(f"--revision {revision}: the model {because} and has no revisions", "leave out --revision")


def _check_hub_id(name: str) -> None:
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: there is no such model directory", OFFLINE_HINT)
    if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name and not name.endswith(".git"):
        return
    close = difflib.get_close_matches(name.casefold(), [*BY_NAME, TINY_RANDOM], n=2, cutoff=0.5)
    suggestion = f"did you mean {' or '.join(close)}? " if close else ""
    raise ModelError(
        f"{name!r}: not a directory, a known model, or a hub id such as {DEFAULT_MODEL}", suggestion + OFFLINE_HINT
    )
