"""The page of 4,096 tokens in a real headless browser: ready in seconds, it answers selectors, mouse and keys, and loads nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recollect.data.tokenizer import ByteTokenizer
from recollect.evaluation.loading import OwnCoder
from recollect.inspection import html, inspect_text
from tests.inspection.small import TEXT, model_of

pytestmark = pytest.mark.browser

LENGTH = 4096
PICTURE = "canvas => canvas.toDataURL()"
COLOURS = "() => [...document.querySelectorAll('#strip .t')].slice(0, 200).map(token => token.style.backgroundColor).join()"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with attention, kernels, a deep memory, a linear one and one without heads, on a text of many kinds of characters."""
    model = model_of("mta", "titans", "gated_delta_net", "mamba", "attention", context=LENGTH)
    out = tmp_path_factory.mktemp("inspect") / "page.html"
    found = inspect_text(model, OwnCoder(ByteTokenizer()), TEXT, n_tokens=LENGTH)
    assert len(found.tokens) == LENGTH
    out.write_text(html(found, model="a model", text="a text", command="recollect inspect"), encoding="utf-8")
    return out


@pytest.fixture
def visit(open_page, page_file: Path) -> Callable:
    """Open the page and wait until it is ready, see `open_page`."""

    def opened(**options: Any):
        page = open_page(page_file, **options)
        page.wait_for_selector("body[data-ready]")
        return page

    return opened


def choose(page, name: str, label: str) -> None:
    page.get_by_role("combobox", name=name, exact=True).select_option(label=label)


def test_page_of_4096_tokens_is_small_and_soon_ready(visit, page_file: Path) -> None:
    """Prevents a page that freezes: 4,096^2 cells per head would be 64 MiB each. Generous limits, for machines that are busy."""
    assert page_file.stat().st_size < 24 * 2**20
    began = time.monotonic()
    page = visit()
    assert time.monotonic() - began < 20
    assert page.locator("#strip .t").count() == LENGTH
    assert page.locator("h1").inner_text().startswith("a model reads 4,096 tokens of a text")
    coloured = page.evaluate("() => [...document.querySelectorAll('#strip .t')].filter(t => t.style.backgroundColor).length")
    assert 0 < coloured < LENGTH, "only what is in sight is coloured"
    page.evaluate("() => { const strip = document.getElementById('strip'); strip.scrollTop = strip.scrollHeight; }")
    page.wait_for_function("() => [...document.querySelectorAll('#strip .t')].slice(-150).some(t => t.style.backgroundColor)")


def test_text_on_the_page_is_the_text(visit) -> None:
    """Prevents lost characters, and tags of the text that become elements."""
    page = visit()
    shown = "".join(page.locator("#strip .t").all_text_contents()[1:])
    assert shown.replace("·", "").replace("↵", "")[:300] == TEXT[:300]
    assert page.locator("#strip script").count() == 0


def test_layer_head_quantity_change_text_and_pictures(visit) -> None:
    """Prevents selectors that are not connected to what they name."""
    page = visit()
    assert page.locator("#maps canvas").count() == 6
    first, colours = page.locator("#maps canvas").first.evaluate(PICTURE), page.evaluate(COLOURS)
    choose(page, "head", "1")
    assert page.locator("#maps canvas").first.evaluate(PICTURE) != first
    assert page.evaluate(COLOURS) != colours
    kernel = page.locator("#kernels canvas")
    assert kernel.count() == 2 * 2 + 2
    assert page.locator("#kernels .pattern").first.is_visible()
    choose(page, "layer", "layer 1: titans")
    assert page.locator("#maps").is_hidden()
    assert page.locator("#kernels").is_hidden()
    seen = set()
    for title in (
        "Surprise",
        "Write strength (eta)",
        "Retention (alpha)",
        "Read norm",
        "Memory norm",
        "Where a token reads from",
    ):
        choose(page, "quantity", title)
        seen.add(page.evaluate(COLOURS) + page.locator("#what").inner_text())
    assert len(seen) == 6
    choose(page, "layer", "layer 3: mamba")
    assert "cannot be surprised" in page.locator("#missing").inner_text()
    choose(page, "layer", "whole model")
    assert page.get_by_role("combobox", name="quantity").locator("option").all_inner_texts() == ["Bits"]


def test_hover_and_keys_tell_numbers(visit) -> None:
    """Prevents numbers that only a mouse can reach."""
    page = visit()
    choose(page, "layer", "layer 2: gated_delta_net")
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator("#strip .t").nth(20).hover()
    said = tip.inner_text()
    assert said.startswith("token 20 “")
    for title in ("Surprise", "Write strength (eta)", "Retention (alpha)", "Read norm", "Memory norm"):
        assert re.search(rf"^{re.escape(title)}: [\d.\u2212e ]+", said, re.M), (title, said)
    page.mouse.move(2, 2)
    assert tip.is_hidden()
    page.locator("#strip").focus()
    page.keyboard.press("Home")
    assert tip.inner_text().startswith("token 0 start of the document")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("PageDown")
    assert tip.inner_text().startswith("token 257 ")
    page.keyboard.press("End")
    assert tip.inner_text().startswith("token 4,095 ")
    page.keyboard.press("Enter")
    assert "read of token 4,095: " in tip.inner_text()
    assert page.get_by_label("read of (one of 12)").input_value() == "11"
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    chart = page.locator("#chart")
    chart.focus()
    page.keyboard.press("Home")
    assert tip.inner_text().startswith("token 0 ")
    box = chart.bounding_box()
    chart.hover(position={"x": 52 + (box["width"] - 60) / 2, "y": 40})  # between the margins of the axes
    assert re.match(r"token 2,0[45]\d ", tip.inner_text())


def test_maps_tell_cells_and_lead_to_the_text(visit) -> None:
    """Prevents cells of a pooled map from being told as single tokens, and reads of another row than the one chosen."""
    page = visit()
    canvas = page.locator("#maps canvas").last
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    canvas.hover(position={"x": 1, "y": box["height"] / 2})
    said = page.locator("#tip").inner_text()
    assert re.match(r"query: tokens 2,0\d\d to 2,\d\d\d\nkey: tokens 0 to 15\nstrongest ", said), said
    canvas.hover(position={"x": box["width"] - 2, "y": 10})
    assert page.locator("#tip").inner_text().endswith("later than the query")
    canvas.click(position={"x": 1, "y": box["height"] / 2})
    assert page.get_by_role("combobox", name="quantity").input_value() == "reads"
    slider = page.get_by_label("read of")
    reader = int(slider.input_value())
    assert 2000 < reader < 2100
    assert page.locator("#strip .reader").count() <= 1
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert int(page.get_by_label("read of").input_value()) == reader - 1
    canvas = page.locator("#maps canvas").first
    before = canvas.evaluate(PICTURE)
    choose(page, "colours", "one scale per row")
    assert page.locator("#maps canvas").first.evaluate(PICTURE) != before
    page.locator("#kernels canvas").first.focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("#tip").inner_text().endswith("1 query back, key \u22125")


def test_selectors_answer_quickly(visit) -> None:
    """Prevents work that grows with the square of the text from reaching the page. Generous, for machines that are busy."""
    page = visit()
    began = time.monotonic()
    for label in ("layer 4: attention", "layer 1: titans", "layer 0: mta"):
        choose(page, "layer", label)
        page.evaluate("() => new Promise(requestAnimationFrame)")
    assert time.monotonic() - began < 15


def test_dark_theme_changes_page_text_and_canvases(visit) -> None:
    """Prevents canvases that keep the colours of the other theme."""
    page = visit()
    background = "getComputedStyle(document.body).backgroundColor"
    light, chart = page.evaluate(background), page.locator("#chart").evaluate(PICTURE)
    drawn = page.locator("#maps canvas").first.evaluate(PICTURE)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != light
    page.wait_for_function("old => document.querySelector('#maps canvas').toDataURL() !== old", arg=drawn)
    page.wait_for_function("old => document.querySelector('#chart').toDataURL() !== old", arg=chart)
    assert visit(scheme="dark").evaluate(background) == page.evaluate(background)


@pytest.mark.parametrize("width", [320, 768])
def test_page_fits_a_phone(visit, width: int) -> None:
    """Prevents a page that scrolls sideways, in any layer."""
    page = visit(width=width)
    for label in ("layer 0: mta", "layer 1: titans", "layer 3: mamba"):
        choose(page, "layer", label)
        choose(page, "quantity", "Where a token reads from")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#strip").focus()
    page.keyboard.press("End")
    tip = page.locator("#tip").bounding_box()
    assert tip["x"] >= 0
    assert tip["x"] + tip["width"] <= width


def test_controls_have_names(visit) -> None:
    """Everything that takes focus says what it is."""
    page = visit()
    choose(page, "quantity", "Where a token reads from")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, canvas, [tabindex]")]
          .filter(element => !(element.getAttribute("aria-label") || element.labels?.length || element.textContent.trim()))
          .map(element => element.outerHTML)"""
    )
    assert unnamed == []
