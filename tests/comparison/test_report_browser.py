"""The page in a real headless browser: it draws, answers mouse and keys, follows the theme, fits a phone and loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.comparison.report import write
from tests.comparison.report_folder import make_folder

pytestmark = pytest.mark.browser

# Painted pixels of a canvas, and how many colours they have.
PAINTED = """canvas => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3]) colours.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
  return colours.size;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = make_folder(tmp_path_factory.mktemp("report") / "out")
    write(out)
    return out


@pytest.fixture
def visit(open_page) -> Callable:
    """Open a folder's page, see `open_page`."""
    return lambda out, **options: open_page(out / "report.html", **options)


def test_page_paints_every_heat_map(visit, folder: Path) -> None:
    """A heat map that stays blank looks like a model that attends to nothing."""
    page = visit(folder)
    colours = [canvas.evaluate(PAINTED) for canvas in page.query_selector_all("canvas")]
    assert len(colours) == 3 * 2 + 3 + 2  # kernels of three layers and two heads, head mixing, two maps
    assert min(colours) >= 3
    assert min(colours[-2:]) > 20


def test_page_draws_a_line_per_seed_and_a_mean(visit, folder: Path) -> None:
    """Every seed is drawn, not the mean alone."""
    page = visit(folder)
    assert page.locator(".plot path.seed").count() == 12
    assert page.locator(".plot path.mean").count() == 4
    page.get_by_role("button", name="diff").click()
    assert page.locator(".plot path.seed").count() == 9
    assert page.get_by_role("button", name="diff").get_attribute("aria-pressed") == "false"


def test_curves_answer_pointer_and_keys(visit, folder: Path) -> None:
    """Values can be read without a mouse."""
    page = visit(folder)
    plot, tip = page.locator(".plot"), page.locator("#tip")
    assert tip.is_hidden()
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] * 0.6, "y": box["height"] * 0.5})
    assert "mta" in tip.inner_text()
    assert "%" in tip.inner_text()
    page.mouse.move(1, 1)
    assert tip.is_hidden()
    plot.focus()
    page.keyboard.press("End")
    assert tip.inner_text().startswith("step 1,500")
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text().startswith("step 1,425")
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_curves_change_their_axes(visit, folder: Path) -> None:
    """Equal steps and equal time rank mixers differently: both must be on offer."""
    page = visit(folder)
    page.get_by_role("combobox", name="across").select_option(label="training time, seconds")
    page.get_by_role("combobox", name="up").select_option(label="loss (nats per token)")
    page.locator(".plot").focus()
    page.keyboard.press("Home")
    assert page.locator("#tip").inner_text().startswith("seconds 3")
    assert page.locator(".plot path.mean").first.get_attribute("d").count("L") == 19


def test_kernel_shows_its_value_and_place(visit, folder: Path) -> None:
    """The middle of the last row of a kernel is this query and the same key."""
    page = visit(folder)
    canvas = page.get_by_role("img", name="layer 0, head 0").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.75)
    value, place = page.locator("#tip").inner_text().split("\n")
    assert place == "this query, same key"
    assert 0.2 < float(value) < 2
    canvas.focus()
    page.keyboard.press("ArrowUp")
    assert "1 query back" in page.locator("#tip").inner_text()


def test_maps_follow_selectors_and_slider(visit, folder: Path) -> None:
    """Layer, head, mixer and query are real form controls, and choosing repaints."""
    page = visit(folder)
    maps = page.locator("#maps")
    before = maps.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")
    maps.get_by_role("combobox", name="layer").select_option("2")
    maps.get_by_role("combobox", name="head").select_option("1")
    assert maps.locator("canvas").first.evaluate("canvas => canvas.toDataURL()") != before
    slider = maps.get_by_label("query position")
    assert maps.locator(".tokens").first.locator(".query").inner_text() == "d"  # of "#td": predicts the answer's first letter
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert maps.locator(".tokens").first.locator(".query").inner_text() == "t"
    canvas = maps.locator("canvas").last
    canvas.hover(position={"x": 5, "y": canvas.bounding_box()["height"] - 5})
    assert page.locator("#tip").inner_text().startswith("query 54")
    assert maps.locator(".tokens").first.locator(".query").inner_text() == "w"
    maps.get_by_role("combobox", name="mixer").select_option("attention")
    assert maps.locator("canvas").count() == 1


def test_dark_theme_changes_page_and_heat_maps(visit, folder: Path) -> None:
    """Colours drawn on a canvas do not follow a style sheet by themselves."""
    page = visit(folder)
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    painted = page.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != light
    page.wait_for_function("old => document.querySelector('canvas').toDataURL() !== old", arg=painted)
    assert visit(folder, scheme="dark").evaluate(background) == page.evaluate(background)


@pytest.mark.parametrize("width", [320, 414, 768])
def test_page_fits_a_phone(visit, folder: Path, width: int) -> None:
    """Wide tables scroll inside their box; the page itself never sideways."""
    page = visit(folder, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".plot").focus()
    page.keyboard.press("End")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tip = page.locator("#tip").bounding_box()
    assert tip["x"] >= 0
    assert tip["x"] + tip["width"] <= width


def test_controls_have_names(visit, folder: Path) -> None:
    """Everything that takes focus says what it is."""
    page = visit(folder)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, canvas, svg[tabindex], [tabindex]")]
          .filter(element => !(element.getAttribute("aria-label") || element.labels?.length || element.textContent.trim()))
          .map(element => element.outerHTML)"""
    )
    assert unnamed == []


def test_text_comparison_draws(visit, tmp_path: Path) -> None:
    """Bits per byte have a linear axis and no chance line."""
    out = make_folder(tmp_path / "out", metric="bits_per_byte", task="text", n_seeds=1)
    write(out)
    page = visit(out, width=320)
    assert page.locator(".plot path.mean").count() == 4
    assert page.locator(".plot .chance").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_page_of_partial_results_has_no_errors(visit, tmp_path: Path) -> None:
    """Missing inspections hide their sections; runs without evaluations leave the curves standing."""
    stop = {("mta", 0): 75, ("mta", 1): 0, ("mta", 2): 0, ("diff", 0): 0}
    out = make_folder(tmp_path / "partial", stop=stop, inspected=False)
    write(out)
    page = visit(out)
    assert page.locator("#kernels").is_hidden()
    assert page.locator("#maps").is_hidden()
    assert "NaN" not in page.locator(".plot").inner_html()
    (out / "results.jsonl").write_text("")
    write(out)
    assert visit(out).get_by_text("No evaluation has been stored yet.").is_visible()
