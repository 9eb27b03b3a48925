"""Every law over every registered mixer and every variant."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from recollect.mixers import MIXERS, available, build, layer_options, register
from recollect.mixers.base import Mixer, MixerConfig
from tests.laws import DIM, LAWS, N_HEADS, Maker
from tests.subjects import subjects

SUBJECTS = subjects()
# What a subject is defined not to do: a token that sees itself alone reads no past, and its weight is 1 whatever q and k are.
EXEMPT = {("attention, window of one", "law_reads_the_past"), ("attention, window of one", "law_every_parameter_matters")}


@pytest.mark.parametrize(("subject", "law"), [pair for pair in itertools.product(SUBJECTS, LAWS) if pair not in EXEMPT])
def test_law(subject: str, law: str) -> None:
    """Prevents every bug that the law's docstring names, in this mixer."""
    LAWS[law](SUBJECTS[subject])


# --- construction -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", available())
def test_initialisation_is_a_function_of_the_seed(name: str) -> None:
    """Prevents runs that cannot be reproduced, and seeds that change nothing."""

    def parameters(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(build(name, dim=DIM, n_heads=N_HEADS).parameters())

    assert all(torch.equal(a, b) for a, b in zip(parameters(3), parameters(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters(3), parameters(4), strict=True))


@pytest.mark.parametrize("name", available())
def test_a_fresh_mixer_is_finite_and_keeps_the_scale(name: str) -> None:
    """Prevents uninitialised memory and starts that explode or vanish: output std within a factor 30 of the input's."""
    y, _ = build(name, dim=64, n_heads=4)(torch.randn(2, 32, 64))
    assert torch.isfinite(y).all()
    assert 1 / 30 < y.std() < 30


def gradient_size(name: str, length: int, **options: object) -> float:
    """Of a fresh mixer's parameters, through outputs for two texts that repeat common words, as texts do."""
    draw = torch.Generator().manual_seed(0)
    words, weights = torch.randn(40, 64, generator=draw), 1 / torch.arange(1.0, 41.0)
    text = words[torch.multinomial(weights, 2 * 512, replacement=True, generator=draw).view(2, 512)]
    wanted = torch.randn(2, 512, 64, generator=draw)
    mixer = build(name, dim=64, n_heads=2, **options)
    y, _ = mixer(text[:, :length])
    (y * wanted[:, :length]).mean().backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in mixer.parameters() if p.grad is not None]))


@pytest.mark.parametrize("name", available())
def test_the_gradient_does_not_grow_with_the_text(name: str) -> None:
    """Prevents memories that learn chaotically: recall of random keys may be perfect, and training on text then hopeless."""
    assert gradient_size(name, 512) < 2 * gradient_size(name, 64)


@pytest.mark.parametrize("bias", ["l1", "lp", "l_infinity", "huber", "pseudo_huber", "value_shift"])
def test_the_gradient_does_not_grow_with_any_bias(bias: str) -> None:
    """The largest steps that are safe with l2 are not with every bias."""
    assert gradient_size("miras", 512, bias=bias) < 4 * gradient_size("miras", 64, bias=bias)


def test_the_gradient_of_a_chaotic_memory_does() -> None:
    """The test above sees what it is there for: signs of single channels push a normalised output from corner to corner."""
    chaotic = {"bias": "huber", "eta_base": 0.2}
    assert gradient_size("yaad", 512, **chaotic) > 100 * gradient_size("yaad", 64, **chaotic)


@pytest.mark.parametrize("name", available())
def test_builds_on_the_meta_device(name: str) -> None:
    """Prevents initialisation that needs memory: parameters of large models are counted without allocating them."""
    with torch.device("meta"):
        mixer = build(name, dim=4096, n_heads=32)
    here = build(name, dim=DIM, n_heads=N_HEADS)
    assert all(parameter.is_meta for parameter in mixer.parameters())
    assert [key for key, _ in mixer.named_parameters()] == [key for key, _ in here.named_parameters()]


@pytest.mark.parametrize("name", available())
def test_layer_pattern_builds(name: str) -> None:
    """Prevents depth patterns that the config refuses."""
    layers = layer_options(name, 6)
    assert [layer.pop("mixer") for layer in layers] == [name] * 6
    for depth, options in enumerate(layers):
        assert isinstance(build(name, dim=DIM, n_heads=N_HEADS, **{"layer": depth, **options}), Mixer)


@pytest.mark.parametrize("name", available())
def test_registry_entry_says_what_it_is(name: str) -> None:
    """Prevents rows of `recollect list` and the README's table without content."""
    entry = MIXERS[name]
    assert entry.summary
    assert entry.source.startswith(("arXiv ", "microsoft/", "https://"))
    assert any(word in entry.state for word in ("per token", "constant"))


@pytest.mark.parametrize("name", available())
def test_the_state_grows_as_declared(name: str) -> None:
    """Prevents a declared constant state that grows, and a declared growth that does not happen."""
    mixer = build(name, dim=DIM, n_heads=N_HEADS)
    from recollect.state import nbytes

    sizes = [nbytes(mixer(torch.randn(1, length, DIM))[1]) for length in (200, 300)]
    grows = "constant" not in MIXERS[name].state
    assert (sizes[1] > sizes[0]) == grows, (sizes, MIXERS[name].state)


# --- errors -----------------------------------------------------------------------------------------------------------------


def test_unknown_mixer_names_the_nearest() -> None:
    """Prevents a bare KeyError for a typo."""
    with pytest.raises(ValueError, match=r"unknown mixer 'atention'; did you mean 'attention'\? Known mixers: .*mta"):
        build("atention", dim=DIM, n_heads=N_HEADS)


@pytest.mark.parametrize("name", available())
def test_unknown_option_names_the_nearest(name: str) -> None:
    """Prevents options that are silently ignored."""
    with pytest.raises(ValueError, match=rf"'{name}' has no option 'layr'; did you mean 'layer'\? Its options: .*n_heads"):
        build(name, dim=DIM, n_heads=N_HEADS, layr=1)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"dim": 0}, "must be positive; got dim=0"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"layer": -1}, "0-based depth; got -1"),
    ],
    ids=["dim", "n_heads", "layer"],
)
def test_impossible_sizes_are_named(name: str, bad: dict[str, int], message: str) -> None:
    """Prevents a ZeroDivisionError, or a mixer that fails at its first call."""
    with pytest.raises(ValueError, match=message):
        build(name, **{"dim": DIM, "n_heads": N_HEADS, **bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention", {"n_heads": 3}, "n_heads must divide dim: dim=16, n_heads=3"),
        ("attention", {"n_heads": 16}, "even head dim; got 1"),
        ("attention", {"n_kv_heads": 3}, "n_kv_heads must divide n_heads: n_heads=4, n_kv_heads=3"),
        ("attention", {"n_kv_heads": 0}, "n_kv_heads must divide"),
        ("attention", {"window": 0}, "at least 1; got 0"),
        ("attention", {"dropout": 1.0}, r"dropout lies in \[0, 1\); got 1.0"),
        ("diff", {"n_heads": 1}, "even"),
        ("mta", {"c_k": 4}, "c_k must be odd; got 4"),
        ("mta", {"c_q": 0}, "c_q and c_k are at least 1"),
        ("mta", {"c_h": 3}, "c_h must divide n_heads: c_h=3, n_heads=4"),
        ("mta", {"pad_key": "middle"}, "pad_key"),
        ("mta", {"norm": "layer"}, "norm is one of none, rms, depth, gate, vector_gate; got 'layer'"),
        ("mta", {"init": "ones"}, "init is one of identity, .*; got 'ones'"),
        ("mta", {"backend": "fastest"}, "backend"),
    ],
)
def test_options_that_cannot_be_are_named(name: str, options: dict[str, object], message: str) -> None:
    """Prevents a wrong option from surfacing as a shape error inside the first call."""
    with pytest.raises(ValueError, match=message):
        build(name, **{"dim": DIM, "n_heads": N_HEADS, **options})  # type: ignore[arg-type]


def test_a_name_is_registered_once() -> None:
    """Prevents a user's module from silently replacing a mixer, or a preset from naming an option that does not exist."""
    words = {"summary": "-", "source": "-", "state": "-"}

    class Other(Mixer):
        pass

    with pytest.raises(ValueError, match=r"'attention' is already registered by recollect\.mixers"):
        register("attention", config=MixerConfig, **words)(Other)  # type: ignore[type-abstract]
    with pytest.raises(ValueError, match="'other' has no option 'windw'"):
        register("other", config=MixerConfig, options={"windw": 1}, **words)(Other)  # type: ignore[type-abstract]
    assert "other" not in available()


def test_a_registered_mixer_is_found_by_every_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a law suite that runs over a fixed list: a mixer registered here appears among the subjects."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class EchoConfig(MixerConfig):
        pass

    class Echo(Mixer):
        def reset_parameters(self) -> None:
            pass

        def init_state(self, batch_size: int) -> tuple[()]:
            return ()

        def forward(self, x, state=None, *, mask=None, document_ids=None):  # type: ignore[no-untyped-def]
            return x, ()

    monkeypatch.setattr("recollect.mixers.base.MIXERS", dict(MIXERS))
    register("echo", config=EchoConfig, summary="-", source="-", state="constant")(Echo)
    found: dict[str, Maker] = subjects()
    assert "echo" in found
    LAWS["law_split"](found["echo"])
    with pytest.raises(AssertionError):
        LAWS["law_reads_the_past"](found["echo"])
