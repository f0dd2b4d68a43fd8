"""What is shown while a command goes on: on terminals of every width, in logs, and when nobody looks any more."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import shutil
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moments import wait_until
from run_helpers import command, extract, internvit, make_pictures
from terminal_helpers import BAR, Terminal, on_terminal, process_on_terminal

from internvit_cli import open_features
from internvit_cli.cli import progress as display
from internvit_cli.cli.app import run
from internvit_cli.cli.progress import (
    PhaseSnapshot,
    PlainDisplay,
    ProgressLine,
    TerminalDisplay,
    clock,
    fit_line,
    plain_line,
    progress,
)
from internvit_cli.config import ComputeDtype
from internvit_cli.errors import OutputError
from internvit_cli.extract.pipeline import extract as extract_in_process
from internvit_cli.options import ExtractOptions, ModelOptions, PictureOptions, RunOptions, StoreOptions
from internvit_cli.runtime.observer import BYTES, Observer, Phase, PhaseState, Work
from internvit_cli.runtime.signals import StopRequest
from internvit_cli.storage.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import IO

    Harm = Callable[[str, Output], None]

# ------------------------------------------------------------------------------------------------------------- phases


def test_a_total_that_turns_out_too_low_grows_and_an_unknown_one_stays_unknown() -> None:
    with Observer().phase("a", "image", 3) as known, Observer().phase("b", "image") as unknown:
        known.at(2)
        assert known.state.total == 3
        known.at(5)
        assert known.state.total == 5
        known.at(5, total=9)
        assert known.state.total == 9
        unknown.at(7)
        assert unknown.state.total is None


def test_a_phase_ends_with_its_block_whatever_ends_it() -> None:
    told = []

    class Recording(Observer):
        def began(self, phase: Phase) -> None:
            told.append(("began", phase.name))

        def ended(self, phase: Phase) -> None:
            told.append(("ended", phase.name))

    with pytest.raises(KeyboardInterrupt), Recording().phase("a"), Recording().phase("b"):
        raise KeyboardInterrupt
    assert told == [("began", "a"), ("began", "b"), ("ended", "b"), ("ended", "a")]


# -------------------------------------------------------------------------------------------------------------- words

ENCODING = PhaseSnapshot(
    "encoding", "image", PhaseState(1_234, 2_900, Work("tile", 15_000, 36_000), skipped=3), 1_220.0
)


def texts(line: ProgressLine) -> str:
    return line.left + ("|" + "#" * line.bar + "|" if line.bar else "") + line.right


def test_at_80_columns_the_bar_has_room_beside_images_speed_and_time_left() -> None:
    line = fit_line(ENCODING, 80)
    assert line.bar >= 15
    assert texts(line).endswith("|  42%  1,234/2,900  12.3 tiles/s  ETA 28:28  3 skipped")
    assert len(texts(line)) == 80
    good = dataclasses.replace(ENCODING, state=dataclasses.replace(ENCODING.state, skipped=0))
    assert texts(fit_line(good, 80)).endswith("|  42%  1,234/2,900 images  12.3 tiles/s  ETA 28:28")


def test_at_40_columns_a_bar_and_the_images_are_left() -> None:
    line = fit_line(ENCODING, 40)
    assert line.bar >= 10 and len(texts(line)) == 40
    assert texts(line).startswith("encoding |") and texts(line).endswith("|  42%  1,234/2,900")


def test_a_phase_of_unknown_length_shows_what_is_done_and_for_how_long_it_has_gone_on() -> None:
    assert (
        texts(fit_line(PhaseSnapshot("reading", "image", PhaseState(1_234), 65.0), 80)) == "reading  1,234 images  1:05"
    )
    assert (
        texts(fit_line(PhaseSnapshot("loading the model", "", PhaseState(), 3_725.4), 80))
        == "loading the model  1:02:05"
    )
    assert fit_line(PhaseSnapshot("reading", "image", PhaseState(1_234), 65.0), 20) == ProgressLine(
        "reading  1,234  1:05", "", 0
    )


@given(
    width=st.integers(1, 300),
    name=st.sampled_from(["encoding", "measuring what coarse types cost", "{odd}"]),
    unit=st.sampled_from(["image", BYTES, ""]),
    done=st.integers(0, 10**12),
    more=st.none() | st.integers(0, 10**12),
    tiles=st.none() | st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    skipped=st.integers(0, 10**6),
    seconds=st.floats(0, 10**8),
)
def test_a_line_fits_every_width_and_its_bar_is_wide_enough_to_be_read(
    width: int,
    name: str,
    unit: str,
    done: int,
    more: int | None,
    tiles: tuple[int, int] | None,
    skipped: int,
    seconds: float,
) -> None:
    work = None if tiles is None else Work("tile", tiles[0], sum(tiles))
    view = PhaseSnapshot(name, unit, PhaseState(done, None if more is None else done + more, work, skipped), seconds)
    line = fit_line(view, width)
    assert (len(texts(line)) <= width and line.bar == 0) or line.bar >= display.LEAST_BAR
    assert (line.bar == 0) or len(texts(line)) == width
    assert plain_line(view).startswith(f"{name}: ")


def test_a_line_of_a_log_names_what_is_counted_and_tells_a_part_from_a_whole() -> None:
    assert plain_line(ENCODING) == ("encoding: 1,234 of 2,900 images (42 %), 12.3 tiles/s, 28 min left, 3 skipped")
    assert plain_line(PhaseSnapshot("reading headers", "image", PhaseState(0, 1), 31.0)) == (
        "reading headers: 0 of 1 image (0 %), 31.0 s so far"
    )
    assert plain_line(PhaseSnapshot("loading the model", "", PhaseState(), 60.0)) == "loading the model: 1 min so far"
    assert plain_line(PhaseSnapshot("checking rows", BYTES, PhaseState(2 * 10**9, 8 * 10**9), 4.0)) == (
        "checking rows: 2.0 GB of 8.0 GB (25 %), 500.0 MB/s, 12.0 s left"
    )


def test_speed_and_time_left_follow_from_what_was_done_in_this_phase_alone() -> None:
    """A second shard, or a run that goes on: what was done before took no time of this phase."""
    view = PhaseSnapshot("encoding", "image", PhaseState(60, 100, Work("tile", 600, 1_000)), 10.0, before=500)
    assert view.rate == 10.0 and view.seconds_left == 40.0
    assert (
        PhaseSnapshot("encoding", "image", PhaseState(50, 100, Work("tile", 500, 1_000)), 10.0, before=500).seconds_left
        is None
    )


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3_599, "59:59"), (7_510, "2:05:10")])
def test_durations_read_as_on_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# ----------------------------------------------------------------------------------------------------------- displays


def test_work_without_a_callback_shows_a_sign_of_life_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.01)
    with progress(quiet=False) as observer:
        assert isinstance(observer, PlainDisplay)
        with observer.phase("hashing the weights"):
            wait_until(lambda: log.getvalue().count("hashing the weights: ") >= 2)
        with observer.phase("encoding", "image", 3) as phase:
            phase.at(2)
            wait_until(lambda: "encoding: 2 of 3 images (66 %)" in log.getvalue())
    assert "\r" not in log.getvalue()


def test_the_innermost_phase_is_the_one_that_is_shown() -> None:
    views: list[PhaseSnapshot] = []

    class Looking(PlainDisplay):
        def look(self, view: PhaseSnapshot) -> None:
            views.append(view)

    now = 0.0
    shown = Looking(lambda: now)
    with shown.phase("outside", "image", 2):
        now = 5.0
        with shown.phase("inside"):
            now = 7.0
            shown.look_now()
        now = 9.0
        shown.look_now()
    shown.look_now()
    assert [(view.name, view.seconds) for view in views] == [("inside", 2.0), ("outside", 9.0)]


def test_nothing_is_shown_when_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    with progress(quiet=True) as observer, observer.phase("encoding", "image", 3) as phase:
        phase.at(3)
        observer.note("nothing")
    assert log.getvalue() == ""


def test_lines_stand_above_the_one_that_is_drawn_and_it_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from internvit_cli.cli.console import say

    terminal = Terminal(60)
    with open(terminal.follower, "w", encoding="utf-8", closefd=False) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        with TerminalDisplay() as shown, shown.phase("encoding", "image", 4) as phase:
            phase.at(2)
            shown.note("a note")
            say("a line")
            phase.at(4)
    text = terminal.close()
    from terminal_helpers import Shown

    result = Shown(0, text)
    assert result.left == ["a note", "a line"]
    assert any(line.endswith("50%  2/4 images") and BAR in line for line in result.drawn)
    assert any(line.endswith("100%  4/4 images") for line in result.drawn)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_terminal_of_no_or_hardly_any_width_is_drawn_on_all_the_same(size: int) -> None:
    shown = on_terminal("plan", "examples/none", columns=size)
    assert shown.returncode == 2 and "no such file" in shown.text


# ------------------------------------------------------------------------------------- every command, on a terminal


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two outputs of six pictures, as a file and as a folder."""
    folder = tmp_path_factory.mktemp("outputs")
    make_pictures(folder / "pictures", 6)
    for name in ("feats.h5", "feats", "more.h5"):
        result = extract(folder / "pictures", "-o", folder / name, "--dtype", "float32", "--max-tiles", 2)
        assert result.returncode == 0, result.stderr
    return folder


COMMANDS = {
    "extract": ("extract", "{pictures}", "-o", "{tmp}/new.h5", "--model", "tiny-random"),
    "plan": ("plan", "{pictures}", "--model", "tiny-random"),
    "bench": ("bench", "{pictures}", "-o", "{tmp}/new.h5", "--model", "tiny-random", "--seconds", "0.1"),
    "verify": ("verify", "{out}/feats.h5", "--re-extract", "1"),
    "search": ("search", "{out}/feats.h5", "{picture}", "--sheet", "{tmp}/found.png"),
    "duplicates": ("duplicates", "{out}/feats.h5", "--sheet", "{tmp}/same.png"),
    "report": ("report", "{out}/feats.h5", "-o", "{tmp}/report.html"),
    "export": ("export", "{out}/feats.h5", "{tmp}/new.safetensors"),
    "merge": ("merge", "{out}/feats.h5", "{out}/feats", "-o", "{tmp}/all.h5"),
    "diff": ("diff", "{out}/feats.h5", "{out}/feats"),
    "show": ("show", "{out}/feats.h5", "part0/000.jpg", "-o", "{tmp}"),
}
MADE = {
    "extract": "new.h5",
    "search": "found.png",
    "report": "report.html",
    "export": "new.safetensors",
    "merge": "all.h5",
}
PHASES = {
    "extract": ("looking for images", "reading headers", "loading the model", "encoding", "publishing"),
    "plan": ("looking for images", "reading headers"),
    "bench": ("measuring the encoder", "measuring the decoding", "measuring the disk"),
    "verify": ("reading the index", "checking rows", "checking pictures", "hashing the weights", "encoding again"),
    "search": ("reading the output", "hashing the weights", "loading the model", "encoding", "comparing"),
    "duplicates": ("reading the output", "embedding", "comparing"),
    "report": ("finding neighbors", "projecting", "drawing token maps", "reading pictures", "writing the page"),
    "export": ("reading the output", "writing", "publishing"),
    "merge": ("reading the outputs", "writing", "publishing"),
    "diff": ("comparing vectors", "comparing tokens"),
    "show": ("reading the output", "drawing"),
}


def words_of(name: str, outputs: Path, tmp_path: Path) -> list[str]:
    places = {
        "out": outputs,
        "pictures": outputs / "pictures",
        "picture": outputs / "pictures" / "part0" / "000.jpg",
        "tmp": tmp_path,
    }
    return [word.format(**places) for word in COMMANDS[name]]


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_draws_its_phases_and_leaves_only_its_results(
    outputs: Path, tmp_path: Path, name: str, columns: int
) -> None:
    shown = on_terminal(*words_of(name, outputs, tmp_path), columns=columns)
    assert shown.returncode == 0, shown.text
    for phase in PHASES[name]:
        lines = shown.phase(phase[: columns - 1])
        assert lines, (phase, shown.drawn)
        drawn = {line for line in lines if "|" in line or line.endswith("0:00")}
        assert all(len(line) <= columns for line in drawn) and not drawn & set(shown.left)


def test_a_process_draws_a_bar_of_images_on_its_terminal(outputs: Path, tmp_path: Path) -> None:
    shown = process_on_terminal(command(*words_of("extract", outputs, tmp_path)))
    assert shown.returncode == 0, shown.text
    assert shown.phase("encoding |")[-1].startswith("encoding |" + BAR * 10)
    assert "100%  6/6 images" in shown.phase("encoding |")[-1]
    assert "images found = 6 done + 0 skipped + 0 pending" in shown.text


def test_on_a_dumb_terminal_and_in_a_log_nothing_is_drawn(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = internvit(*words_of("extract", outputs, tmp_path))
    assert "\r" not in plain.stderr
    assert plain.stderr.startswith("6 images found = 6 to encode (")


# --------------------------------------------------------------------------------------------- nobody looks any more


@pytest.mark.parametrize("name", COMMANDS)
def test_a_terminal_that_goes_away_costs_no_work(
    outputs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP is ignored, as under nohup: writes, and the question for the terminal's size, fail with an I/O error."""
    terminal = Terminal()
    began = TerminalDisplay.began

    def began_and_hung_up(self: TerminalDisplay, phase: Phase) -> None:
        began(self, phase)
        terminal.hang_up()

    monkeypatch.setattr(TerminalDisplay, "began", began_and_hung_up)
    shown = on_terminal(*words_of(name, outputs, tmp_path), terminal=terminal)
    assert shown.returncode == 0
    if name in MADE:
        assert (tmp_path / MADE[name]).stat().st_size > 0


def with_stdout(stream: IO[str], *arguments: object) -> tuple[int, str]:
    """Run a command line in this process; returns its exit code and what it said on stderr."""
    stderr = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stderr):
        code = run([str(argument) for argument in arguments])
    return int(code), stderr.getvalue()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is not there")
@pytest.mark.parametrize("name", COMMANDS)
def test_results_that_cannot_be_written_are_an_error_at_the_end_when_all_work_is_done(
    outputs: Path, tmp_path: Path, name: str
) -> None:
    with open("/dev/full", "w") as full:
        code, stderr = with_stdout(full, *words_of(name, outputs, tmp_path))
    lines = stderr.splitlines()
    assert code == 1 and lines[-2] == "error: cannot write to standard output: No space left on device"
    if name in MADE:
        assert (tmp_path / MADE[name]).stat().st_size > 0


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_of_a_pipe_who_has_seen_enough_ends_nothing_with_an_error(
    outputs: Path, tmp_path: Path, name: str
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "w") as closed:
        code, stderr = with_stdout(closed, *words_of(name, outputs, tmp_path))
    assert code == 0 and "error" not in stderr


class BrokenDisk(io.StringIO):
    """A stream to a file on a disk that fails."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w")

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_an_io_error_of_a_file_is_no_terminal_that_is_gone(outputs: Path, tmp_path: Path) -> None:
    code, stderr = with_stdout(BrokenDisk(tmp_path / "out.json"), "info", outputs / "feats.h5", "--json")
    assert code == 1 and "error: cannot write to standard output: Input/output error" in stderr


# ------------------------------------------------------------------------------------- resumes of damaged outputs

ROW = 2
"""The image that is damaged, by the order of keys."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("mixed") / "pictures"
    make_pictures(folder, 4)
    (folder / "part1" / "broken.jpg").write_bytes(next((folder / "part0").iterdir()).read_bytes()[:700])
    return folder


def encode(pictures: Path, output: Path | str, *options: object) -> tuple[object, ...]:
    return (
        "extract",
        pictures,
        "-o",
        output,
        "--model",
        "tiny-random",
        "--dtype",
        "float32",
        "--max-tiles",
        2,
        *options,
    )


def leave_unfinished(pictures: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed when all rows are done, and before the output has its name."""
    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", lambda *_: (_ for _ in ()).throw(OutputError("killed")))
        assert internvit(*encode(pictures, output)).returncode == 1


def overwrite(path: str, output: Output, name: str, row: int, value: bytes) -> None:
    extent = output.backend.extents(path)[name]
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset + row * extent.spec.row_bytes)
        file.write(value)


def damage_row(path: str, output: Output) -> None:
    overwrite(path, output, "pooled", ROW, b"\x99" * 4)


def drop_digest(path: str, output: Output) -> None:
    overwrite(path, output, "image/digest", ROW, bytes(32))


def drop_skip_line(path: str, output: Output) -> None:
    other = {"key": "other.jpg", "reason": "truncated", "exception": "", "message": "", "attempt": 1}
    pathlib.Path(output.skipped_path).write_text(json.dumps(other) + "\n")


def leave_alone(path: str, output: Output) -> None:
    pass


def check_run(arguments: tuple[object, ...], more: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends well, and shows as many images as turned pending, whenever that became known."""
    if way == "terminal":
        shown = on_terminal(*arguments)
        assert shown.returncode == 3, shown.text
        assert "Traceback" not in shown.text and "/0 image" not in shown.text
        bars = [line for line in shown.phase("encoding") if f"100%  {more}/{more} image" in line]
        assert bool(bars) == bool(more), shown.drawn
        return
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.002)
    result = internvit(*arguments)
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr and "of 0 image" not in result.stderr


@pytest.mark.parametrize("way", ["terminal", "log"])
@pytest.mark.parametrize("name", ["feats.h5", "feats"])
@pytest.mark.parametrize(
    ("harm", "more"),
    [(damage_row, 1), (drop_digest, 1), (drop_skip_line, 1), (leave_alone, 0)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_an_unfinished_output_with_damage_is_finished_and_shown(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Harm, more: int, name: str, way: str
) -> None:
    """Nothing was planned, the engine starts late, and still every figure is there."""
    leave_unfinished(mixed, tmp_path / name, monkeypatch)
    output = Output(str(tmp_path / name))
    harm(output.partial_path(output.next_number()), output)
    check_run(encode(mixed, tmp_path / name), more, way, monkeypatch)
    assert len(open_features(tmp_path / name).done) == 4


@pytest.mark.parametrize("way", ["terminal", "log"])
@pytest.mark.parametrize("option", ["--prune", "--relocate"])
def test_a_finished_file_with_a_damaged_row_that_is_made_anew_is_shown(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, way: str
) -> None:
    pictures, output = tmp_path / "pictures", Output(str(tmp_path / "feats.h5"))
    shutil.copytree(mixed, pictures)
    assert internvit(*encode(pictures, output.path)).returncode == 3
    damage_row(output.path, output)
    if option == "--prune":
        (pictures / "part0" / "000.jpg").unlink()
        arguments = encode(pictures, output.path, "--prune")
    else:
        pictures.rename(tmp_path / "moved")
        arguments = encode(tmp_path / "moved", output.path, "--relocate", f"{pictures}={tmp_path / 'moved'}")
    check_run(arguments, 1, way, monkeypatch)
    assert len(open_features(output.path).done) == (3 if option == "--prune" else 4)


@pytest.mark.parametrize("name", ["feats.h5", "feats"])
def test_the_bar_goes_over_all_shards_and_over_what_an_earlier_run_left(mixed: Path, tmp_path: Path, name: str) -> None:
    """Stopped after the first image, with new pictures since, and in a folder with shards of one image each."""
    pictures, output = tmp_path / "pictures", tmp_path / name
    shutil.copytree(mixed, pictures)
    options = options_of(pictures, output)
    stop = StopRequest()

    class StopAtOnce(Observer):
        def moved(self, phase: Phase) -> None:
            if phase.name == "encoding" and phase.state.done == 1:
                stop.request(signal.SIGTERM)

    stopped = extract_in_process(options, stop, StopAtOnce())
    assert stopped.stopped_by == signal.SIGTERM and stopped.counts.pending > 0
    make_pictures(pictures / "more", 3, seed=5)
    states: list[tuple[int, int | None]] = []

    class Recording(Observer):
        def moved(self, phase: Phase) -> None:
            if phase.name == "encoding":
                states.append((phase.state.done, phase.state.total))

    summary = extract_in_process(options, StopRequest(), Recording())
    assert {total for _, total in states} == {stopped.counts.pending + 3}
    assert [done for done, _ in states] == sorted(done for done, _ in states)
    assert states[-1][0] == states[-1][1]
    assert summary.counts.done == 7 and summary.counts.pending == 0


def options_of(pictures: Path, output: Path) -> ExtractOptions:
    return ExtractOptions(
        sources=(str(pictures),),
        model=ModelOptions("tiny-random"),
        pictures=PictureOptions(max_tiles=2),
        store=StoreOptions(str(output), shard_bytes=None if output.suffix else 30_000),
        run=RunOptions(dtype=ComputeDtype.FLOAT32, batch_tiles=1),
    )
