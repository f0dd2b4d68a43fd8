"""The report's page in a headless browser: it says nothing on the console, asks no network, and can be used."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import storage_helpers as helpers
from browser import Browser, Page, why_no_browser
from run_helpers import internvit

from internvit_cli.config import Skipped, Status, Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WIDTHS = (1280, 390)
POINTED = "[...document.querySelectorAll('#tip .text div')].map((line) => line.textContent)"
CENTRE = """(() => {
    const box = document.querySelector('canvas').getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if reason := why_no_browser():
        pytest.skip(reason)
    with Browser() as browser:
        yield browser


@pytest.fixture
def shown(browser: Browser, report_page: Path) -> Iterator[Page]:
    """The page of photographs and hostile names; whatever a test does in it, nothing may complain."""
    tab = browser.page()
    tab.open(report_page)
    yield tab
    assert not tab.complaints
    tab.close()


def text(tab: Page, selector: str) -> str:
    return tab.evaluate(f"document.querySelector({selector!r}).textContent")


def look_up(tab: Page, wanted: str) -> None:
    """Type into the search, and wait for the answer."""
    tab.evaluate("document.getElementById('search').value = ''; document.getElementById('search').focus()")
    tab.evaluate("document.getElementById('found').textContent = ''")
    tab.type(wanted)
    tab.wait("document.getElementById('found').textContent !== ''")


def point_at(tab: Page, key: str) -> None:
    """Bring an image to the middle of the map, and the pointer to it."""
    tab.evaluate(f"showOnMap(images.keys.indexOf({key!r}))")
    settle(tab)
    x, y = tab.evaluate(CENTRE)
    tab.pointer("Moved", x + 1, y + 1)
    tab.wait("!document.getElementById('tip').hidden")


def settle(tab: Page) -> None:
    """Wait until the page has drawn what it was asked to draw."""
    tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")


def painted(tab: Page) -> int:
    """Pixels of the map that are not empty."""
    return tab.evaluate("""(() => {
        const canvas = document.querySelector('canvas');
        const copy = Object.assign(document.createElement('canvas'), { width: canvas.width, height: canvas.height });
        const pen = copy.getContext('2d', { willReadFrequently: true });
        pen.drawImage(canvas, 0, 0);
        const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data;
        return pixels.reduce((sum, value, place) => sum + (place % 4 === 3 && value > 0), 0);
    })()""")


# ------------------------------------------------------------------------------------------------ how it looks


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_every_width_in_light_and_dark(browser, report_page, width, dark):
    tab = browser.page(width, 844, dark=dark)
    tab.open(report_page)
    assert not tab.complaints
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    beyond = """[...document.querySelectorAll('main *')].filter((one) => {
        const box = one.getBoundingClientRect();
        return box.width && box.right > innerWidth + 1 && !one.closest('.scroll, .strip');
    }).map((one) => one.outerHTML.slice(0, 80))"""
    assert tab.evaluate(beyond) == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background))) / 3
    assert light < 60 if dark else light > 200
    assert painted(tab) > 100
    tab.close()


BOXES = """(selector) => [...document.querySelectorAll(selector)].map((one) => {
    const { left, top, right, bottom } = one.getBoundingClientRect();
    return [left, top, right, bottom, one.textContent.slice(0, 40) || one.alt];
}).filter(([left, top, right, bottom]) => right > left && bottom > top)"""


@pytest.mark.parametrize("width", [320, 390, 600, 820, 1280, 2000])
def test_no_picture_or_caption_lies_over_another(browser, report_page, width):
    tab = browser.page(width, 844)
    tab.open(report_page)
    boxes = tab.evaluate(f"({BOXES})('figure .overlay, figure .thumb, figcaption > *')")
    assert len(boxes) > 50
    for number, (left, top, right, bottom, name) in enumerate(boxes):
        for other in boxes[:number]:
            apart = left >= other[2] - 1 or right <= other[0] + 1 or top >= other[3] - 1 or bottom <= other[1] + 1
            assert apart, (name, other)
    tab.close()


@pytest.mark.parametrize("width", [320, 390])
def test_no_table_is_cut_on_a_phone_and_every_value_keeps_its_name(browser, report_page, width):
    tab = browser.page(width, 844)
    tab.open(report_page)
    tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    cut = """[...document.querySelectorAll('.scroll, table')]
        .filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.outerHTML.slice(0, 60))"""
    assert tab.evaluate(cut) == []
    named = tab.evaluate("""[...document.querySelectorAll('#skipped td, #throughput td')]
        .filter((one) => one.offsetHeight).map((one) => getComputedStyle(one, '::before').content)""")
    assert {'"Key"', '"Reason"', '"Message"', '"Duration"', '"Images/s"'} <= set(named)
    tab.close()


def test_a_box_shows_where_more_of_it_can_be_scrolled_to_and_has_a_tab_stop_only_then(shown):
    shown.evaluate("""document.querySelector('#skipped .scroll').style.width = '200px'""")
    shown.wait("document.querySelector('#skipped .scroll').matches('.more-right:not(.more-left)[tabindex]')")
    assert "36px" in shown.evaluate("getComputedStyle(document.querySelector('#skipped .scroll')).maskImage")
    shown.evaluate("document.querySelector('#skipped .scroll').scrollLeft = 1e6")
    shown.wait("document.querySelector('#skipped .scroll').matches('.more-left:not(.more-right)')")
    shown.evaluate("document.querySelector('#skipped .scroll').style.width = ''")
    shown.wait("!document.querySelector('#skipped .scroll').matches('.more-left, .more-right, [tabindex]')")


@pytest.mark.parametrize("width", [390, 700, 1280])
def test_a_row_of_neighbors_fills_its_width(browser, report_page, width):
    tab = browser.page(width, 844)
    tab.open(report_page)
    rows = tab.evaluate("""[...document.querySelectorAll('#neighbors .row')].map((row) => {
        const line = [...row.children].filter((one) => one.offsetTop === row.children[0].offsetTop);
        const filled = line.at(-1).getBoundingClientRect().right - row.getBoundingClientRect().left;
        return [row.children.length, filled, row.clientWidth];
    })""")
    assert rows
    for members, filled, whole in rows:
        assert members == 9 and filled > 0.97 * whole
    tab.close()


def test_thumbnails_on_the_map_do_not_overlap_(browser, report_page):
    tab = browser.page()
    tab.open(report_page)
    tab.evaluate("""(() => {
        const pen = CanvasRenderingContext2D.prototype;
        const { clearRect, drawImage } = pen;
        pen.clearRect = function (...box) {
            window.drawn = [];
            clearRect.call(this, ...box);
        };
        pen.drawImage = function (picture, ...box) {
            drawn.push(box);
            drawImage.call(this, picture, ...box);
        };
        document.querySelector('.zoom [aria-label="show all"]').click();
    })()""")
    tab.wait("window.drawn?.length > 3")
    boxes = tab.evaluate("drawn")
    assert len(boxes) < tab.evaluate("images.keys.length"), "some are left to be dots"
    for number, (left, top, width, height) in enumerate(boxes):
        for x, y, across, down in boxes[:number]:
            assert left >= x + across or x >= left + width or top >= y + down or y >= top + height
    assert not tab.complaints
    tab.close()


def test_random_weights_are_announced_above_everything_else(shown):
    assert "random weights" in text(shown, "#notes .note")
    top = "document.querySelector('{}').getBoundingClientRect().top"
    assert shown.evaluate(f"{top.format('#notes')} < {top.format('#summary')}")


def test_a_picture_that_is_not_shown_says_why_in_its_place(browser, report_output, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ("-o", tmp_path / "page.html", "--pictures", tmp_path / "empty")
    assert internvit("report", report_output, *arguments).returncode == 0
    tab = browser.page(390, 844)
    tab.open(tmp_path / "page.html")
    assert text(tab, "#neighbors .thumb") == "No such file or directory"
    assert "photograph not shown: " in text(tab, "#token-maps figcaption")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390 and not tab.complaints
    tab.close()


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_the_contrast_that_people_need(browser, report_page, dark):
    """At least 4.5 to 1, as WCAG asks for text of this size."""
    tab = browser.page(dark=dark)
    tab.open(report_page)
    lowest = tab.evaluate("""(() => {
        const light = (color) => {
            const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
                .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        const behind = (one) => {
            for (; one; one = one.parentElement) {
                const color = getComputedStyle(one).backgroundColor;
                if (!color.startsWith('rgba(0, 0, 0, 0)')) return color;
            }
            return 'rgb(255, 255, 255)';
        };
        const found = [...document.querySelectorAll('body *:not(script):not(option)')]
            .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
            .map((one) => {
                const pair = [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => b - a);
                return [(pair[0] + 0.05) / (pair[1] + 0.05), one.outerHTML.slice(0, 80)];
            });
        return found.sort((a, b) => a[0] - b[0])[0];
    })()""")
    assert lowest[0] >= 4.5, lowest
    tab.close()


def test_every_section_is_named_and_linked(shown):
    titles = shown.evaluate("[...document.querySelectorAll('nav a')].map((link) => link.textContent)")
    wanted = "Summary, Map, Token maps, Nearest neighbors, Near duplicates, Tiles per image, Skipped images"
    assert titles == [*wanted.split(", "), "Throughput", "Recipe"]
    assert shown.evaluate("[...document.querySelectorAll('nav a')].every((link) => document.querySelector(link.hash))")
    assert shown.evaluate("document.documentElement.lang") == "en"
    unnamed = "[...document.querySelectorAll('img')].filter((one) => !one.alt).length"
    assert shown.evaluate(unnamed) == 0
    svg = shown.evaluate("document.querySelector('#tiles svg').getAttribute('aria-label')")
    assert svg.startswith(f"{shown.evaluate('images.keys.length')} images by tiles: ")


# ------------------------------------------------------------------------------------------------ what can be done


def test_a_search_lists_what_it_found_and_a_click_shows_it(shown):
    before = painted(shown)
    look_up(shown, "HALF")
    assert text(shown, "#found") == "1 image"
    assert text(shown, ".hits button") == "half.jpg"
    settle(shown)
    assert painted(shown) != before, "it is marked on the map"
    shown.evaluate("document.querySelector('.hits button').click()")
    assert "half.jpg" in text(shown, "#detail") and "384 x 256 px" in text(shown, "#detail")
    assert shown.evaluate("document.querySelector('#detail img').naturalWidth") == 112
    look_up(shown, "no such key")
    assert text(shown, "#found") == "0 images" and not shown.evaluate("document.querySelectorAll('.hits li').length")


def test_a_skipped_image_is_found_and_answers_with_its_reason(shown):
    look_up(shown, "bad.jpg")
    assert "bad.jpg was skipped (not an image: " in text(shown, ".hits")
    assert text(shown, "#found") == "0 images, and 1 skipped"


def test_hovering_over_an_image_shows_its_thumbnail_and_key(shown):
    assert shown.evaluate("document.getElementById('tip').hidden")
    point_at(shown, "large.png")
    assert shown.evaluate(POINTED)[:2] == ["large.png", "768 x 512 px, " + shown.evaluate(POINTED)[1].split(", ")[1]]
    shown.wait("document.querySelector('#tip img').naturalWidth === 112")
    box = shown.evaluate("document.getElementById('tip').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0 and box["right"] <= 1280 and box["top"] >= 0 and box["bottom"] <= 900
    shown.pointer("Moved", 5, 5)
    shown.wait("document.getElementById('tip').hidden")


def test_a_click_keeps_an_image_and_dragging_and_zooming_move_the_map(shown):
    point_at(shown, "half.jpg")
    x, y = shown.evaluate(CENTRE)
    shown.evaluate("document.getElementById('detail').replaceChildren()")
    shown.click(x + 1, y + 1)
    assert "half.jpg" in text(shown, "#detail") or "same bytes.jpg" in text(shown, "#detail")
    shown.pointer("Pressed", x, y, button="left", buttons=1, clickCount=1)
    for step in (20, 60, 120):
        shown.pointer("Moved", x + step, y, button="left", buttons=1)
    shown.pointer("Released", x + 120, y, button="left", clickCount=1)
    settle(shown)
    shown.pointer("Moved", x + 121, y)
    shown.wait("!document.getElementById('tip').hidden")  # it went along with the map
    before = painted(shown)
    shown.evaluate("document.querySelector('canvas').focus()")
    shown.pointer("Wheel", x, y, deltaX=0, deltaY=-300)
    settle(shown)
    zoomed = painted(shown)
    assert zoomed != before
    shown.call("Input.dispatchKeyEvent", type="keyDown", key="0", text="0")
    settle(shown)
    assert painted(shown) != zoomed


def test_the_wheel_scrolls_the_page_until_the_map_is_clicked(shown):
    shown.evaluate("document.querySelector('canvas').scrollIntoView({ block: 'start', behavior: 'instant' })")
    settle(shown)
    x, y = shown.evaluate(CENTRE)
    before = shown.evaluate("scrollY")
    shown.pointer("Wheel", x, y, deltaX=0, deltaY=200)
    shown.wait(f"scrollY > {before}")


def test_colors_follow_the_choice_and_the_legend_says_what_they_mean(shown):
    assert "part-0 (4)" in text(shown, "#map .legend")
    choose = "const select = document.getElementById('color'); select.value = 'tiles'; select.onchange;"
    shown.evaluate(f"(() => {{ {choose} select.dispatchEvent(new Event('change')); }})()")
    assert "1 tile (" in text(shown, "#map .legend")


def test_maps_fade_over_their_photographs(shown):
    shown.evaluate("(() => { const one = document.getElementById('opacity'); one.value = 20; })()")
    shown.evaluate("document.getElementById('opacity').dispatchEvent(new Event('input'))")
    assert set(shown.evaluate("[...document.querySelectorAll('.tokens')].map((one) => one.style.opacity)")) == {"0.2"}
    assert shown.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")


def test_a_neighbor_leads_to_its_place_on_the_map(shown):
    shown.evaluate("document.querySelector('#neighbors .row figure:not(.first) button').click()")
    hit = shown.evaluate("images.keys[data.neighbors.rows[0].hits[0][0]]")
    assert hit in text(shown, "#detail")


def test_skipped_images_are_listed_by_reason(shown):
    assert shown.evaluate("document.querySelectorAll('#skipped tbody tr').length") == 2
    shown.evaluate("document.querySelector('#skipped [data-reason=truncated]').click()")
    assert text(shown, "#skipped tbody").startswith("cut.png")


def test_names_that_would_be_markup_are_shown_as_text(shown):
    assert shown.evaluate("document.scripts.length") == 2
    look_up(shown, "script>")
    assert text(shown, "#found") == "3 images"
    look_up(shown, "onerror")
    assert text(shown, ".hits button") == "<img src=x onerror=alert(1)>.png"
    shown.evaluate("document.querySelector('.hits button').click()")
    assert "<img src=x onerror=alert(1)>.png" in text(shown, "#detail")


# ------------------------------------------------------------------------------------------------ kinds of outputs


@pytest.mark.parametrize("done", [0, 1, 2])
def test_pages_of_next_to_nothing_are_drawn_without_complaint(browser, tmp_path, done):
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 3, helpers.AWKWARD_KEYS[1:4]), Tokens.NONE)
    bad = Skipped(Status.TRUNCATED, "OSError", "cut short")
    helpers.make_output(tmp_path / "feats.h5", shard, skips=dict.fromkeys(range(done, 3), bad))
    assert internvit("report", tmp_path / "feats.h5", "-o", tmp_path / "page.html").returncode == 0
    tab = browser.page(390, 844)
    tab.open(tmp_path / "page.html")
    look_up(tab, "e")
    assert text(tab, "#found").endswith(f"and {3 - done} skipped")
    assert not tab.complaints and tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.close()


@pytest.mark.sweep
def test_a_page_of_20000_images_opens_and_answers(browser, tmp_path):
    table = helpers.make_table(
        [(1, 1, 0), (2, 1, 1)] * 10_000, [b"folder-%d/%05d.jpg" % (n % 9, n) for n in range(20_000)]
    )
    helpers.make_output(tmp_path / "feats.h5", helpers.make_shard(table, Tokens.NONE))
    result = internvit("report", tmp_path / "feats.h5", "-o", tmp_path / "page.html", "-q")
    assert result.returncode == 0 and "2,000 images without a thumbnail" in result.stderr
    tab = browser.page()
    tab.open(tmp_path / "page.html")
    assert tab.evaluate("images.keys.length") == 20_000 and painted(tab) > 1000
    look_up(tab, "1234")
    assert text(tab, "#found") == "12 images"
    point_at(tab, "folder-1/12340.jpg")
    assert tab.evaluate("document.querySelectorAll('.hits button').length") == 12
    assert not tab.complaints
    tab.close()
