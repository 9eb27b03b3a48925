"""What a scan refuses: states, gates and parameters that do not fit, before a kernel reads beyond their end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import recollect
from recollect import presets
from recollect.ops.miras import MirasSpec, MirasState, Parameters, initial_state, scan

B, T, H, K = 3, 9, 2, 8
BACKENDS = (None, "chunked", "sequential")


def inputs(n_rows: int = B, width: int = K) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.nn.functional.normalize(torch.randn(n_rows, T, H, width), dim=-1) for _ in range(3))
    return q, k, v


def gates(spec: MirasSpec, n_rows: int = B) -> dict[str, Tensor]:
    found = {"eta": torch.full((n_rows, T, H), 0.05)}
    return found | {name: torch.ones(n_rows, T, H) for name in spec.bias.gates}


def state_of(spec: MirasSpec, n_rows: int = B, width: int = K) -> MirasState:
    return scan(spec, *inputs(n_rows, width), gates(spec, n_rows), parameters=spec.memory.init(H, width, width))[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_rows", [1, 64])
def test_a_state_of_another_batch_is_refused(backend: str | None, n_rows: int) -> None:
    """Prevents a compiled kernel that reads and writes beyond a state of fewer rows, and rows that vanish silently."""
    spec = presets.ttt_mlp()
    with pytest.raises(ValueError, match=f"state has {n_rows} batch rows, q has {B}"):
        scan(spec, *inputs(), gates(spec), state_of(spec, n_rows), parameters=spec.memory.init(H, K, K), backend=backend)


def test_a_mixers_state_of_another_batch_is_refused() -> None:
    """Prevents memory corruption through the public layer, which has no convolution here that would refuse first."""
    mixer = recollect.build("yaad", dim=32, n_heads=2, conv_width=None)
    x = torch.randn(3, 20, 32)
    _, state = mixer(x[:1])
    with pytest.raises(ValueError, match="batch rows"):
        mixer(x, state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_of_another_width_spec_or_precision_is_refused(backend: str | None) -> None:
    """Prevents states of another key dim, of a spec without an open chunk, or of another precision from being read as this one's."""
    spec = presets.ttt_mlp()
    parameters = spec.memory.init(H, K, K)
    wrong = {
        "state.dual is of shapes": state_of(spec, width=16),
        "state.anchor is of shapes": state_of(presets.ttt_mlp(chunk_size=1)),
        "computes in torch.float32": _double(state_of(spec)),
    }
    for message, state in wrong.items():
        with pytest.raises(ValueError, match=message):
            scan(spec, *inputs(), gates(spec), state, parameters=parameters, backend=backend)


def _double(state: MirasState) -> MirasState:
    assert state.anchor is not None
    return state._replace(dual=tuple(x.double() for x in state.dual), anchor=tuple(x.double() for x in state.anchor))


@pytest.mark.parametrize("kind", ["coordinate", "norm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_threshold_of_other_channels_is_refused(kind: str, backend: str | None) -> None:
    """Prevents a threshold that belongs to other channels from being read beyond its end, or silently averaged."""
    spec = presets.yaad(kind=kind)
    wrong = gates(spec) | {"delta": torch.ones(B, T, H, 3)}
    with pytest.raises(ValueError, match=r"gate 'delta' has one number per head or per value channel \(8\); got 3 channels"):
        scan(spec, *inputs(), wrong, parameters=spec.memory.init(H, K, K), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slow_parameters_of_another_shape_are_refused(backend: str | None) -> None:
    """Prevents a norm's scale that is too short from being read beyond its end."""
    spec = presets.yaad()
    fast, slow = spec.memory.init(H, K, K)
    with pytest.raises(ValueError, match="slow ones of"):
        scan(spec, *inputs(), gates(spec), parameters=Parameters(fast, tuple(x[:, :3] for x in slow)), backend=backend)


@pytest.mark.parametrize("make", [presets.retnet, presets.gated_delta_net, presets.yaad, presets.memora, presets.titans])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_of_zero_have_finite_gradients(make: Callable[[], MirasSpec], backend: str | None) -> None:
    """Prevents alpha = 0 (forget everything) from turning every gradient into NaN through its logarithm."""
    spec = make()
    alpha = torch.full((B, T, H), 0.9)
    alpha[:, 4] = 0
    alpha.requires_grad_()
    given = gates(spec) | {"alpha": alpha} | ({"momentum": alpha} if spec.rule.momentum else {})
    parameters = spec.memory.init(H, K, K) if spec.memory.initial_std else None
    y, _ = scan(spec, *inputs(), given, parameters=parameters, backend=backend)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert alpha.grad is not None
    assert torch.isfinite(alpha.grad).all()
    assert alpha.grad.abs().sum() > 0


@pytest.mark.parametrize("memory", ["mlp", "gated_mlp", "matrix"])
@pytest.mark.parametrize("beta", [0.01, 1e-3])
def test_a_coupled_decay_below_the_layers_own_floor_is_finite(memory: str, beta: float) -> None:
    """Prevents a layer that promises a bound on decays which its retention, that derives them from eta, does not keep."""
    retention = {"name": "l2_coupled", "beta": beta}
    mixer = recollect.build("miras", dim=64, n_heads=2, memory=memory, retention=retention, bias="value_shift", chunk_size=64)
    assert torch.isfinite(mixer(torch.randn(1, 128, 64))[0]).all()


def test_initial_state_of_several_steps_is_that_of_the_scan() -> None:
    """Prevents `initial_state` from taking the steps of a token for channels of a gate."""
    spec = presets.delta_product(2)
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, 2, H, K), torch.randn(B, T, 2, H, K)
    given = {"eta": torch.full((B, T, 2, H), 0.3)}
    state = initial_state(spec, q, k, v, given)
    torch.testing.assert_close(scan(spec, q, k, v, given, state)[0], scan(spec, q, k, v, given)[0])


def test_chunks_of_several_steps_count_tokens() -> None:
    """Prevents a chunk from ending inside a token."""
    from recollect.ops.miras.biases import l2
    from recollect.ops.miras.memories import mlp
    from recollect.ops.miras.retentions import l2 as decay
    from recollect.ops.miras.rules import multi_step

    spec = MirasSpec(memory=mlp(), bias=l2(), retention=decay(), rule=multi_step(2), chunk_size=4)
    q, k, v = torch.randn(B, 3, H, K), torch.randn(B, 3, 2, H, K), torch.randn(B, 3, 2, H, K)
    _, state = scan(spec, q, k, v, {"eta": torch.full((B, 3, 2, H), 0.01)}, parameters=spec.memory.init(H, K, K))
    assert state.phase.tolist() == [6] * B  # three of four tokens, two steps each


@pytest.mark.parametrize("make", [presets.longhorn, presets.mesa, presets.gsa])
def test_a_backend_that_closed_forms_lack_is_refused(make: Callable[[], MirasSpec]) -> None:
    """Prevents "native" from being unknown to some specs and ignored by others: it is known, and cannot run them."""
    spec = make()
    with pytest.raises(RuntimeError, match="backend 'native' cannot run"):
        scan(spec, *inputs(), {}, backend="native")


@pytest.mark.parametrize("make", [presets.gsa, presets.softmax_attention])
def test_gates_that_nothing_reads_are_refused(make: Callable[[], MirasSpec]) -> None:
    """Prevents a step size from being accepted by memories that take none."""
    with pytest.raises(ValueError, match="has no gate 'eta'"):
        scan(make(), *inputs(), {"eta": torch.ones(B, T, H)})
