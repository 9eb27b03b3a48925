"""The report from made-up folders: what it says, what it leaves out of means but never out of sight, and what it escapes."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save_file

from recollect.comparison.report import curves, markdown, units, write
from recollect.comparison.report.records import read
from recollect.comparison.report.summary import headline, mean_curve, rows
from tests.comparison.report_folder import HOSTILE, make_folder
from tests.pages.tags import Tags

FILES = ("table.txt", "curves.png", "curves.svg", "report.html")


def shown(out: Path, width: int, *, encoding: str = "utf-8") -> str:
    """What a terminal of that width and encoding shows."""
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(write(out))
    buffer.seek(0)
    return buffer.read()


def page_data(out: Path) -> dict:
    """The JSON on the page."""
    page = (out / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert found
    return json.loads(found.group(1))


def edit(out: Path, change) -> None:
    """Rewrite results.jsonl line by line."""
    path = out / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def test_report_writes_every_file_and_nothing_else(tmp_path: Path) -> None:
    """No temporary file may stay behind, and each file must be whole."""
    out = make_folder(tmp_path / "out")
    before = {path.name for path in out.iterdir()}
    write(out)
    assert {path.name for path in out.iterdir()} - before == set(FILES)
    with Image.open(out / "curves.png") as image:
        assert image.size == (1280, 720)
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert "<svg" in (out / "curves.svg").read_text()


def test_report_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    """A report under version control must not change by being made again."""
    out = make_folder(tmp_path / "out")
    write(out)
    first = [(out / name).read_bytes() for name in FILES]
    write(out)
    assert [(out / name).read_bytes() for name in FILES] == first


def test_row_numbers_match_the_results(tmp_path: Path) -> None:
    """Means are of the last evaluations, computed here from the file by hand."""
    out = make_folder(tmp_path / "out")
    final = [row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines()) if row["final"]]
    for row in rows(read(out)):
        mine = [line for line in final if line["mixer"] == row.label]
        errors = [line["error"] for line in mine]
        assert row.score is not None
        assert row.interval is not None
        assert row.score.mean == pytest.approx(sum(errors) / 3, abs=1e-15)
        assert (row.score.min, row.score.max, row.n_finished) == (min(errors), max(errors), 3)
        assert row.interval.low < row.score.mean < row.interval.high
        assert row.loss == pytest.approx(sum(line["loss"] for line in mine) / 3)
        assert row.tokens_per_second == pytest.approx(mine[0]["tokens"] / mine[0]["seconds"])
        assert row.best == (row.label == "mta")


def test_table_lists_every_seed(tmp_path: Path) -> None:
    """A mean without its seeds hides bimodal results."""
    out = make_folder(tmp_path / "out")
    final = [row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines()) if row["final"]]
    write(out)
    for text in ((out / "table.txt").read_text(), (out / "report.html").read_text(), markdown(out)):
        for line in final:
            assert units.percent(line["error"]) in text


@pytest.mark.parametrize("width", [30, 45, 60, 80, 100, 200])
def test_table_fits_any_terminal(tmp_path: Path, width: int) -> None:
    """A narrow terminal gets the columns below each other: no line too long, no number cut."""
    out = make_folder(tmp_path / "out")
    text = shown(out, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for row in rows(read(out)):
        assert row.score is not None
        assert units.percent(row.score.mean) in text
        assert f"{row.parameters:,}" in text
    assert "84.0 KiB" in text
    assert "…" not in text


def test_table_needs_ascii_only(tmp_path: Path) -> None:
    """A terminal without UTF-8 must not end a training of hours with an encoding error."""
    out = make_folder(tmp_path / "out")
    assert "mta" in shown(out, 100, encoding="ascii")
    assert (out / "table.txt").read_text().isascii()


def test_table_folds_long_names(tmp_path: Path) -> None:
    """Mixers carry their options in their name."""
    name = "mta:c_q=2:c_k=9:kq_post=false:head_pre=false"
    text = shown(make_folder(tmp_path / "out", mixers=("attention", name), n_seeds=1), 60)
    assert max(len(line) for line in text.splitlines()) <= 60
    assert "c_k=9" in text


def test_unfinished_runs_are_named_and_stay_out_of_the_mean(tmp_path: Path) -> None:
    """A run that was stopped, failed or never begun is shown as such everywhere; its numbers do not enter the mean."""
    out = make_folder(tmp_path / "out", stop={("mta", 1): 600, ("diff", 0): 0, ("attention", 2): 300, ("attention", 1): 75})
    journal = {"event": "failed", "reason": "the loss is nan at step 601"}
    (out / "runs/mta-seed1/progress.jsonl").write_text(json.dumps({"event": "step", "step": 600}) + "\n" + json.dumps(journal))
    log = "a warning\nTraceback (most recent call last):\n  File x, line 1\n    y\nMemoryError: no room\n"
    (out / "runs/attention-seed1/log.txt").write_text(log)
    by_label = {row.label: row for row in rows(read(out))}
    assert [run.status for run in by_label["mta"].runs] == ["finished", "failed", "finished"]
    assert [run.status for run in by_label["diff"].runs] == ["not started", "finished", "finished"]
    assert [run.status for run in by_label["attention"].runs] == ["finished", "failed", "unfinished"]
    mta = by_label["mta"]
    assert mta.score is not None
    assert mta.score.mean == (mta.runs[0].points[-1].score + mta.runs[2].points[-1].score) / 2
    write(out)
    for text in ((out / "table.txt").read_text(), markdown(out), (out / "report.html").read_text()):
        assert re.search(r"mta seed 1: failed at step 600 of 1,500 \(.* %\): the loss is nan at step 601", text)
        assert re.search(r"attention seed 1: failed at step 75 .*: MemoryError: no room", text)
        assert "attention seed 2: unfinished at step 300 of 1,500" in text
        assert "diff seed 0: not started" in text
        assert "2 of 3" in text


def test_a_result_that_is_not_finite_counts_as_failed(tmp_path: Path) -> None:
    """A diverged run must neither enter the mean nor break the page's JSON."""
    out = make_folder(tmp_path / "out", metric="bits_per_byte", task="text")
    edit(
        out,
        lambda line: (
            {**line, "bits_per_byte": None, "loss": math.nan} if (line["mixer"], line["seed"]) == ("diff", 1) else line
        ),
    )
    write(out)
    row = next(row for row in rows(read(out)) if row.label == "diff")
    assert [run.status for run in row.runs] == ["finished", "failed", "finished"]
    assert all(point[3] is None for point in page_data(out)["mixers"][2]["runs"][1]["points"])
    assert "diff seed 1: failed" in (out / "table.txt").read_text()


def test_broken_lines_are_counted_not_fatal(tmp_path: Path) -> None:
    """A kill may cut the last line; lines of another plan must not be mixed in."""
    out = make_folder(tmp_path / "out")
    with open(out / "results.jsonl", "a") as file:
        stranger = {"mixer": "mta", "seed": 0, "step": 1500, "error": 0.0, "config_hash": "another", "final": True}
        file.write(json.dumps(stranger) + "\n" + '{"mixer": "mta", "se')
    comparison = read(out)
    assert comparison.skipped_lines == 2
    assert comparison.runs["mta"][0].points[-1].score > 0


def test_a_repeated_step_counts_once_with_its_later_value(tmp_path: Path) -> None:
    """A resumed run evaluates steps again."""
    out = make_folder(tmp_path / "out")
    lines = (out / "results.jsonl").read_text().splitlines()
    again = json.dumps({**json.loads(lines[0]), "error": 0.5})
    (out / "results.jsonl").write_text("\n".join([*lines, again]) + "\n")
    points = read(out).runs["attention"][0].points
    assert len(points) == 20
    assert points[0].score == 0.5


def test_an_empty_comparison_still_reports(tmp_path: Path) -> None:
    """A run that is interrupted before its first evaluation must end with a report, not with an exception."""
    out = make_folder(tmp_path / "out", inspected=False)
    (out / "results.jsonl").unlink()
    for folder in (out / "runs").iterdir():
        folder.rmdir()
    assert "No run has finished yet; 0 of 12 have started." in shown(out, 80)
    assert page_data(out)["inspections"] == []


@pytest.mark.parametrize("content", [None, "{", "[]", '{"task": "x"}', '{"task":"x","metric":"taste","mixers":[],"seeds":[]}'])
def test_a_folder_without_a_plan_is_refused(tmp_path: Path, content: str | None) -> None:
    """The sentence must say which file is wrong; nothing is written."""
    if content is not None:
        (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(ValueError, match=r"comparison\.json"):
        write(tmp_path)
    assert not any((tmp_path / name).exists() for name in FILES)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"attention": 0.6, "mta": 0.02}, r"^mta is wrong on .* attention on .* %: \d+(\.\d)? times as many\.$"),
        ({"attention": 0.3, "mta": 0.28}, r"overlap, so the order is not settled\.$"),
        ({"attention": 1.8, "mta": 1.8}, r"^No mixer does better than a guess, which is wrong on 87\.5 %"),
    ],
)
def test_headline_follows_from_the_numbers(tmp_path: Path, ends: dict[str, float], said: str) -> None:
    """No winner is claimed where seeds overlap or where nobody beats a guess."""
    comparison = read(make_folder(tmp_path / "out", mixers=("attention", "mta"), ends=ends))
    assert re.search(said, headline(comparison, rows(comparison)))


def test_headline_without_errors_gives_no_ratio(tmp_path: Path) -> None:
    """0 errors have no ratio; the size of the test set is what limits the claim."""
    out = make_folder(tmp_path / "out")
    edit(out, lambda line: {**line, "error": 0.0} if line["mixer"] == "mta" and line["final"] else line)
    comparison = read(out)
    assert headline(comparison, rows(comparison)).startswith(
        "mta makes no mistake on 3,000 held-out examples; attention is wrong on"
    )
    write(out)


def test_headline_of_text_says_bits(tmp_path: Path) -> None:
    """Bits per byte are no error rate."""
    comparison = read(make_folder(tmp_path / "out", metric="bits_per_byte", task="text"))
    assert re.match(
        r"mta needs 2\.\d{3} bits per byte .* % fewer than attention with 2\.\d{3}\.$", headline(comparison, rows(comparison))
    )


def test_published_table_is_labelled_and_only_with_its_task(tmp_path: Path) -> None:
    """Nobody may take the paper's numbers for this run's."""
    own = make_folder(tmp_path / "own")
    other = make_folder(tmp_path / "other", task="recall")
    write(own)
    write(other)
    for name in ("table.txt", "report.html"):
        text = (own / name).read_text()
        assert "Published, another size than this run" in text
        assert "Not measured here" in text
        assert "Published" not in (other / name).read_text()
    assert "| MTA | 0.1 +- 0.1 |" in markdown(own)
    assert "Published" not in markdown(other)


def test_mean_curve_is_of_one_set_of_seeds(tmp_path: Path) -> None:
    """A mean over fewer and fewer seeds would jump; finished runs make it, or the common part of unfinished ones."""
    out = make_folder(tmp_path / "out", stop={("mta", 1): 600, ("diff", 0): 300, ("diff", 1): 450, ("diff", 2): 0})
    comparison = read(out)
    finished = comparison.runs["mta"]
    curve = mean_curve(finished)
    assert [point[0] for point in curve] == [point.step for point in finished[0].points]
    assert curve[0][3] == (finished[0].points[0].score + finished[2].points[0].score) / 2
    assert [point[0] for point in mean_curve(comparison.runs["diff"])] == [75, 150, 225, 300]


def test_labels_keep_apart_and_in_order() -> None:
    """Names at the lines' ends must not overlap, and move no further than needed."""
    places = curves.apart([0.0, 1.0, 2.0, 50.0, 51.0], gap=10.0)
    assert places == pytest.approx([-9.0, 1.0, 11.0, 45.5, 55.5])
    assert curves.apart([], gap=10.0) == []
    assert min(np.diff(curves.apart(sorted(np.random.default_rng(0).uniform(0, 60, 20)), gap=5.0))) >= 5.0 - 1e-9


def test_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    """One file: no address, no remote script, style, font or image; the policy forbids what might slip in."""
    out = make_folder(tmp_path / "out")
    write(out)
    page = (out / "report.html").read_text()
    tags = Tags(page)
    for tag, attributes in tags.seen:
        assert tag not in ("iframe", "img", "object", "embed")
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", page)


def test_page_escapes_what_came_from_files(tmp_path: Path) -> None:
    """Text that a model read or wrote must not become markup or end a script."""
    out = make_folder(tmp_path / "out")
    write(out)
    page = (out / "report.html").read_text()
    tags = Tags(page)
    assert [tag for tag, _ in tags.seen].count("script") == 2
    assert not any(tag in ("u", "s") or "onerror" in attributes for tag, attributes in tags.seen)
    assert HOSTILE not in page
    assert "&lt;img src=x onerror=alert(2)&gt;&amp;amp;" in page


def test_page_names_the_forms_that_ran(tmp_path: Path) -> None:
    """A mixer that was several times slower because a compiled form could not run it is told on the page, whichever seed said so."""
    out = make_folder(tmp_path / "out", mixers=("attention", "moneta"))
    write(out)
    assert "Forms of the operations" not in (out / "report.html").read_text()
    for seed, form in ((0, "native"), (2, "chunked <i>")):
        event = {"event": "forms", "step": 1, "forms": [f"scan of memory 'mlp': {form}"]}
        (out / "runs" / f"moneta-seed{seed}" / "progress.jsonl").write_text(json.dumps(event) + "\n")
    write(out)
    page = (out / "report.html").read_text()
    assert "scan of memory &#x27;mlp&#x27;: chunked &lt;i&gt;; scan of memory &#x27;mlp&#x27;: native</td>" in page


def test_page_joins_the_mixers_answers_to_one_example(tmp_path: Path) -> None:
    """Every mixer answers the same examples: one card each, with the wrong letters marked."""
    out = make_folder(tmp_path / "out")
    write(out)
    page = (out / "report.html").read_text()
    assert page.count("<article") == 6
    assert page.count("✓ right") == 5 + 3
    assert page.count("✗ wrong") == 6 * 4 - 8
    assert "<b>x</b><b>q</b>" in page
    assert len(re.findall("<mark>[a-z]{5}</mark>", page)) == 5


def test_page_judges_no_continuation(tmp_path: Path) -> None:
    """Text may go on in many ways: no verdict beside a sample of a language model."""
    out = make_folder(tmp_path / "out", metric="bits_per_byte", task="text")
    write(out)
    page = (out / "report.html").read_text()
    assert "✗ wrong" not in page
    assert "the text goes on" in page


def test_page_maps_carry_the_stored_numbers(tmp_path: Path) -> None:
    """The packed lower triangle is the stored map, to float16; the first row opened is the prompt's last token."""
    out = make_folder(tmp_path / "out")
    write(out)
    item = next(item for item in page_data(out)["inspections"] if item["label"] == "mta")
    stored = load_file(out / "runs/mta-seed0/inspection.safetensors")
    packed = next(one for one in item["maps"] if (one["layer"], one["name"]) == (1, "after"))
    values = packed["scale"] * np.frombuffer(base64.b64decode(packed["data"]), dtype="<f2").astype(float).reshape(2, -1)
    rows_, cols = np.tril_indices(packed["length"])
    np.testing.assert_allclose(values, stored["layer1.after"][:, rows_, cols], atol=5e-4)
    assert "".join(item["tokens"])[: item["query"] + 1].endswith("#td")
    kernel = next(one for one in item["kernels"] if (one["layer"], one["kind"], one["title"]) == (2, "kq_pre", "head 1"))
    assert (kernel["rows"], kernel["cols"], kernel["origin"]) == (2, 9, 4)
    np.testing.assert_allclose(kernel["values"], stored["layer2.kq_pre"][1].ravel(), rtol=5e-4)


def test_page_limits_the_maps_of_large_models(tmp_path: Path) -> None:
    """A model of many heads must not make a page that no browser opens; the page says what it leaves out."""
    out = make_folder(tmp_path / "out", mixers=("attention",), n_seeds=1)
    folder = out / "runs/attention-seed0"
    content = json.loads((folder / "inspection.json").read_text())
    content["maps"] = [{"layer": layer, "name": "attention", "key": f"layer{layer}"} for layer in range(12)]
    (folder / "inspection.json").write_text(json.dumps(content))
    save_file(
        {f"layer{layer}": np.full((32, 128, 128), 1 / 128, np.float32) for layer in range(12)},
        folder / "inspection.safetensors",
    )
    write(out)
    maps = page_data(out)["inspections"][0]["maps"]
    assert [(one["heads"], one["total"]) for one in maps] == [(8, 32)] * 12
    assert (out / "report.html").stat().st_size < 4e6


def test_page_names_kernels_between_heads(tmp_path: Path) -> None:
    """The merged 3-D convolution has one kernel per ordered head pair of a group: [H, c_h, c_q, c_k]."""
    out = make_folder(tmp_path / "out", mixers=("mta",), n_seeds=1)
    folder = out / "runs/mta-seed0"
    tensors = load_file(folder / "inspection.safetensors")
    tensors["layer0.kq_pre"] = np.zeros((4, 2, 3, 5), np.float32)
    tensors["layer0.head_post"] = np.zeros((2, 2, 2), np.float32)
    save_file(tensors, folder / "inspection.safetensors")
    write(out)
    kernels = [one for one in page_data(out)["inspections"][0]["kernels"] if one["layer"] == 0]
    titles = [one["title"] for one in kernels if one["kind"] == "kq_pre"]
    assert titles == [
        "head 0 to 0", "head 1 to 0", "head 0 to 1", "head 1 to 1", "head 2 to 2", "head 3 to 2", "head 2 to 3", "head 3 to 3",
    ]  # fmt: skip
    assert [(one["title"], one["first"]) for one in kernels if one["kind"] == "head_post"] == [("group 0", 0), ("group 1", 2)]


def test_a_damaged_inspection_is_said_and_the_next_seed_used(tmp_path: Path) -> None:
    """A cut-off file costs its own pictures only."""
    out = make_folder(tmp_path / "out")
    (out / "runs/mta-seed0/inspection.safetensors").write_bytes(b"\x00" * 9)
    (out / "runs/diff-seed0/inspection.json").write_text('{"examples": [')
    write(out)
    assert {item["label"]: item["seed"] for item in page_data(out)["inspections"]} == {
        "attention": 0, "talking_heads": 0, "diff": 1, "mta": 1,
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert "The inspection of mta seed 0 could not be read" in page
    assert "The inspection of diff seed 0 could not be read" in page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.percent(0.0), "0.00"), (units.percent(0.0413), "4.13"), (units.percent(0.09996), "10.0"),
        (units.percent(1.0), "100.0"), (units.count(99_999), "99,999"), (units.count(6_144_000), "6.14M"),
        (units.count(999_900), "1M"), (units.count(math.nan), "-"),
        (units.duration(3.14), "3.1s"), (units.duration(59.99), "1m 00s"), (units.duration(7320), "2h 02m"),
        (units.size(512), "512 B"), (units.size(98_304), "96.0 KiB"), (units.size(5 * 1024**3), "5.0 GiB"),
        (units.small(0.0), "0.000"), (units.small(0.00123), "0.0012"), (units.small(1.8034), "1.803"),
        (units.small(math.inf), "inf"),
    ],
)  # fmt: skip
def test_units_read_well(text: str, expected: str) -> None:
    """Rounding must not produce 1000k, 60.0s or 10.00."""
    assert text == expected
