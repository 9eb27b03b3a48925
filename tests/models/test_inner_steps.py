"""`set_inner_steps`: one share of the inner step size for every memory of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recollect.mixers import build
from recollect.mixers.miras import Miras
from recollect.models import RecollectConfig, RecollectForCausalLM, set_inner_steps
from tests.laws import assert_bitwise, assert_near, maker, sequence

DIM, N_HEADS, LENGTH = 16, 2, 21
NAMES = ["miras", "moneta", "yaad", "memora", "titans", "ttt_linear", "ttt_mlp", "omega", "atlas"]


def miras(name: str = "yaad", **options: Any) -> Miras:
    mixer = maker(name, dim=DIM, n_heads=N_HEADS, **options)()
    assert isinstance(mixer, Miras)
    return mixer


def output(mixer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return mixer(x)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_share_multiplies_the_step_and_nothing_else(name: str) -> None:
    """Prevents a warm-up that also moves what is kept, a threshold or a momentum."""
    mixer, x = miras(name), sequence(2, 5)
    before = mixer.gates(x)
    set_inner_steps(mixer, 0.25)
    after = mixer.gates(x)
    assert set(after) == set(before)
    for gate, values in after.items():
        assert_near(values, before[gate] * (0.25 if gate == "eta" else 1.0), 1e-15, gate)


@pytest.mark.parametrize("name", NAMES)
def test_the_share_is_a_smaller_eta_base(name: str) -> None:
    """Prevents a share that a compiled or chunked scan does not see."""
    mixer, x = miras(name), sequence(2, LENGTH)
    other = miras(name, eta_base=0.3 * mixer.eta_base)
    set_inner_steps(mixer, 0.3)
    assert_near(output(mixer, x), output(other, x), 1e-12, "y")


@pytest.mark.parametrize("name", ["miras", "titans", "ttt_mlp", "atlas"])
def test_at_zero_nothing_is_written(name: str) -> None:
    """Prevents a first step of training on what random maps have written: only the token itself is seen, through its convolution."""
    mixer, x = miras(name, conv_width=None, rope_theta=None, retention="none"), sequence(1, LENGTH)
    set_inner_steps(mixer, 0.0)
    alone = torch.cat([output(mixer, x[:, t : t + 1]) for t in range(LENGTH)], dim=1)
    assert_near(output(mixer, x), alone, 1e-12, "every token alone")


def test_the_share_stays_until_the_next_call_and_can_come_back() -> None:
    """Prevents a share that accumulates from step to step of a warm-up, or that one forward pass uses up."""
    mixer, x = miras(), sequence(1, LENGTH)
    full = output(mixer, x)
    for share in (0.5, 0.1, 0.5):
        set_inner_steps(mixer, share)
    half = output(mixer, x)
    assert_bitwise(output(mixer, x), half, "a second pass")
    assert (half - full).abs().max() > 1e-3
    set_inner_steps(mixer, 1.0)
    assert_bitwise(output(mixer, x), full, "the whole step again")


def test_every_memory_of_a_model_and_no_other_layer() -> None:
    """Prevents a model of which some layers stay at their old step, and layers without a memory that break."""
    layers = ["yaad", "attention", "titans"]
    model = RecollectForCausalLM(
        RecollectConfig(
            vocab_size=11, hidden_size=DIM, num_attention_heads=N_HEADS, layers=[{"mixer": name} for name in layers]
        )
    )
    set_inner_steps(model, 0.5)
    memories = [module for module in model.modules() if isinstance(module, Miras)]
    assert [memory.step_share for memory in memories] == [0.5, 0.5]
    set_inner_steps(build("attention", dim=DIM, n_heads=N_HEADS), 0.5)  # nothing to do


def test_the_share_is_not_saved() -> None:
    """Prevents a model that was saved in the middle of its warm-up and writes less ever after."""
    mixer = miras()
    set_inner_steps(mixer, 0.1)
    assert not any("share" in name for name in mixer.state_dict())
    other = build("yaad", dim=DIM, n_heads=N_HEADS).double()
    other.load_state_dict(mixer.state_dict())
    assert other.step_share == 1.0
