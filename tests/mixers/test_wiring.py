"""Memory as a gate and as a layer: the equations, the branches that are wired, and what is refused. The laws run over both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recollect import state as states
from recollect.mixers import build
from recollect.mixers.attention import Attention
from recollect.mixers.wiring import Wiring
from tests.laws import DIM, EXACT, LAWS, N_HEADS, assert_near, maker, sequence

# A memory that is cheap and of which the attention branch differs.
CHEAP = {"memory": "gated_delta_net", "window": 3}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def randomised(name: str, **options: object) -> Wiring:
    mixer = maker(name, **{**CHEAP, **options})()
    assert isinstance(mixer, Wiring)
    return mixer


def test_memory_as_gate_matches_its_equation() -> None:
    """arXiv 2501.00663, Eq. 28: attention and memory, both normalised with learned weights, the one gated by the other."""
    mixer, x = randomised("memory_as_gate"), sequence(2, 9)
    assert mixer.memory_norm is not None
    attended, remembered = mixer.attention(x)[0], mixer.memory(x)[0]
    gate = 1 / (1 + torch.exp(-rms(remembered, mixer.memory_norm.weight)))
    assert_near(mixer(x)[0], rms(attended, mixer.attention_norm.weight) * gate, EXACT, "y")


def test_memory_as_layer_matches_its_equation() -> None:
    """arXiv 2501.00663, Eq. 30-31 with a residual around each: the attention reads what the memory has added."""
    mixer, x = randomised("memory_as_layer"), sequence(2, 9)
    remembered = mixer.memory(x)[0]
    attended = mixer.attention(rms(x + remembered, mixer.attention_norm.weight))[0]
    assert_near(mixer(x)[0], remembered + attended, EXACT, "y")


@pytest.mark.parametrize("name", ["memory_as_gate", "memory_as_layer"])
def test_the_memory_reaches_beyond_the_window(name: str) -> None:
    """Prevents a wiring whose memory branch is decoration: y_20 depends on x_0 through it, and not without it."""
    x = sequence(1, 21)
    changed = x.clone()
    changed[:, 0] += 1.0

    def effect(**options: object) -> float:
        mixer = randomised(name, **options)
        return float((mixer(changed)[0] - mixer(x)[0])[:, 20].abs().max().detach())

    assert effect() > 1e-8
    assert effect(memory="sliding_window", memory_options={"window": 2}) == 0.0


@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("name", ["memory_as_gate", "memory_as_layer"])
def test_any_two_mixers_can_be_wired(name: str, law: str) -> None:
    """The laws hold whatever the branches are: attention of another kind, a memory that is attention itself."""
    LAWS[law](maker(name, memory="sliding_window", memory_options={"window": 7}, attention="diff", window=None))


def test_options_reach_their_branch() -> None:
    """Prevents an option of one branch from being lost or given to the other; the depth reaches both."""
    mixer = build(
        "memory_as_gate",
        dim=DIM,
        n_heads=N_HEADS,
        layer=3,
        memory="attention",
        window=4,
        memory_options={"rope_theta": 1e4},
        attention_options={"n_kv_heads": 2},
    )
    assert isinstance(mixer, Wiring)
    assert isinstance(mixer.attention, Attention)
    assert isinstance(mixer.memory, Attention)
    assert (mixer.attention.config.window, mixer.memory.config.window) == (4, None)
    assert (mixer.attention.config.n_kv_heads, mixer.memory.config.n_kv_heads) == (2, None)
    assert (mixer.attention.config.rope_theta, mixer.memory.config.rope_theta) == (1e5, 1e4)
    assert (mixer.attention.config.layer, mixer.memory.config.layer) == (3, 3)
    names = {name.split(".")[0] for name, _ in states.leaves(mixer(torch.randn(1, 3, DIM))[1])}
    assert names == {"attention", "memory"}


@pytest.mark.parametrize("name", ["memory_as_gate", "memory_as_layer"])
def test_maps_are_those_of_the_attention_branch_in_place(name: str) -> None:
    """Prevents pictures of attention over something the branch never reads."""
    mixer, x = randomised(name, attention="attention", window=None), sequence(1, 6)
    seen: list[Tensor] = []
    handle = mixer.attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mixer(x)
    handle.remove()
    assert_near(mixer.maps(x)["attention"], mixer.attention.maps(seen[0])["attention"], EXACT, "map")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "titan"}, "memory branch: unknown mixer 'titan'; did you mean 'titans'"),
        ({"attention": "mta_v3"}, "attention branch: unknown mixer 'mta_v3'; did you mean 'mta_v"),
        ({"window": 0}, "attention branch: window counts the keys"),
        ({"attention": "mta", "window": 3}, "attention branch: mixer 'mta' has no option 'window'"),
        ({"memory_options": {"windw": 3}, "memory": "attention"}, "memory branch: .* did you mean 'window'"),
        ({"wiring": "context"}, "wiring is one of gate, layer; got 'context'"),
        ({"memory": "moneta-h"}, "memory branch: 'moneta-h' names the layers of a whole model"),
    ],
)
def test_impossible_branches_are_refused(options: dict[str, object], message: str) -> None:
    """With the branch named, before a parameter is allocated."""
    with pytest.raises(ValueError, match=message):
        build("memory_as_gate", dim=DIM, n_heads=N_HEADS, **options)
