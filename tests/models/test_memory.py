"""A memory that is kept: streaming equals reading at once, a file equals no break, and what does not fit is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from recollect.models import RecollectCache, RecollectForCausalLM
from recollect.models.memory import fingerprint, load_memory, remember, save_memory
from tests.laws import EXACT, assert_near
from tests.models.conftest import NAMES, TOY, tiny, tokens


@pytest.mark.parametrize("name", NAMES)
def test_remembering_in_pieces_equals_one_call(name: str) -> None:
    """However the text comes and is cut: the logits that follow, the loss and the count are those of one call."""
    model, text, more = tiny(name), tokens(2, 50), tokens(2, 6, seed=5)
    whole = model(torch.cat([text, more], dim=1)).logits
    logits = whole[:, :49]
    loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    for given, piece in ((text, 512), (text, 7), (text.split([3, 0, 20, 1, 26], dim=1), 8), (iter(text.split(1, dim=1)), 50)):
        cache, report = remember(model, given, piece=piece)
        assert report[:2] == (50, 98)
        assert report.loss == pytest.approx(loss.item(), abs=1e-12)
        assert report.state_bytes == cache.nbytes() > 0
        assert cache.n_seen == 50
        assert_near(model(more, past_key_values=cache).logits, whole[:, 50:], EXACT, f"pieces of {piece}")


def test_remembering_goes_on_from_a_cache_and_leaves_it() -> None:
    """Prevents a caller's cache from being advanced, and the join between two calls from being lost."""
    model, text = tiny("attention"), tokens(40)
    before, _ = remember(model, text[:15], piece=4)
    states = before.states
    after, report = remember(model, text[15:], before, piece=9)
    assert (before.n_seen, after.n_seen) == (15, 40)
    assert all(old is new for old, new in zip(states, before.states, strict=True))
    assert report.n_scored == 24, "the logits of the first token were in the other call"
    whole = model(text[None]).logits
    again = model(text[None, :1], past_key_values=RecollectCache(after.states, n_seen=40)).logits
    torch.testing.assert_close(again, model(torch.cat([text, text[:1]])[None]).logits[:, 40:], atol=1e-12, rtol=0)
    assert report.loss == pytest.approx(F.cross_entropy(whole[0, 15:39], text[16:]).item(), abs=1e-12)


def test_one_token_has_no_loss() -> None:
    model = tiny()
    _, report = remember(model, tokens(1))
    assert (report.n_tokens, report.n_scored) == (1, 0)
    assert report.loss != report.loss


def test_streaming_takes_constant_memory() -> None:
    """The state of a windowed model does not grow, and of the text only the piece at hand is alive."""
    model = tiny([{"mixer": "sliding_window", "window": 8}] * 2, dtype=torch.float32)
    parts: list[weakref.ref[torch.Tensor]] = []

    def stream(n_parts: int) -> Iterator[torch.Tensor]:
        for n in range(n_parts):
            part = tokens(64, seed=n)
            parts.append(weakref.ref(part))
            yield part
            del part
            assert sum(alive() is not None for alive in parts) <= 2

    sizes = [remember(model, stream(n_parts), piece=64)[1].state_bytes for n_parts in (10, 30)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", NAMES)
def test_saved_memory_continues_as_without_the_break(name: str, tmp_path: Path) -> None:
    """From the file as from memory to the bit, and as in one call up to rounding; several rows too; no other file is left."""
    text, more = tokens(2, 30), tokens(2, 6, seed=5)
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, 1e-4)):
        model = tiny(name, dtype=dtype)
        cache, _ = remember(model, text, piece=11)
        save_memory(model, cache, tmp_path / "m")
        assert os.listdir(tmp_path) == ["m"]
        loaded = load_memory(model, tmp_path / "m")
        assert (loaded.n_seen, loaded.batch_size) == (30, 2)
        continued = model(more, past_key_values=loaded).logits
        assert torch.equal(continued, model(more, past_key_values=cache).logits)
        unbroken = model(torch.cat([text, more], dim=1)).logits[:, 30:]
        assert_near(continued, unbroken, tolerance, f"{dtype}")


def test_memory_loads_in_another_process(tmp_path: Path) -> None:
    """Everything that continuing needs is in the model's folder and the memory's file."""
    text, more = tokens(1, 30), tokens(1, 6, seed=5)
    torch.save(more, tmp_path / "more")
    unbroken = {}
    for name, dtype in (("double", torch.float64), ("single", torch.float32)):
        model = tiny(["mta", {"mixer": "sliding_window", "window": 5}, "moneta", "titans", "memora"], dtype=dtype)
        model.save_pretrained(tmp_path / name)
        save_memory(model, remember(model, text)[0], tmp_path / f"{name}.memory")
        unbroken[name] = model(torch.cat([text, more], dim=1)).logits[:, 30:]
    code = (
        "import torch\n"
        "from recollect.models import RecollectForCausalLM, load_memory\n"
        "for name in ('double', 'single'):\n"
        "    model = RecollectForCausalLM.from_pretrained(name).eval()\n"
        "    cache = load_memory(model, f'{name}.memory')\n"
        "    torch.save(model(torch.load('more'), past_key_values=cache).logits, f'{name}.logits')\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, timeout=120)
    for name, tolerance in (("double", EXACT), ("single", 1e-4)):
        assert_near(torch.load(tmp_path / f"{name}.logits"), unbroken[name], tolerance, name)


def test_memory_continues_generation(tmp_path: Path) -> None:
    """`generate` from a loaded memory gives the tokens of `generate` from the whole text, and does not need its length."""
    model, text, prompt = tiny("attention", dtype=torch.float32), tokens(1, 30), tokens(1, 4, seed=9)
    save_memory(model, remember(model, text)[0], tmp_path / "m")
    options = {"max_new_tokens": 8, "do_sample": False}
    whole = torch.cat([text, prompt], dim=1)
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), **options)[:, 30:]
    cache = RecollectCache(load_memory(model, tmp_path / "m").states)
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)
    assert torch.equal(said, expected)


def test_fingerprint_survives_saving_and_tells_models_apart(tmp_path: Path) -> None:
    """A model that was saved and loaded is the same; another weight, option, size or dtype is another."""
    model = tiny("attention", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert fingerprint(RecollectForCausalLM.from_pretrained(tmp_path)) == fingerprint(model)
    assert fingerprint(model).startswith("attention, 2 layers of 32, config ")
    others = [
        tiny("attention"),
        tiny("sliding_window", dtype=torch.float32),
        tiny([{"mixer": "attention", "rope_theta": 5e5}] * 2, dtype=torch.float32),
        tiny("attention", dtype=torch.float32, rms_norm_eps=1e-6),
    ]
    changed = tiny("attention", dtype=torch.float32)
    changed.load_state_dict(model.state_dict())
    assert fingerprint(changed) == fingerprint(model)
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    assert len({fingerprint(one) for one in (model, changed, *others)}) == 6


def test_another_models_memory_is_refused(tmp_path: Path) -> None:
    """The message names both models, so that one sees whether the mixers, the configuration or only the weights differ."""
    model, text = tiny("attention"), tokens(1, 9)
    save_memory(model, remember(model, text)[0], tmp_path / "m")
    with pytest.raises(
        ValueError, match=r"m was saved by another model \(fingerprint 'attention, .*expected 'mta, .*load it into"
    ):
        load_memory(tiny("mta"), tmp_path / "m")
    other = tiny("attention")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1.0
    config = fingerprint(model).split("weights")[0]
    with pytest.raises(ValueError, match=rf"fingerprint '{config}weights .*expected '{config}weights "):
        load_memory(other, tmp_path / "m")


def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    """Every single byte changed, and every cut: refused with a sentence, never read."""
    model = tiny([{"mixer": TOY}], hidden_size=4, num_attention_heads=1, intermediate_size=4, vocab_size=61)
    path = tmp_path / "m"
    save_memory(model, remember(model, tokens(1, 2))[0], path)
    whole = path.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    damaged += [whole[:i] for i in range(0, len(whole), 7)] + [whole + b"\0"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged|is not a whole state file|not written by"):
            load_memory(model, path)
    path.write_bytes(whole)
    assert load_memory(model, path).n_seen == 2


def test_what_cannot_be_remembered_or_saved_is_refused(tmp_path: Path) -> None:
    """Each with the reason, before anything is written."""
    model = tiny()
    cache, _ = remember(model, tokens(3))
    padded = model(tokens(2, 4), attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), use_cache=True).past_key_values
    for tokens_, options, message in (
        (tokens(0), {}, "nothing to remember"),
        ([], {}, "nothing to remember"),
        (tokens(3).float(), {}, r"int64 \[T\] or \[B, T\]; got torch.float32 \[3\]"),
        ([tokens(2, 3), tokens(3)], {}, "same number of rows; got 1 after 2"),
        (tokens(3), {"piece": 0}, "piece counts tokens: at least 1; got 0"),
        (tokens(2, 3), {"cache": cache}, "has 1 rows; the input has 2"),
        (tokens(2, 3), {"cache": padded}, "padding on the right"),
    ):
        with pytest.raises(ValueError, match=message):
            remember(model, tokens_, **options)
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        remember(tiny().train(), tokens(3))
    for wrong, message in (
        (RecollectCache([None] * 2), "has seen no token"),
        (RecollectCache(cache.states[:1], n_seen=3), "1 layers; this model has 2"),
        (padded, "padding on the right"),
    ):
        with pytest.raises(ValueError, match=message):
            save_memory(model, wrong, tmp_path / "m")
    with pytest.raises(FileNotFoundError):
        save_memory(model, cache, tmp_path / "nowhere" / "m")
    with pytest.raises(FileNotFoundError):
        load_memory(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []
