"""The frame of every page and its pieces: no text becomes markup, no page may load or run what it should not, numbers survive."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest

from recollect import pages
from tests.pages.tags import Tags

HOSTILE = """</script></style><script>alert(1)</script><!-- &amp; "a" 'b' onload='x' <b>"""


def whole(**options: Any) -> str:
    """A small page."""
    given: dict[str, Any] = {"title": "t", "eyebrow": "e", "headline": "h", "main": []}
    return pages.page(**{**given, **options})


def policy_of(page: str) -> str:
    (found,) = [each["content"] for each in Tags(page).of("meta") if "http-equiv" in each]
    return str(found)


def test_a_page_without_scripts_may_run_none() -> None:
    """Prevents a page of results in which a text that slips through could run."""
    page = whole()
    assert "script-src" not in policy_of(page)
    assert "default-src 'none'" in policy_of(page)
    assert "<script" not in page
    assert 'id="tip"' not in page


def test_a_page_with_scripts_runs_the_shared_ones_first() -> None:
    """Prevents scripts that need what has not been defined, and a policy that stops them."""
    page = whole(scripts=["MINE();"], data={"x": 1})
    assert "script-src 'unsafe-inline'" in policy_of(page)
    assert "default-src 'none'" in policy_of(page)
    assert page.index("const DATA") < page.index("function heatMap") < page.index("MINE();")
    assert [each.get("type") for each in Tags(page).of("script")] == ["application/json", None]


def test_every_text_of_a_page_stays_text() -> None:
    """Prevents a model's name, a command or an answer from becoming elements or ending what they stand in."""
    page = whole(
        title=HOSTILE,
        eyebrow=HOSTILE,
        headline=HOSTILE,
        header=pages.command(HOSTILE),
        main=[
            pages.section(
                "one",
                HOSTILE,
                pages.table(HOSTILE, [HOSTILE], [pages.row(HOSTILE, [HOSTILE, pages.Cell(HOSTILE, "open")], kind="best")]),
                pages.note(HOSTILE),
                pages.notes([HOSTILE]),
                pages.folded(HOSTILE, {HOSTILE: HOSTILE}),
            )
        ],
        data={HOSTILE: [HOSTILE]},
        scripts=["MINE();"],
    )
    tags = Tags(page)
    assert len(tags.of("script")) == 2
    assert len(tags.of("style")) == 1
    assert tags.of("b") == []
    assert not any("onload" in attributes for _, attributes in tags.seen)
    assert tags.of("div")[1]["aria-label"] == HOSTILE
    said = [text for text in tags.texts if text == HOSTILE]
    # Title, eyebrow, headline; the section's heading; caption, head, name, two cells; note, notes; summary.
    assert len(said) == 12
    assert {"class": "best"} in tags.of("tr")
    assert {"class": "open"} in tags.of("td")


def test_data_reach_the_script_as_they_were() -> None:
    """Prevents data that end their element, or that are changed on the way."""
    data = {"a": HOSTILE, "b": ["<", ">", "&", "é", None, 0.5], "c": {}}
    text = pages.script_json(data)
    assert not set(text) & set("<>&")
    assert json.loads(text) == data


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, {"x": -math.inf}]])
def test_data_that_json_lacks_are_refused(value: object) -> None:
    """Prevents a page that no browser can read because of one number."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        pages.script_json(value)


def test_a_section_is_named_by_its_heading() -> None:
    """Prevents landmarks without a name, ids that scripts do not find, and sections that show nothing for ever or at once."""
    tags = Tags(pages.section("maps", "Maps", "<p>x</p>", lead="a <i>b</i>", hidden=True))
    ((_, section), (_, heading), (_, lead), *_) = tags.seen
    assert section == {"id": "maps", "aria-labelledby": "h-maps", "hidden": None}
    assert heading == {"id": "h-maps"}
    assert lead == {"class": "lead"}
    assert len(tags.of("i")) == 1
    assert Tags(pages.section("maps", "Maps")).seen == [
        ("section", {"id": "maps", "aria-labelledby": "h-maps"}),
        ("h2", {"id": "h-maps"}),
    ]


def test_a_caption_can_be_for_screen_readers_alone() -> None:
    """Prevents a table that says its section's heading twice, and one without a name."""
    shown, silent = (pages.table("Results", ["x"], [], show_caption=show) for show in (True, False))
    assert "<p>Results</p>" in shown
    assert "<p>" not in silent
    assert silent.count("aria-label='Results'") == shown.count("aria-label='Results'") == 1


def test_a_command_breaks_between_words() -> None:
    """Prevents options that are torn apart where the line ends, and an empty box where there is no command."""
    assert pages.command("a  --b=1\n<c>") == "<code><span>a</span> <span>--b=1</span> <span>&lt;c&gt;</span></code>"
    assert pages.command(" ") == ""


def test_a_per_cent_sign_stays_with_its_number() -> None:
    """Prevents a headline whose second line begins with a sign."""
    assert "<h1>12&nbsp;% &amp; 13&nbsp;%</h1>" in whole(headline="12 % & 13 %")


def test_a_page_loads_nothing() -> None:
    """Prevents a font, picture or script from the network in what all pages share."""
    page = whole(scripts=["MINE();"], data=None)
    for tag, attributes in Tags(page).seen:
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,", tag
    assert not any(word in page.replace("http-equiv", "") for word in ("@import", "fetch(", "XMLHttp", "http"))


def test_packing_keeps_three_digits() -> None:
    """Prevents numbers that vanish because they are small, or all become 1 because they are near it; and infinite ones."""

    def unpacked(item: dict[str, Any]) -> np.ndarray:
        return item["offset"] + item["scale"] * np.frombuffer(base64.b64decode(item["data"]), "<f2").astype(np.float64)

    tiny = np.array([1e-12, 3.14159e-12, -2e-12, np.nan, np.inf])
    values = unpacked(pages.packed(tiny))
    np.testing.assert_allclose(values[:3], tiny[:3], rtol=1e-3)
    assert np.isnan(values[3:]).all()
    large = np.array([[3e7, -1e5], [0.0, 1e7]], np.float32)
    np.testing.assert_allclose(unpacked(pages.packed(large)), large.ravel(), rtol=1e-3)
    near = np.array([0.99961, 0.99987])
    np.testing.assert_allclose(1 - unpacked(pages.packed(near, 1.0)), 1 - near, rtol=1e-3)
    assert unpacked(pages.packed(np.zeros(2))).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("data", "kind"), [(b"\x89PNG\r\n", "image/png"), (b"<svg></svg>", "image/svg+xml")])
def test_a_picture_says_its_kind_and_what_it_shows(data: bytes, kind: str) -> None:
    """Prevents a picture that browsers refuse, and a text that leaves its attribute."""
    (found,) = Tags(pages.picture(data, HOSTILE)).of("img")
    head, _, body = found["src"].partition(";base64,")
    assert head == f"data:{kind}"
    assert base64.b64decode(body) == data
    assert found["alt"] == HOSTILE
    assert set(found) == {"src", "alt"}
