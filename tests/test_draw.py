"""Colors, text, figures, and pictures in a terminal."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from internvit_cli.config import Graphics
from internvit_cli.viz.draw import figure as figure_module
from internvit_cli.viz.draw.figure import LEAST_WIDTH, MARGIN, Panel, figure
from internvit_cli.viz.draw.palette import DIVERGING, Scale, short_number, unit_colors
from internvit_cli.viz.draw.sheet import EMPTY, Cell, SheetRow, contact_sheet
from internvit_cli.viz.draw.terminal import CELL_WIDTH, detect, render
from internvit_cli.viz.draw.text import FAINT, PAPER, drawable, shortened_to_width, text_width, wrap_text, write_line

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))


# ------------------------------------------------------------------------------------------------------------- colors


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 50))
def test_a_scale_is_monotone_and_clipped_at_its_ends(low, span, steps):
    scale = Scale(low, low + span)
    colors = scale.colors(np.linspace(low - span, low + 2 * span, 3 * steps))
    assert colors.dtype == np.uint8 and (colors[0] == [68, 1, 84]).all() and (colors[-1] == [253, 231, 37]).all()
    light = colors.astype(int) @ [2, 7, 1]
    assert (np.diff(light) >= -60).all(), "viridis grows lighter throughout"


def test_what_is_no_number_is_grey_and_a_scale_without_range_has_one_color():
    assert Scale(0, 1).colors(np.array([np.nan])).tolist() == [[128, 128, 128]]
    assert len(np.unique(Scale(3, 3).colors(np.array([1.0, 3.0, 9.0])), axis=0)) == 1
    assert Scale(-1, 1, DIVERGING).colors(np.array([0.0])).tolist() == [[247, 247, 247]]


def test_three_numbers_become_red_green_and_blue():
    colors = unit_colors(np.array([[0.0, 5.0, 9.0], [-1.0, 2.5, 4.0]]), np.zeros(3), np.array([1.0, 5.0, 4.0]))
    assert colors.tolist() == [[0, 255, 255], [0, 128, 255]]


@given(st.floats(-1e30, 1e30))
def test_labels_are_short_and_right_to_three_digits(value):
    label = short_number(value)
    assert len(label) <= 9
    assert abs(float(label) - value) <= 0.06 * abs(value)


# ---------------------------------------------------------------------------------------------------------------- text


@given(st.text(max_size=80), st.integers(0, 400))
def test_text_is_cut_to_fit_and_drawn_in_letters_that_the_font_has(text, width):
    assert (drawable(text).isascii() and drawable(text).isprintable()) or not text
    cut = shortened_to_width(text, 13, width)
    assert text_width(cut, 13) <= width or not cut
    if text_width(text, 13) <= width:
        assert cut == drawable(text)


def test_a_long_key_keeps_its_end():
    key = "folder/" * 30 + "the-picture.jpg"
    assert shortened_to_width(key, 13, 300).startswith("folder") and shortened_to_width(key, 13, 300).endswith(
        "picture.jpg"
    )


@given(st.text(max_size=300), st.integers(30, 400))
def test_wrapped_text_fits_and_loses_nothing(text, width):
    lines = wrap_text(text, 13, width)
    assert all(text_width(line, 13) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == drawable(text).replace(" ", "")


@pytest.mark.parametrize("size", [12, 13, 16, 20])
@pytest.mark.parametrize("words", [("(L2", "norm)"), ("longer", "than"), ("f", "j"), ("1", "1")])
def test_a_gap_between_words_is_seen(size, words):
    """Wider than any gap between the letters of a word."""
    paper = Image.new("RGB", (400, 60), PAPER)
    write_line(paper, (10, 10), " ".join(words), size)
    inked = (np.asarray(paper.convert("L")) < 200).any(axis=0)
    columns = np.flatnonzero(inked)
    assert np.diff(columns).max() >= size // 4 + 1


# ------------------------------------------------------------------------------------------------------------- figures


def texts_of(monkeypatch) -> list[tuple[float, float, float, str]]:
    """Left, right and top of each line that is written on a figure, and its text; filled as figures are drawn."""
    written = []
    real = figure_module.write_line

    def spy(sheet, place, text, size, *rest):
        written.append((place[0], place[0] + text_width(text, size), place[1], text))
        real(sheet, place, text, size, *rest)

    monkeypatch.setattr(figure_module, "write_line", spy)
    return written


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        pytest.param(shape, count, marks=[] if count == 3 or shape == (1600, 80) else pytest.mark.sweep)
        for shape in ((640, 427), (427, 640), (1600, 80), (80, 1600), (8, 8), (640, 640))
        for count in (1, 3, 5)
    ],
)
def test_no_word_of_a_figure_is_lost_overlaps_another_or_leaves_the_sheet(monkeypatch, shape, count):
    written = texts_of(monkeypatch)
    caption = "a sentence of some length below a picture, longer than " + "and ".join(map(str, range(20)))
    panels = [Panel("x", "a title that is long", Image.new("RGB", shape), [caption], Scale(-1234, 1234))] * count
    sheet = figure("key/" * 300, "facts " * 60, panels)
    for left, right, _, text in written:
        assert left >= 0 and right <= sheet.width, text
    for number, (left, right, top, text) in enumerate(written):
        for other_left, other_right, other_top, other in written[:number]:
            assert not text or not other or abs(top - other_top) >= 12 or right <= other_left or other_right <= left
    said = " ".join(text for _, _, _, text in written)
    assert said.count(caption) == count and said.count("...") == 1, "the key is cut in its middle, no sentence is"


def test_a_place_that_is_free_says_how_to_read_the_figure(monkeypatch):
    written = texts_of(monkeypatch)
    panels = [Panel("x", f"map {n}", Image.new("RGB", (640, 427)), meaning=f"What map {n} means.") for n in range(5)]
    sheet = np.asarray(figure("title", "facts", panels))
    assert {f"What map {n} means." for n in range(5)} <= {text for *_, text in written}
    corner = sheet[len(sheet) // 2 :, -sheet.shape[1] // 4 :]
    assert (corner != PAPER).any(), "the sixth place is not empty"


@pytest.mark.parametrize(("shape", "rows"), [((427, 640), 1), ((80, 1600), 1), ((1600, 80), 5), ((640, 427), 2)])
def test_five_panels_are_laid_out_for_their_shape(shape, rows):
    sheet = figure("title", "facts", [Panel("x", "a", Image.new("RGB", shape))] * 5)
    assert rows * shape[1] < sheet.height < (rows + 1) * max(shape[1], 160) + 200
    assert 0.5 < sheet.width / sheet.height < 4


def test_a_sheet_says_why_a_picture_is_missing_within_its_place():
    reason = "it changed since it was encoded, " * 20
    cells = [Cell(PHOTO, ("a",)), Cell(None, ("b",), problem=reason)]
    sheet = np.asarray(contact_sheet([SheetRow("row", cells)]))
    rows, columns = np.nonzero((sheet == EMPTY).all(axis=2))
    place = sheet[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (place == FAINT).all(axis=2).any() or (place.min(axis=(0, 1)) < EMPTY[0] - 60).all(), "it is written there"
    border = np.concatenate([place[0], place[-1], place[:, 0], place[:, -1]])
    assert (border == EMPTY).all(), "and nowhere beyond"


@pytest.mark.parametrize("cells", [1, 6])
def test_notes_stand_above_the_rows_of_a_sheet_which_stay_as_they_are(cells):
    rows = [SheetRow("row", [Cell(PHOTO, ("a",))] * cells)]
    plain, noted = (np.asarray(contact_sheet(rows, notes)) for notes in ((), ("a sentence of some length " * 5, "b")))
    added = len(noted) - len(plain)
    assert added > 0 and (noted[:added] != PAPER).any()
    assert (noted[:, -MARGIN // 2 :] == PAPER).all(), "long ones are wrapped"
    assert np.array_equal(noted[added + MARGIN :], plain[MARGIN:])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (900, 20), (20, 900)])
def test_a_figure_holds_every_panel_whole_and_none_over_another(count, shape):
    colors = [(250 - 30 * number, 20, 40 * number) for number in range(count)]
    panels = [
        Panel("x", "a title", Image.new("RGB", shape, color), ["a line"], Scale(0, 1) if number % 2 else None)
        for number, color in enumerate(colors)
    ]
    sheet = np.asarray(figure("title", "facts", panels))
    boxes = []
    for color in colors:
        rows, columns = np.nonzero((sheet == color).all(axis=2))
        boxes.append((rows.min(), rows.max(), columns.min(), columns.max()))
        assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == shape[::-1]
        assert len(rows) >= shape[0] * shape[1]
    assert len(set(boxes)) == count
    assert (sheet[-MARGIN // 2 :] == PAPER).all() and (sheet[:, -MARGIN // 2 :] == PAPER).all()
    assert sheet.shape[1] >= LEAST_WIDTH


# ------------------------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, Graphics.KITTY),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, Graphics.KITTY),
        ({"TERM": "xterm-ghostty"}, Graphics.KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, Graphics.ITERM2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, Graphics.ITERM2),
        ({"TERM": "foot"}, Graphics.SIXEL),
        ({"TERM": "xterm-256color"}, Graphics.BLOCKS),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, Graphics.BLOCKS),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, Graphics.BLOCKS),
        ({}, Graphics.BLOCKS),
    ],
)
def test_a_terminal_is_known_by_its_environment(environment, expected):
    assert detect(environment) is expected


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def test_kitty_gets_a_png_in_pieces_that_end_once():
    text = render(PHOTO, Graphics.KITTY, columns=80)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{control};{data}\x1b\\" for control, data in pieces) + "\n" == text
    assert "a=T" in pieces[0][0] and "f=100" in pieces[0][0]
    assert all(control.endswith("m=1") for control, _ in pieces[:-1]) and pieces[-1][0].endswith("m=0")
    assert all(len(data) <= 4096 for _, data in pieces)
    assert np.array_equal(decoded("".join(data for _, data in pieces)), np.asarray(PHOTO))


def test_iterm2_gets_a_png_at_once():
    text = render(PHOTO, Graphics.ITERM2, columns=80)
    match = re.fullmatch(r"\x1b\]1337;File=inline=1;size=\d+:([^\a]*)\a\n", text)
    assert match and np.array_equal(decoded(match[1]), np.asarray(PHOTO))


def test_half_blocks_are_the_pixels_two_a_character():
    for height in (60, 61):
        image = PHOTO.resize((40, height))
        text = render(image, Graphics.BLOCKS, columns=80)
        lines = text.splitlines()
        assert len(lines) == (height + 1) // 2 and all(line.endswith("\x1b[0m") for line in lines)
        number = r"(\d+);(\d+);(\d+)"
        cells = [re.findall(rf"\x1b\[38;2;{number};48;2;{number}m\u2580", line) for line in lines]
        pixels = np.array(cells, int).reshape(len(lines), 40, 2, 3).swapaxes(1, 2).reshape(-1, 40, 3)
        assert np.array_equal(pixels[:height], np.asarray(image))


def read_sixel(text: str) -> np.ndarray:
    """A plain sixel decoder: colors in percent, runs, carriage returns, new lines."""
    match = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\\n', text, re.DOTALL)
    assert match
    width, height = int(match[1]), int(match[2])
    picture = np.zeros((-(-height // 6) * 6, width, 3), int)
    palette: dict[int, list[float]] = {}
    color, x, top = 0, 0, 0
    for token in re.findall(r"#\d+;2;\d+;\d+;\d+|#\d+|!\d+.|\$|-|.", match[3]):
        if token.startswith("#") and ";" in token:
            number, _, *parts = (int(part) for part in token[1:].split(";"))
            palette[number] = [part * 2.55 for part in parts]
        elif token.startswith("#"):
            color = int(token[1:])
        elif token == "$":
            x = 0
        elif token == "-":
            x, top = 0, top + 6
        else:
            length, bits = (int(token[1:-1]), ord(token[-1]) - 63) if token[0] == "!" else (1, ord(token) - 63)
            for row in range(6):
                if bits >> row & 1:
                    picture[top + row, x : x + length] = palette[color]
            x += length
    return picture[:height]


@pytest.mark.parametrize("height", [60, 61, 5])
def test_sixel_is_the_picture_in_a_palette(height):
    image = PHOTO.resize((90, height))
    found = read_sixel(render(image, Graphics.SIXEL, columns=80))
    expected = np.asarray(image.quantize(255).convert("RGB"), int)
    assert np.abs(found - expected).max() <= 2, "colors in percent round"


@pytest.mark.parametrize("graphics", [Graphics.KITTY, Graphics.SIXEL, Graphics.BLOCKS], ids=lambda g: g.value)
def test_a_picture_never_is_wider_than_the_terminal(graphics):
    wide = Image.new("RGB", (3000, 100), (200, 10, 10))
    text = render(wide, graphics, columns=50)
    if graphics is Graphics.BLOCKS:
        assert text.splitlines()[0].count("\u2580") == 50
    elif graphics is Graphics.SIXEL:
        assert read_sixel(text).shape[1] == 50 * CELL_WIDTH
    else:
        assert decoded("".join(re.findall(r";([^\x1b;]*)\x1b\\", text))).shape[1] == 50 * CELL_WIDTH
