"""Outputs that a run has not finished: found by the name that they will have, and said to be unfinished."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import storage_helpers as helpers
from exchange_helpers import fails, make, make_partial, mixed_shard
from run_helpers import internvit, state_of

from internvit_cli.config import Format
from internvit_cli.errors import OutputError
from internvit_cli.storage.output import Output
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from pathlib import Path

KEY = "a.jpg"
COMMANDS = {
    "info": ["info", "OUT"],
    "ls": ["ls", "OUT"],
    "verify": ["verify", "OUT"],
    "show": ["show", "OUT", KEY, "-o", "DIR"],
    "search": ["search", "OUT", "--key", KEY],
    "duplicates": ["duplicates", "OUT"],
    "report": ["report", "OUT", "-o", "DIR/r.html"],
    "export": ["export", "OUT", "DIR/e.csv"],
    "merge": ["merge", "OUT", "OTHER", "-o", "DIR/m.h5"],
    "diff": ["diff", "OUT", "OTHER"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("out", ["f.h5", "f.H5", "f"])
def test_every_command_that_reads_finds_what_is_unfinished_and_says_how_to_go_on(
    tmp_path: Path, name: str, out: str
) -> None:
    make_partial(tmp_path / out, mixed_shard(), [0, 1])
    make(tmp_path / "other.h5")
    (tmp_path / "dir").mkdir()
    places = {"OUT": str(tmp_path / out), "OTHER": str(tmp_path / "other.h5")}
    line = [places.get(word, word.replace("DIR", str(tmp_path / "dir"))) for word in COMMANDS[name]]
    before = {path: state for path, state in state_of(tmp_path).items() if "/dir/" not in path}
    result = internvit(*line)
    assert result.returncode == 0, result.stderr + result.stdout
    assert f"{out} is unfinished" in result.stderr and "extract command finishes it" in result.stderr
    assert {path: state for path, state in state_of(tmp_path).items() if "/dir/" not in path} == before


def test_an_index_of_what_is_unfinished_is_that_of_the_finished_file(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    make_partial(tmp_path / "f.h5", mixed_shard(), [0, 1])
    assert internvit("search", tmp_path / "f.h5", "--key", KEY, "--index").returncode == 0
    assert (tmp_path / "f.h5.search").is_dir() and not (tmp_path / "f.h5.partial.search").exists()


def test_info_tells_what_is_unfinished_and_how_much_of_it(tmp_path: Path) -> None:
    make_partial(tmp_path / "f.h5", mixed_shard(), [0, 1])
    facts = json.loads(internvit("info", tmp_path / "f.h5", "--json").stdout)
    assert facts["unfinished"] == str(tmp_path / "f.h5.partial")
    assert facts["images"]["pending"] == 3 and facts["images"]["done"] == 2
    table = internvit("info", tmp_path / "f.h5").stdout
    assert "unfinished" in table and "extract command finishes it" in " ".join(table.split())


@pytest.mark.parametrize("kind", [None, Format.H5, Format.NPY])
def test_info_tells_of_what_a_run_has_begun_beside_what_is_finished(tmp_path: Path, kind: Format | None) -> None:
    path = tmp_path / ("f" if kind else "f.h5")
    make(path, shard_format=kind)
    assert json.loads(internvit("info", path, "--json").stdout)["unfinished"] is None
    output = Output(str(path), kind)
    partial = output.partial_path(output.next_number())
    helpers.create_shard(output.backend, partial, mixed_shard())
    assert json.loads(internvit("info", path, "--json").stdout)["unfinished"] == partial


def test_what_is_not_there_at_all_is_said_to_be_so(tmp_path: Path) -> None:
    assert "f.h5 is not there" in fails(1, "info", tmp_path / "f.h5")


def test_from_python_what_is_unfinished_is_opened_by_its_own_name_only(tmp_path: Path) -> None:
    """Nobody trains on a part without knowing."""
    make_partial(tmp_path / "f.h5", mixed_shard(), [0, 1])
    with pytest.raises(OutputError, match="not there yet: the run that makes it has not finished") as caught:
        open_features(tmp_path / "f.h5")
    assert "f.h5.partial" in caught.value.hint and "extract" in caught.value.hint
    assert len(open_features(tmp_path / "f.h5.partial").done) == 2
