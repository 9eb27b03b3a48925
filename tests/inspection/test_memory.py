"""What the page says of a memory equals what autograd, brute force and the layer's own states say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recollect.inspection import recording
from recollect.inspection.memory import chosen_reads, remember
from recollect.inspection.recording import recorded
from recollect.mixers import available, build
from recollect.ops.miras import MirasSpec, scan
from recollect.ops.miras.memories import dense
from tests.subjects import SMALL

LENGTH = 22
MIRAS = ("titans", "moneta", "yaad", "memora", "ttt_linear", "ttt_mlp", "omega")


def layer(name: str, **options):
    """A mixer in fp64 whose parameters are not as they start, and an input."""
    mixer = build(name, **{"dim": 16, "n_heads": 2, **SMALL.get(name, {}), **options}).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer, torch.randn(1, LENGTH, 16, dtype=torch.float64)


def strips(mixer, x: Tensor) -> dict[str, Tensor]:
    return {one.key: one.values.double() for one in remember(mixer, x).strips}


def call_of(mixer, x: Tensor) -> dict:
    with torch.no_grad(), recorded(mixer) as calls:
        mixer(x)
    (call,) = calls
    return call.arguments


def autograd_norms(spec: MirasSpec, given: dict) -> tuple[Tensor, Tensor]:
    """Norms [H, T] of the gradients of the bias' loss, by autograd at the anchor of the token-by-token form."""
    parameters, state = given["parameters"], None
    of_prediction, of_memory = [], []
    for t in range(LENGTH):
        now = {name: given[name][:, t : t + 1] for name in "qkv"}
        gates = {name: gate[:, t : t + 1] for name, gate in given["gates"].items()}
        _, after = scan(spec, *now.values(), gates, state, parameters=parameters, backend="sequential")
        anchor = parameters.fast if state is None else state.anchor
        duals = [z.detach().expand(1, *z.shape[-3:]) for z in anchor]
        weights = [spec.retention.link(z, w) for z, w in zip(duals, parameters.fast, strict=True)]
        weights = [w.detach().requires_grad_() for w in weights]
        prediction = spec.memory.read(dense(weights), parameters.slow, now["k"].transpose(1, 2))
        prediction.retain_grad()
        extra = {name: gates[name].transpose(1, 2) for name in spec.bias.gates}
        spec.bias.loss(prediction, now["v"].transpose(1, 2), **extra).sum().backward()
        of_prediction.append(prediction.grad[0, :, 0].norm(dim=-1))
        of_memory.append(torch.stack([w.grad[0].flatten(1).square().sum(-1) for w in weights]).sum(0).sqrt())
        state = after
    return torch.stack(of_prediction, dim=1), torch.stack(of_memory, dim=1)


@pytest.mark.parametrize("name", MIRAS)
def test_surprise_of_a_miras_layer_equals_autograd(name: str) -> None:
    """Prevents gradients at another memory than the layer's own gradient point, and forgotten norms, residuals or thresholds."""
    mixer, x = layer(name)
    found, given = strips(mixer, x), call_of(mixer, x)
    of_prediction, of_memory = autograd_norms(given["spec"], given)
    torch.testing.assert_close(found["surprise"], of_prediction, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["gradient"], of_memory, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [
    {"memory": "matrix", "chunk_size": 4},
    {"memory": "matrix", "chunk_size": 1, "bias": "l1"},
    {"memory": "matrix", "chunk_size": 1, "gradient_at": "decayed"},
    {"memory": "mlp", "chunk_size": 1, "gradient_at": "decayed"},
    {"memory": "vector", "chunk_size": 4, "bias": "pseudo_huber"},
    {"memory": "gated_mlp", "chunk_size": 3, "retention": "elastic_net"},
], ids=str)  # fmt: skip
def test_surprise_of_other_choices_equals_autograd(options) -> None:
    """Prevents a way of computing that holds for the presets alone: one token a chunk, gradients after the decay, other memories."""
    mixer, x = layer("miras", **options)
    found, given = strips(mixer, x), call_of(mixer, x)
    spec, parameters, gates = given["spec"], given.get("parameters"), given["gates"]
    slow = () if parameters is None else parameters.slow
    state, expected = None, []
    for t in range(LENGTH):
        now = [given[name][:, t : t + 1] for name in "qkv"]
        some = {name: gate[:, t : t + 1] for name, gate in gates.items()}
        start = [torch.zeros(1, 2, 8, 8).double()] if parameters is None else [z[None] for z in parameters.fast]
        anchor = start if state is None else state.dual if state.anchor is None else state.anchor
        if spec.gradient_at == "decayed":
            alpha = some["log_alpha"][:, 0].exp()  # channels of the input for the first matrix, of the output for the last
            factors = [alpha[:, :, None], alpha[..., None]]
            anchor = [z * a for z, a in zip(anchor, factors, strict=False)]
        weights = [z if parameters is None else spec.retention.link(z, w)
                   for z, w in zip(anchor, [None] if parameters is None else parameters.fast, strict=True)]  # fmt: skip
        prediction = spec.memory.read(dense(weights, diagonal=spec.memory.diagonal), slow, now[1].transpose(1, 2))
        leaf = prediction.detach().requires_grad_()
        extra = {name: some[name].transpose(1, 2) for name in spec.bias.gates}
        spec.bias.loss(leaf, now[2].transpose(1, 2), **extra).sum().backward()
        expected.append(leaf.grad[0, :, 0].norm(dim=-1))
        _, state = scan(spec, *now, some, state, parameters=parameters, backend="sequential")
    torch.testing.assert_close(found["surprise"], torch.stack(expected, dim=1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "delta_product"])
def test_surprise_of_the_delta_rule_equals_brute_force(name: str) -> None:
    """Prevents the error against the memory after the write, before its decay, or of another step."""
    mixer, x = layer(name)
    found, given = strips(mixer, x), call_of(mixer, x)
    k, v, eta = given["k"], given["v"], given["gates"]["eta"]
    if k.dim() == 4:
        k, v, eta = k.unsqueeze(2), v.unsqueeze(2), eta.unsqueeze(2)
    alpha = given["gates"]["log_alpha"].exp() if "log_alpha" in given["gates"] else torch.ones(1, LENGTH, 2).double()
    memory = torch.zeros(2, v.shape[-1], k.shape[-1]).double()
    surprise, norms = torch.zeros(2, LENGTH).double(), torch.zeros(2, LENGTH).double()
    for t in range(LENGTH):
        memory = memory * alpha[0, t, :, None, None]
        for n in range(k.shape[2]):
            error = torch.einsum("hvk,hk->hv", memory, k[0, t, n]) - v[0, t, n]
            surprise[:, t] += error.square().sum(-1)
            memory = memory - eta[0, t, n, :, None, None] * error[:, :, None] * k[0, t, n, :, None, :]
        norms[:, t] = memory.flatten(1).norm(dim=-1)
    torch.testing.assert_close(found["surprise"], surprise.sqrt(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["memory"], norms, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["eta"], eta[0].mean(1).T, rtol=1e-5, atol=1e-7)


def test_surprise_of_least_squares_equals_a_solve() -> None:
    """Prevents the fit after the token from being asked about the token itself."""
    mixer, x = layer("mesa")
    found, given = strips(mixer, x), call_of(mixer, x)
    k, v, eta, kept = given["k"][0], given["v"][0], given["eta"][0], given["log_decay"][0].exp()
    outer, gram = torch.zeros(2, 8, 8).double(), torch.zeros(2, 8, 8).double()
    for t in range(LENGTH):
        fitted = outer @ torch.linalg.inv(gram + torch.diag_embed(given["ridge"]))
        error = torch.einsum("hvk,hk->hv", fitted, k[t]) - v[t]
        torch.testing.assert_close(found["surprise"][:, t], error.norm(dim=-1), rtol=1e-5, atol=1e-6)
        outer = kept[t][:, None, None] * outer + eta[t][:, None, None] * v[t][:, :, None] * k[t][:, None]
        gram = kept[t][:, None, None] * gram + eta[t][:, None, None] * k[t][:, :, None] * k[t][:, None]
    torch.testing.assert_close(found["memory"][:, -1], outer.flatten(1).norm(dim=-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["gla", "retnet", "mamba2", "rwkv7", "longhorn", "titans", "yaad", "gsa", "mamba"])
def test_memory_norm_is_that_of_the_states(name: str) -> None:
    """Prevents a norm of the anchor, of one matrix of several, or of the token before."""
    mixer, x = layer(name)
    (one,) = [one for one in remember(mixer, x).strips if one.key == "memory"]
    ends = range(LENGTH) if one.measured is None else one.measured
    for t in ends:
        with torch.no_grad():
            memory = mixer(x[:, : t + 1])[1].memory
        parts = (memory,) if isinstance(memory, Tensor) else memory.dual
        size = sum(part[0].square().flatten(1).sum(-1) for part in parts).sqrt()
        size = size.square().sum().sqrt()[None] if name == "mamba" else size
        torch.testing.assert_close(one.values[:, t].double(), size, rtol=1e-5, atol=1e-7)
    if one.measured is not None:
        assert one.values[:, : ends[0]].isnan().all()
        assert torch.equal(one.values[:, ends[0] + 1], one.values[:, ends[0]])


@pytest.mark.parametrize(
    "name", ["delta_net", "gated_delta_net", "gla", "retnet", "gsa", "rwkv7", "mamba2", "mesa", "linear_attention"]
)
def test_weights_of_a_linear_memory_rebuild_its_reads(name: str) -> None:
    """Prevents "exact weights" that are none: sum over s of weight(t, s) v_s must be the read itself."""
    mixer, x = layer(name)
    reads = remember(mixer, x).reads
    given = call_of(mixer, x)
    run = recording.OPS["least_squares_scan" if name == "mesa" else "scan"]
    with torch.no_grad():
        y = run(**given)[0][0]
    assert reads is not None
    assert reads.queries[-1] == LENGTH - 1
    for n, t in enumerate(reads.queries):
        rebuilt = torch.einsum("hs,shv->hv", reads.values[:, n].double(), given["v"][0])
        torch.testing.assert_close(rebuilt, y[t], rtol=1e-4, atol=1e-5)
        assert reads.values[:, n, t + 1 :].abs().max() == 0 if t + 1 < LENGTH else True


def test_read_slopes_of_a_deep_memory_equal_its_jacobian() -> None:
    """Prevents gradients summed over heads or over reads."""
    mixer, x = layer("titans")
    reads, given = remember(mixer, x, n_reads=2).reads, call_of(mixer, x)
    given = {name: part.detach() if isinstance(part, Tensor) else part for name, part in given.items()}
    jacobian = torch.autograd.functional.jacobian(lambda v: scan(**{**given, "v": v})[0][0], given["v"])[..., 0, :, :, :]
    with torch.no_grad():
        y = scan(**given)[0][0]
    assert reads is not None
    for n, t in enumerate(reads.queries):
        for h in range(2):
            along = torch.einsum("v,vsw->sw", y[t, h] / y[t, h].norm(), jacobian[t, h, :, :, h])
            torch.testing.assert_close(reads.values[h, n].double(), along.norm(dim=-1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in available() if not name.startswith("memory_as")])
def test_every_mixer_shows_something_or_says_why(name: str) -> None:
    """Prevents a mixer that cannot be looked into from ending the command, and silence about what is missing."""
    mixer, x = layer(name)
    found = remember(mixer, x)
    keys = [one.key for one in found.strips]
    assert keys
    assert len(set(keys)) == len(keys)
    assert all(one.values.shape[1] == LENGTH and one.values.shape == found.strips[0].values.shape for one in found.strips)
    assert found.reads is not None
    assert found.reads.values.isfinite().all()
    said = " ".join(found.missing)
    if keys != ["output"]:
        assert ("surprise" in keys) != ("Surprise" in said)
        assert ("eta" in keys) != ("Write strength" in said)
        assert ("alpha" in keys) != ("Retention" in said)


def test_recording_leaves_the_modules_as_they_were() -> None:
    """Prevents later calls of a layer from going through a wrapper, even after an error."""
    import recollect.mixers.delta as module

    before = module.scan
    mixer, x = layer("delta_net")
    with recorded(mixer):
        assert module.scan is not before
        with pytest.raises(ValueError, match="D=16"):
            mixer(x[..., :3])
    assert module.scan is before

    def fail() -> None:
        with recorded(mixer):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module.scan is before


def test_chosen_reads_are_spread_and_end_with_the_last_token() -> None:
    """Prevents reads that lie outside of a short text."""
    assert chosen_reads(4, 12) == [0, 1, 2, 3]
    assert chosen_reads(4096, 4) == [1023, 2047, 3071, 4095]
