"""What all pages share, in a real headless browser: numbers as they were packed, numbers as they are written, the tip, a heat map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recollect import pages

pytestmark = pytest.mark.browser


@pytest.fixture
def visit(open_page, tmp_path: Path) -> Callable:
    """Open a page of nothing but data and a script."""

    def opened(data: object = None, script: str = ""):
        file = tmp_path / "page.html"
        page = pages.page(title="t", eyebrow="e", headline="h", main=["<div id='here'></div>"], data=data, scripts=[script])
        file.write_text(page, encoding="utf-8")
        return open_page(file)

    return opened


def test_numbers_arrive_as_numpy_has_packed_them(visit) -> None:
    """Prevents a sign, an exponent or a subnormal number that is read otherwise than it was written."""
    given = np.concatenate([np.linspace(-3, 3, 41), 10.0 ** -np.arange(0, 9), [np.nan, -0.0, 3.0]]).reshape(1, -1)
    packed = pages.packed(given, 0.25)
    found = np.array(visit(packed).evaluate("Array.from(numbers(DATA), value => Number.isNaN(value) ? null : value)"), float)
    half = ((given - 0.25) / packed["scale"]).astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(found, (0.25 + packed["scale"] * half)[0], rtol=1e-12)


def test_a_head_beyond_the_last_shows_the_last(visit) -> None:
    """Prevents a blank picture where one layer has fewer heads, and heads or rows in another order."""
    triangles = np.array([[1.0, 2, 3], [4, 5, 6]])
    page = visit(pages.packed(triangles))
    square = "head => Array.from(square(DATA, 2, head), value => Number.isNaN(value) ? null : Math.round(value))"
    assert page.evaluate(square, 0) == [1, None, 2, 3]
    assert page.evaluate(square, 1) == page.evaluate(square, 7) == [4, None, 5, 6]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (-0.12345, "\u22120.123"),
        (1, "1"),
        (0.9996, "1"),
        (12.345, "12.3"),
        (1234.5, "1235"),
        (0.00012345, "1.2e\u22124"),
        (None, "no number"),
    ],
)
def test_numbers_are_written_with_about_three_digits(visit, value: float | None, expected: str) -> None:
    """Prevents small weights that become 0, long fractions, and a hyphen for a minus."""
    assert visit().evaluate("value => numberText(value)", value) == expected


@pytest.mark.parametrize(("x", "y"), [(2, 2), (1198, 798), (1198, 2), (600, 5000), (600, -5000)])
def test_the_tip_stays_inside_the_window(visit, x: int, y: int) -> None:
    """Prevents numbers that are told outside of what is seen, of a picture that is scrolled half away too."""
    page = visit()
    page.evaluate("([x, y]) => showTip('first line\\nsecond line', x, y)", [x, y])
    box = page.locator("#tip").bounding_box()
    assert min(box["x"], box["y"]) >= 0
    assert box["x"] + box["width"] <= 1200
    assert box["y"] + box["height"] <= 800
    inside = box["x"] <= x <= box["x"] + box["width"] and box["y"] <= y <= box["y"] + box["height"]
    assert not inside, "the tip covers what is pointed at"


HEAT = """
const said = { moved: [], picked: [] };
const field = heatMap({
  rows: 2, cols: 3, values: [0, 1, null, -1, 0.5, NaN], kind: "diverging", share: (value, row) => value / (row + 1), label: "a map",
  describe: (row, col) => `${row}/${col}`, moved: (row) => said.moved.push(row), picked: (row) => said.picked.push(row),
});
field.style.width = "300px";
field.style.height = "200px";
get("here").append(node("div", { class: "heat", style: "display:block" }, field));
"""


def test_a_heat_map_tells_moved_from_picked(visit) -> None:
    """Prevents a page that follows every move of the pointer where a click is meant, or the other way round."""
    page = visit(script=HEAT)
    canvas, tip = page.locator("canvas"), page.locator("#tip")
    canvas.hover(position={"x": 250, "y": 50})
    assert tip.inner_text() == "0/2"
    assert page.evaluate("said") == {"moved": [0], "picked": []}
    canvas.click(position={"x": 150, "y": 150})
    assert page.evaluate("said")["picked"] == [1]
    canvas.focus()
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    assert tip.inner_text() == "0/0"
    assert page.evaluate("said.picked") == [1, 0]
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_a_heat_map_leaves_blank_what_is_no_number(visit) -> None:
    """Prevents keys after the query that look like weights of zero; and a share that ignores its row."""
    page = visit(script=HEAT)
    drawn = page.locator("canvas").evaluate("c => [...c.getContext('2d').getImageData(0, 0, 3, 2).data]")
    assert drawn[3::4] == [255, 255, 0, 255, 255, 0]
    red = drawn[0::4]
    zero, full = page.evaluate("[ramp('diverging')(0)[0], ramp('diverging')(1)[0]]")
    assert red[0] == round(zero)
    assert red[1] == round(full)
    assert red[3] == pytest.approx(page.evaluate("ramp('diverging')(-0.5)[0]"), abs=0.51)


def test_a_policy_without_scripts_stops_them(browser, tmp_path: Path) -> None:
    """Prevents a page of results in which a text that slipped through would run; the browser itself is asked."""
    file = tmp_path / "page.html"
    main = ["<script>document.title = 'ran'</script><img src='x' onerror=\"document.title = 'ran'\" alt=''>"]
    file.write_text(pages.page(title="still", eyebrow="e", headline="h", main=main), encoding="utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    assert page.title() == "still"
    page.close()
