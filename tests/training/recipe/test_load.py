"""Run files, overrides, inheritance and the shipped recipes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from recollect.data.settings import SourceSettings
from recollect.models import RecollectConfig, n_parameters
from recollect.training.recipe.check import batch_rows, check, n_steps
from recollect.training.recipe.explain import explain, sections
from recollect.training.recipe.load import dump_run, load_run, recipes
from recollect.training.recipe.model_config import model_config
from recollect.training.recipe.settings import ModelSettings, RunSettings

# Table 7 of arXiv 2504.00927: D, L, heads, parameters of the Transformer, tokens per batch, steps, warm-up, convolving layers.
MTA = {
    "300m": (1024, 20, 16, 388_277_248, 262_144, 400_000, 375, 5),
    "550m": (1280, 24, 10, 651_818_240, 262_144, 400_000, 375, 6),
    "880m": (1536, 24, 16, 876_553_728, 262_144, 400_000, 375, 6),
    "1b": (2048, 24, 16, 1_495_894_016, 524_288, 200_000, 187, 6),
}
# Table 5 of arXiv 2504.13173 (1.3b: Table 7 of arXiv 2505.23735): D, L, heads, rank of the gates, SwiGLU, peak learning rate, tokens.
MIRAS = {
    "170m": (768, 12, 16, 32, 2048, 3e-3, 15e9),
    "340m": (1024, 24, 16, 32, 2752, 1.5e-3, 15e9),
    "780m": (1536, 24, 16, 64, 4096, 1.25e-3, 30e9),
    "1.3b": (2048, 18, 8, 64, 5504, 7e-4, 100e9),
}
TEXT = "data.sources=[book.txt]"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(file: str | Path, *overrides: str) -> list[str]:
    """Lines of the error."""
    with pytest.raises(ValueError, match=r".") as caught:
        load_run(file, overrides)
    return str(caught.value).splitlines()


# --- recipes


def test_every_published_run_has_a_recipe() -> None:
    """Prevents a size or model of the papers from being left out, and a line of the list that says nothing."""
    expected = {"tiny", "long-context"}
    expected |= {f"{mixer}-{size}" for mixer in ("mta", "transformer", "diff", "talking-heads") for size in MTA}
    expected |= {f"{mixer}{h}-{size}" for mixer in ("moneta", "yaad", "memora") for h in ("", "-h") for size in MIRAS}
    assert set(recipes()) == expected
    assert all(len(line) > 20 and "\n" not in line for line in recipes().values())
    assert len(set(recipes().values())) == len(expected)


@pytest.mark.parametrize("name", list(recipes()))
def test_recipe_can_start(name: str) -> None:
    """Prevents recipes with misspelt settings or impossible values, and those that need more than their line says."""
    extra = {"tiny": [TEXT], "long-context": ["model.start_from=runs/a"]}.get(name, [])
    run = load_run(name, extra)
    check(run)
    assert run.out == f"runs/{name}"
    assert batch_rows(run) * run.data.seq_len == run.batch_tokens, "the batch in tokens is a whole number of rows"


@pytest.mark.parametrize("size", MTA)
def test_mta_recipes_are_table_7(size: str) -> None:
    """Prevents another optimiser, batch, length or data mix than the paper's, and another number of parameters (Tables 7 and 8)."""
    dim, n_layers, n_heads, baseline, batch, steps, warmup, convolving = MTA[size]
    extra = {
        "transformer": 0,
        "diff": 6 * n_layers * dim // n_heads,
        "talking-heads": 2 * n_layers * n_heads**2,
        "mta": 2 * n_heads * (convolving * 66 + n_layers * n_heads) + n_layers * (2 * dim // n_heads + 1),
    }
    assert extra["mta"] == {"300m": 23_380, "550m": 18_888, "880m": 29_592, "1b": 31_128}[size]
    if size == "880m":
        assert extra == {"transformer": 0, "diff": 13_824, "talking-heads": 12_288, "mta": 29_592}, "Table 8"
    for mixer, more in extra.items():
        run = load_run(f"{mixer}-{size}")
        assert n_parameters(model_config(run, 128_256)) == baseline + more
        o = run.optimiser
        assert (run.batch_tokens, n_steps(run), o.warmup, run.data.seq_len) == (batch, steps, warmup, 2048)
        assert (o.lr, o.schedule, o.end_lr, o.weight_decay, o.decay_all) == (1.5e-4, "linear", 0, 0.05, True)
        assert (o.beta1, o.beta2, o.eps, o.clip) == (0.9, 0.98, 1e-8, 1.0)
        assert {source.name: source.weight for source in run.data.sources} == {
            "commoncrawl": 0.726,
            "c4": 0.081,
            "github": 0.049,
            "book": 0.021,
            "arxiv": 0.023,
            "wikipedia": 0.05,
            "stackexchange": 0.05,
        }
        assert [source.name for source in run.data.validation] == [source.name for source in run.data.sources]
        assert run.data.cut_documents is False


@pytest.mark.parametrize("size", MIRAS)
def test_miras_recipes_are_table_5(size: str) -> None:
    """Prevents another learning rate, length, context or shape than the papers', counted by hand for all six models."""
    dim, n_layers, n_heads, rank, hidden, lr, tokens = MIRAS[size]
    head = dim // n_heads
    around = 3 * dim * hidden + 2 * dim  # SwiGLU and two norms
    gate = 2 * dim * rank + dim
    attention = 4 * dim**2 + around
    moneta = 5 * dim**2 + 12 * dim + 2 * gate + n_heads * (8 * head**2 + 2 * head) + head + around
    for mixer, layer in {"moneta": moneta, "yaad": moneta + gate, "memora": moneta}.items():
        for name, body in {mixer: n_layers * layer, f"{mixer}-h": n_layers // 2 * (layer + attention)}.items():
            run = load_run(f"{name}-{size}")
            config = model_config(run, 32_000)
            assert n_parameters(config) == 32_000 * dim + dim + body
            assert (config.max_position_embeddings, run.data.seq_len, run.batch_tokens) == (4096, 4096, 524_288)
            assert (run.optimiser.lr, run.tokens, run.optimiser.schedule) == (lr, tokens, "cosine")
            assert n_steps(run) * run.batch_tokens == pytest.approx(tokens, rel=1e-4)
            assert run.optimiser.inner_warmup == pytest.approx(n_steps(run) / 10, abs=1), "a tenth of the run"
            windows = {layer["window"] for layer in config.layers if layer["mixer"] == "sliding_window"}
            assert windows == ({2048} if name.endswith("-h") else set())


def test_tiny_recipe_is_about_a_million_parameters_on_bytes() -> None:
    """Prevents a first run that is no longer a matter of minutes."""
    run = load_run("tiny", [TEXT])
    assert 0.9e6 < n_parameters(model_config(run, 257)) < 1.2e6
    assert (run.data.tokenizer, run.engine.device) == ("bytes", "auto")
    assert run.batch_tokens * n_steps(run) < 3e6


def test_long_context_changes_what_section_4_3_changes(tmp_path: Path) -> None:
    """Prevents the recipe from drifting from pretraining's in anything else, and from starting without a checkpoint."""
    pretraining = load_run("mta-880m")
    run = load_run("long-context", [f"model.start_from={tmp_path}"])
    o = dataclasses.replace(pretraining.optimiser, weight_decay=0.0, warmup=50)
    assert run.optimiser == o
    assert (run.data.seq_len, run.tokens, run.batch_tokens, run.steps) == (4096, 10.5e9, 262_144, None)
    assert dataclasses.replace(run.data, seq_len=2048) == pretraining.data
    with pytest.raises(ValueError, match=r"model\.start_from"):
        check(load_run("long-context"))
    RecollectConfig(
        vocab_size=128_256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layers="mta"
    ).save_pretrained(tmp_path)
    config = model_config(run, 128_256)
    assert [layer["rope_theta"] for layer in config.layers] == [5e5, 5e5]
    assert (config.hidden_size, config.max_position_embeddings) == (32, 4096)


# --- files and overrides


def test_run_file_sets_every_kind_of_value(tmp_path: Path) -> None:
    """Prevents settings that are read and dropped; 1e-3 and 5e5 are numbers as people write them."""
    text = (
        "steps: 5e2\nmodel: {layers: [mta, {mixer: attention, rope_theta: 5e5}], mlp: false}\n"
        "data: {sources: [{paths: [a.txt, b/], weight: 2}, {dataset: d, config: '1e5', weight: 1}]}\noptimiser: {lr: 1e-3, eps: 1E-9}\n"
    )
    run = load_run(write(tmp_path / "my-run.yaml", text))
    assert (run.steps, run.optimiser.lr, run.optimiser.eps, run.out) == (500, 1e-3, 1e-9, "runs/my-run")
    assert run.model.layers == ["mta", {"mixer": "attention", "rope_theta": 5e5}]
    assert run.model.mlp is False
    assert run.data.sources[0] == SourceSettings(paths=["a.txt", "b/"], weight=2)
    assert run.data.sources[1] == SourceSettings(dataset="d", config="1e5", weight=1)
    assert load_run(write(tmp_path / "empty.yaml", "# nothing\n")) == RunSettings(out="runs/empty")


def test_overrides_reach_into_sections_and_lists() -> None:
    """Prevents overrides that are lost, land elsewhere, or wipe what stands beside them."""
    run = load_run(
        "mta-300m",
        ["optimiser.lr=1e-3", "data.sources.6.weight=0.5", "model.options.c_q=4", "out=here", "optimiser.lr=2e-3"],
    )
    base = load_run("mta-300m")
    assert run.optimiser == dataclasses.replace(base.optimiser, lr=2e-3), "of two for one name the later wins"
    assert run.data.sources[6] == dataclasses.replace(base.data.sources[6], weight=0.5)
    assert run.data.sources[:6] == base.data.sources[:6]
    assert (run.model.size, run.model.options, run.out) == ("mta-300m", {"c_q": 4}, "here")
    assert load_run("long-context", ["model.options={}"]).model.options == {}, "a mapping is replaced"


def test_shorthands_for_sources() -> None:
    """Prevents `data.sources=book.txt` from being refused or read as a list of letters."""
    expected = [SourceSettings(paths=["book.txt"])]
    for text in ("book.txt", "[book.txt]", "{paths: book.txt}", "[{paths: [book.txt]}]"):
        assert load_run("tiny", [f"data.sources={text}"]).data.sources == expected
    assert load_run("tiny", ["data.sources.0.paths=book.txt"]).data.sources == expected
    two = load_run("tiny", ["data.sources=a.txt", "data.sources.1=b.txt", "data.sources.1.weight=3"]).data.sources
    assert two == [SourceSettings(paths=["a.txt"]), SourceSettings(paths=["b.txt"], weight=3)]
    assert load_run("tiny", ["model.train_only=*.kq_*"]).model.train_only == ["*.kq_*"]


def test_base_inherits_recipes_and_files(tmp_path: Path) -> None:
    """Prevents the wrong one of two values from winning, and paths that depend on where the command runs."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "common.yaml", "base: yaad-170m\noptimiser: {lr: 1e-4, clip: 0.5}\nmodel: {options: {chunk_size: 32}}\n")
    mine = write(
        tmp_path / "sub" / "mine.yaml", "base: ../common.yaml\nabout: mine\noptimiser: {lr: 5e-5}\nmodel: {n_layers: 2}\n"
    )
    run, recipe = load_run(mine), load_run("yaad-170m")
    assert run.optimiser == dataclasses.replace(recipe.optimiser, lr=5e-5, clip=0.5)
    assert run.model == dataclasses.replace(recipe.model, n_layers=2, options={"chunk_size": 32})
    assert run.data == recipe.data
    both = load_run(write(tmp_path / "both.yaml", "base: [mta-300m, common.yaml]\n"))
    assert (both.model.layers, both.optimiser.clip, both.optimiser.decay_all) == ("yaad", 0.5, False), "the later base wins"


def test_steps_take_back_tokens_and_a_checkpoint_the_shape(tmp_path: Path) -> None:
    """Prevents `recollect train moneta-170m steps=100` from being refused for a length that the recipe gave."""
    assert load_run("moneta-170m", ["steps=100"]) == dataclasses.replace(load_run("moneta-170m"), steps=100, tokens=None)
    assert load_run("mta-300m", ["tokens=1e9"]).steps is None
    file = write(tmp_path / "a.yaml", "base: mta-300m\ntokens: 1e9\nmodel: {start_from: runs/b}\n")
    run = load_run(file)
    assert (run.steps, run.tokens, run.model) == (None, 1e9, ModelSettings(start_from="runs/b"))
    check(run)
    with pytest.raises(ValueError, match="not both"):
        check(load_run("tiny", [TEXT, "steps=5", "tokens=1e9"]))
    with pytest.raises(ValueError, match=r"leave out model\.layers"):
        check(load_run(file, ["model.layers=mta"]))


@pytest.mark.parametrize("name", ["tiny", "long-context", "yaad-h-1.3b", "diff-1b"])
def test_dumped_run_loads_equal(name: str, tmp_path: Path) -> None:
    """Prevents a stored run that describes another one: numbers, nulls, and texts that look like numbers."""
    odd = ["data.sources=[{paths: ['1e5', 'null', 'é: #.txt'], name: '007', weight: 1e-7}]", "optimiser.eps=1e-20", "out='1e3'"]
    run = load_run(name, odd)
    assert run.data.sources[0].paths == ["1e5", "null", "é: #.txt"]
    text = dump_run(run)
    assert load_run(write(tmp_path / "run.yaml", text)) == run
    assert all(f"{field.name}:" in text for field in dataclasses.fields(SourceSettings))


# --- errors


def test_all_mistakes_are_reported_at_once_with_the_nearest_name() -> None:
    """Prevents a round of corrections per mistake, and settings that are misspelt in silence."""
    head, *lines = refusal(
        "tiny",
        "model.hiden_size=3",
        "optimiser.schedule=cosin",
        "lr=1e-3",
        "steps=ten",
        "batch_tokens=5.5",
        "out=3",
        "data.sources=[{pths: a}]",
        "engine=fast",
        "seq_len",
    )
    assert head == "tiny: 9 problems"
    expected = (
        "no setting model.hiden_size; did you mean model.hidden_size?",
        "optimiser.schedule must be constant, linear, cosine or wsd; got 'cosin'; did you mean cosine?",
        "no setting lr; did you mean optimiser.lr?",
        "steps must be an integer or null; got 'ten'",
        "batch_tokens must be an integer; got 5.5",
        "out must be a text; got 3; write it in quotes",
        "no setting data.sources.0.pths; did you mean data.sources.0.paths?",
        "engine must be a mapping; got 'fast'",
        "'seq_len' is not name=value",
    )
    assert all(any(sentence in line for line in lines) for sentence in expected), lines


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps=true", "steps must be an integer or null; got 'true'"),
        ("optimiser.lr=yes", "optimiser.lr must be a number; got 'true'"),
        ("data.sources.2.weight=1", "data.sources has 0 items"),
        ("steps.x=1", "steps is 500, which has no parts"),
        ("data.sources=[a: b: c]", "the value of data.sources is not YAML"),
        ("data={seq_len: 1, seq_len: 2}", "seq_len is given twice"),
        ("=3", "is not name=value"),
        ("data=null", "data must be a mapping; got None"),
        ("qqqq=3", "known here: out, seed, steps"),
    ],
)
def test_bad_overrides(override: str, sentence: str) -> None:
    """Prevents tracebacks, and booleans that train with a learning rate of one."""
    assert sentence in refusal("tiny", override)[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {train_only: [*.kq_*]}\n", "a text that begins with * needs quotes"),
        ("steps: 1\nsteps: 2\n", "bad.yaml, line 2, column 1: steps is given twice"),
        ("model:\n  size: 'mta\n", "bad.yaml, line"),
        ("when: 2024-13-45\n", "bad.yaml, not YAML"),
        ("- a\n- b\n", "must hold settings (name: value); it holds list"),
        ("base: mta-30m\n", "base 'mta-30m' is neither a recipe nor a file beside it; did you mean mta-300m?"),
        ("base: 3\n", "base must be a recipe, a file or a list of these; got 3"),
        ("base: bad.yaml\n", "in a circle"),
        ("modle: {}\n", "no setting modle; did you mean model?"),
        ("3: 4\n", "no setting 3"),
        ("x: !!python/name:os.system\n", "could not determine a constructor"),
    ],
)
def test_bad_files(text: str, sentence: str, tmp_path: Path) -> None:
    """Prevents tracebacks, endless recursion, and a run file that can execute code."""
    assert sentence in "\n".join(refusal(write(tmp_path / "bad.yaml", text)))


def test_a_missing_file_names_the_nearest_recipe(tmp_path: Path) -> None:
    """Prevents "file not found" for a misspelt recipe; folders and binary files get their own sentence."""
    assert "did you mean mta-300m?" in refusal("mta-30m")[0]
    assert "is a folder" in refusal(tmp_path)[0]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refusal(tmp_path / "binary.yaml")[0]


# --- help


def test_every_setting_is_explained() -> None:
    """Prevents settings without a meaning, with a wrong default, or left out of `recollect train --help`."""
    text = explain(90)
    entries = [entry for _, _, settings in sections() for entry in settings]
    assert all(entry.text and f"  {entry.name}  ({entry.kind}" in text for entry in entries)
    assert "  optimiser.schedule  (constant, linear, cosine or wsd, default cosine)" in text
    assert "  data.sources.0.weight  (a number or null, default null)" in text
    assert "  optimiser.eps  (a number, default 1e-08)" in text
    fields = {"seed", "model.mlp", "data.carry", "engine.threads", "saving.keep_best", "logging.wandb", "data.sources.0.field"}
    assert fields <= {entry.name for entry in entries}
    classes = [
        RunSettings,
        *(type(value) for value in vars(RunSettings()).values() if dataclasses.is_dataclass(value)),
        SourceSettings,
    ]
    assert len(entries) == sum(len(dataclasses.fields(cls)) for cls in classes) - 6, "six sections are headings"
    assert all(len(line) <= 90 for line in text.split("\n\n", 3)[3].splitlines() if line.startswith("      "))
