"""What is timed for real: every contender that runs on a CPU is right, and the check would notice if it were not."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import miras
from recollect import state
from recollect.bench import peers
from recollect.bench.contenders import ATTENTIONS, UNMEASURED, missing
from recollect.bench.setting import Setting
from recollect.bench.suites import CONTENDERS, SUITES, attention, attention_peers, decoding, memories, models, training
from recollect.ops import multi_token
from tests.bench.toys import SETTING


def setting(suite: str) -> Setting:
    """Models of two layers: six of so few channels make of fp32's last digits an error in Memora's gradients that no real width has."""
    return SETTING._replace(suite=suite, layers=2 if suite == "train" else 0)


HERE = [key for key, contender in CONTENDERS.items() if not missing(contender, setting(contender.suite))]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 tokens are a chunk and a half; blocks of two heads' maps have 24 rows of 24."""
    monkeypatch.setattr(multi_token, "BLOCK_ENTRIES", 2 * 24 * 24)
    for module in (attention, attention_peers, memories):
        monkeypatch.setattr(module, "CHECK_LENGTH", 24)


@pytest.mark.parametrize("key", HERE)
def test_what_runs_here_is_right_and_has_a_step(key: str) -> None:
    """Prevents a contender that is registered and cannot run, an oracle of another function, and work that is not positive."""
    contender = CONTENDERS[key]
    here = setting(contender.suite)
    if contender.check is not None:
        check = contender.check(here)
        assert check.passed, check
    step = contender.prepare(here, SUITES[contender.suite].inputs(here, 17))
    assert all(torch.isfinite(part).all() for part in step())
    if contender.work is not None:
        assert min(contender.work(here, 17, step)) > 0


@pytest.mark.parametrize("spoiled", [0, 1, 5])
def test_a_wrong_output_or_gradient_is_noticed(spoiled: int) -> None:
    """Prevents a check that looks at the output only, or that allows an error of a thousandth."""

    def make(here: Setting, x: attention.Attention) -> object:
        def step() -> list[Tensor]:
            parts = attention.step(x, attention.everything, None)
            parts[spoiled] = parts[spoiled] * 1.001
            return parts

        return step

    assert not attention.check(setting("mta"), make=make, part=attention.everything).passed  # type: ignore[arg-type]


def test_a_wrong_hand_over_between_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a check so short that no block follows another: every long timing would be of an unchecked hand-over."""
    check, right = CONTENDERS["mta/blocked"].check, multi_token.spans
    assert check is not None
    assert check(setting("mta")).passed
    monkeypatch.setattr(multi_token, "spans", lambda n_queries, block, reach: right(n_queries, block, 0))
    assert not check(setting("mta")).passed


def test_the_check_of_the_triton_form_crosses_its_blocks() -> None:
    """Prevents a check of one block where the kernel's own division of rows changes."""
    kernel = pytest.importorskip("recollect.kernels.triton.multi_token")
    here = setting("mta")._replace(heads=512)
    x = attention.inputs(here, attention.crossing(here, attention.entries_of(here, backend="triton")))
    settings = multi_token.Settings(1.0, "both")
    call = kernel.Call(multi_token.Inputs(x.q, x.k, x.v, x.mixing, None, multi_token.Rows(), settings, 0))
    assert len(call.blocks()) >= 2


@pytest.mark.parametrize(("batch", "heads"), [(1, 16), (1, 2), (64, 16), (1, 512)])
def test_the_longer_check_is_of_two_blocks_at_any_size(batch: int, heads: int) -> None:
    """Prevents a batch or a number of heads at which the longer check is one block again, by the rules that the forms divide by."""
    here = setting("mta")._replace(batch=batch, heads=heads)
    for entries, tile, least in ((2**21, 1, 16), (2**22, 32, 32)):
        length = attention.crossing(here, entries)
        assert length > max(least, entries // (batch * heads * length) // tile * tile)


@pytest.mark.parametrize("chunk", [16, 64])
def test_the_floors_operations_are_those_of_the_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a floor of other work than is done, by PyTorch's own counter of what the plain chunks multiply."""
    monkeypatch.setattr(miras, "HEADS", 2)
    spec = miras.perceptron(chunk)
    x = miras.inputs(spec, 128, dtype=torch.float32)
    with FlopCounterMode(display=False) as forward:
        miras.forward(spec, x, "chunked")
    assert forward.get_total_flops() == miras.operations(chunk, 128)
    with FlopCounterMode(display=False) as both:
        miras.step(spec, x, "chunked")
    assert both.get_total_flops() == miras.training_operations(chunk, 128)


def test_an_oracle_that_loses_digits_itself_allows_no_more_than_half_of_them() -> None:
    """Prevents twice a large error of the plain form from passing anything: Memora's token loop is 4e-3 off in fp32."""
    check = CONTENDERS["miras/memora"].check
    assert check is not None
    allowed = check(setting("miras")).allowed
    assert allowed is not None
    assert allowed <= torch.finfo(torch.float32).eps ** 0.5


def test_a_stretched_state_has_the_shapes_of_one_that_was_read() -> None:
    """Prevents timing a decoder on a context shorter than the row says."""
    here = setting("decode")
    for name in ("attention", "mta", "diff"):
        mixer = decoding.build(here, name)
        with torch.inference_mode():
            _, whole = mixer(decoding.text(here, 100))
        made = decoding.context(mixer, here, 100)
        assert [part.shape for _, part in state.leaves(made)] == [part.shape for _, part in state.leaves(whole)]


def test_a_constant_state_has_read_the_whole_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a state of the first tokens only."""
    monkeypatch.setattr(decoding, "PIECE", 16)
    here, seen = setting("decode"), []
    mixer = decoding.build(here, "gla")
    mixer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[1]))
    decoding.context(mixer, here, 100)
    assert sum(seen) == 100 + 1, "and one token to see whether the state grows"


def test_the_post_only_form_is_what_liger_computes() -> None:
    """Prevents kernels that stand a row off: with Liger's operator written out, our step and its step agree."""
    here = setting("mta")
    x = attention.inputs(here, 20).to(torch.float64)

    def operator(scores: Tensor, weight: Tensor, *, padding: tuple[int, int], groups: int) -> Tensor:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -1e9).softmax(-1)
        return torch.nn.functional.conv2d(weights, weight, padding=padding, groups=groups).masked_fill(later, 0)

    with pytest.MonkeyPatch.context() as patch:
        module = type("functional", (), {"liger_multi_token_attention": staticmethod(operator)})
        patch.setattr(attention_peers.importlib, "import_module", lambda name: module)
        theirs = attention_peers.liger_step(x)
    for a, b in zip(theirs, attention.step(x, attention.post_only, "materialized"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_triton_says_that_nobody_has_measured_it() -> None:
    """Prevents numbers of an untried kernel without a word about it, and a CPU on which nothing says that there is one."""
    triton = [key for key in CONTENDERS if "triton" in key]
    assert {"mta/triton", "miras/yaad_triton", "miras/memora_triton", "miras/delta_net_triton"} <= set(triton)
    for key in triton:
        here = setting(key.split("/")[0])
        assert UNMEASURED in CONTENDERS[key].note(here)
        assert missing(CONTENDERS[key], here) == "runs on a GPU only"
    for key in ("miras/gla", "miras/yaad", "train/mta", "decode/delta_net"):
        here = setting(key.split("/")[0])
        assert UNMEASURED in CONTENDERS[key].note(here._replace(device="cuda"))
        assert UNMEASURED not in CONTENDERS[key].note(here)


@pytest.mark.parametrize("name", ["yaad", "gla", "mamba2", "delta_net", "gated_delta_net"])
def test_the_triton_forms_of_memories_are_their_functions(name: str) -> None:
    """Prevents a kernel's contender with the gates of another memory, in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton and its interpreter")
    check = CONTENDERS[f"miras/{name}_triton"].check
    assert check is not None
    assert check(setting("miras")._replace(head_dim=16)).passed


def test_every_peer_is_a_contender_and_leaves_torch_alone() -> None:
    """Prevents install lines for what is not compared, contenders that nobody is told how to install, and a replaced torch."""
    beside = {key for peer in peers.PEERS for key in peer.beside}
    assert beside == {key for key, contender in CONTENDERS.items() if contender.needs}
    for peer in peers.PEERS:
        words = peer.install.split()
        assert words[:2] == ["pip", "install"]
        assert "--no-deps" in words
        assert not {"torch", "triton"} & set(words[2:]) - {peer.module}
        assert {CONTENDERS[key].needs for key in peer.beside} == {(peer.module,)}


@pytest.mark.parametrize("name", decoding.MIXERS)
def test_a_cache_that_is_stretched_is_said_to_be(name: str) -> None:
    """Prevents numbers of a made-up context without a word about it, by what the state does."""
    here = setting("decode")
    mixer = decoding.build(here, name)
    sizes = {state.nbytes(decoding.context(mixer, here, length)) for length in (70, 90)}
    assert (len(sizes) > 1) == (name in ATTENTIONS) == bool(CONTENDERS[f"decode/{name}"].note(here))


@pytest.mark.parametrize("name", ["attention", "mta", "yaad", "moneta", "memora"])
def test_a_model_that_decodes_is_right_and_reads_its_context(name: str) -> None:
    """Prevents a decode benchmark of one layer where a model was asked for, and steps that go on from one and the same cache, which
    would copy it, as nobody's decoding does."""
    here = setting("decode")._replace(layers=2, vocabulary=40)
    contender = CONTENDERS[f"decode/{name}"]
    assert contender.check is not None
    assert contender.check(here).passed
    step = contender.prepare(here, SUITES["decode"].inputs(here, 70))
    assert isinstance(step, decoding.Decoder)
    model, read = decoding.whole(here, name)
    assert len(model.model.layers) == 2
    with torch.inference_mode():
        carried = decoding.context(read, here, 70)
        for _ in range(2):
            assert state.nbytes(carried) == decoding.state_bytes(step)
            out, carried = read(step.token, carried)
            assert out.shape == (here.batch, 1, 40)
            torch.testing.assert_close(step()[0], out)


def test_the_hybrid_convolves_where_mta_does_and_attends_plainly_elsewhere() -> None:
    """Prevents a row "MTA in 6 of 24 layers" of some other model."""
    hybrid = models.layers("mta_hybrid", 24)
    assert [i for i, layer in enumerate(hybrid) if layer["mixer"] == "mta"] == [2, 6, 10, 14, 18, 22]
    assert {layer["mixer"] for layer in hybrid} == {"mta", "attention"}
    deep = setting("train")._replace(layers=24)
    assert "convolutions in 6 of 24 layers, plain attention in the others" in CONTENDERS["train/mta_hybrid"].note(deep)
    assert "convolutions in 6 of 24 layers, head mixing in all" in CONTENDERS["train/mta"].note(deep)


def test_a_chosen_chunk_size_is_that_of_every_memory() -> None:
    """Prevents rows of chunks of 16 under a heading of 64; a delta rule by single tokens stays as it is."""
    train, decode, miras = (setting(suite)._replace(chunk=4) for suite in ("train", "decode", "miras"))
    for name in ("yaad", "moneta", "memora"):
        model = models.build(train, name)
        assert {block.mixer.config.chunk_size for block in model.model.layers} == {4}
        assert decoding.build(decode, name).config.chunk_size == 4  # type: ignore[attr-defined]
        assert memories.PRESETS[name].at(miras).spec.chunk_size == 4
        assert all("chunks of 4" in CONTENDERS[f"{here.suite}/{name}"].note(here) for here in (train, decode, miras))
    assert memories.PRESETS["delta_net"].at(miras).spec.chunk_size == 1


@pytest.mark.parametrize("key", ["miras/yaad", "train/yaad", "decode/yaad"])
def test_the_check_crosses_a_chunk_of_the_chosen_size(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents chunks of 64 that are timed over 8K tokens after a check of 48."""
    lengths: list[int] = []
    for module, name in ((memories, "inputs"), (models, "tokens"), (decoding, "text")):
        drawn = getattr(module, name)
        monkeypatch.setattr(module, name, lambda s, n, *, drawn=drawn, **more: lengths.append(n) or drawn(s, n, **more))
    check = CONTENDERS[key].check
    assert check is not None
    assert check(setting(key.split("/")[0])._replace(chunk=40)).passed
    assert max(lengths) >= 60


def test_a_training_step_moves_the_parameters() -> None:
    """Prevents a training step without its optimiser."""
    here = setting("train")
    step = training.prepare(here, models.tokens(here, 12), name="attention")
    before = [part.detach().clone() for part in step.model.parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
