"""The attention-like mixers against their papers' modules, written here from the equations, with the mixer's own weights.

Axis legend: B batch, T time, D model dim, H heads, K head dim.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.mixers import Mixer, build, layer_options
from tests.laws import maker, sequence
from tests.ops import naive

EXACT = 1e-12
DIM, N_HEADS, LENGTH = 16, 4, 13
Weights = dict[str, Tensor]


def weights_of(mixer: Mixer) -> Weights:
    return {name: parameter.detach() for name, parameter in mixer.named_parameters()}


def heads_of(x: Tensor, weight: Tensor, n_heads: int) -> Tensor:
    """x W^T cut into heads: [B, H, T, K]."""
    return (x @ weight.T).unflatten(-1, (n_heads, -1)).transpose(1, 2)


def turned(x: Tensor, theta: float = 1e5) -> Tensor:
    """Rotary positions on [B, H, T, K] by complex numbers: pair c turns by t theta^(-2c/K)."""
    size = x.shape[-1]
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * theta ** (
        -torch.arange(0, size, 2, dtype=torch.float64) / size
    )
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def logits(x: Tensor, w: Weights, n_query: int, n_key: int, theta: float = 1e5) -> Tensor:
    """q k^T / sqrt(K) with rotary positions, key heads repeated to the query heads: [B, H, T, T]."""
    q, k = turned(heads_of(x, w["project.q.weight"], n_query), theta), turned(heads_of(x, w["project.k.weight"], n_key), theta)
    return q @ k.repeat_interleave(n_query // n_key, dim=1).mT / math.sqrt(q.shape[-1])


def causal_softmax(scores: Tensor) -> Tensor:
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def joined(heads: Tensor, w: Weights) -> Tensor:
    """Concatenate heads [B, H, T, V] and project."""
    return heads.transpose(1, 2).flatten(2) @ w["project.o.weight"].T


def lambda_init(layer: int) -> float:
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


@pytest.mark.parametrize(
    "options",
    [{}, {"n_kv_heads": 2, "rope_theta": 5e5}, {"head_dim": 6}, {"window": 3}],
    ids=lambda o: "-".join(o) or "default",
)
def test_attention_equals_its_equations(options: dict[str, int | float]) -> None:
    """Prevents a wrong projection, head layout, rotary base or window in the module around the op."""
    mixer, x = maker("attention", **options)(), sequence(2, LENGTH)
    w, n_kv = weights_of(mixer), int(options.get("n_kv_heads", N_HEADS))
    scores = logits(x, w, N_HEADS, n_kv, float(options.get("rope_theta", 1e5)))
    if "window" in options:
        far = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-int(options["window"]))
        scores = scores.masked_fill(far, float("-inf"))
    v = heads_of(x, w["project.v.weight"], n_kv).repeat_interleave(N_HEADS // n_kv, dim=1)
    torch.testing.assert_close(mixer(x)[0], joined(causal_softmax(scores) @ v, w), rtol=0, atol=EXACT)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("n_kv", [4, 2])
def test_diff_equals_its_equations(layer: int, n_kv: int) -> None:
    """Prevents a wrong lambda, depth factor, head norm or pairing: Eq. 1-3 of arXiv 2410.05258, pairs of neighbouring heads."""
    mixer, x = maker("diff", layer=layer, n_kv_heads=n_kv)(), sequence(2, LENGTH)
    w = weights_of(mixer)
    lam = torch.exp(w["lambda_q1"] @ w["lambda_k1"]) - torch.exp(w["lambda_q2"] @ w["lambda_k2"]) + lambda_init(layer)
    q, k = turned(heads_of(x, w["project.q.weight"], 4)), turned(heads_of(x, w["project.k.weight"], n_kv))
    v = heads_of(x, w["project.v.weight"], n_kv // 2)
    outs = []
    for pair in range(2):
        group = pair * (n_kv // 2) // 2
        maps = [causal_softmax(q[:, 2 * pair + c] @ k[:, 2 * group + c].mT / 2) for c in (0, 1)]
        outs.append((1 - lambda_init(layer)) * rms((maps[0] - lam * maps[1]) @ v[:, group], w["norm_weight"]))
    torch.testing.assert_close(mixer(x)[0], joined(torch.stack(outs, dim=1), w), rtol=0, atol=EXACT)


@pytest.mark.parametrize("n_kv", [4, 1])
def test_diff_v2_equals_its_equations(n_kv: int) -> None:
    """Prevents a gate at the wrong map, and pairs that do not share keys and values."""
    mixer, x = maker("diff_v2", n_kv_heads=n_kv)(), sequence(2, LENGTH)
    w = weights_of(mixer)
    attention = causal_softmax(logits(x, w, 2 * N_HEADS, n_kv))
    heads = attention @ heads_of(x, w["project.v.weight"], n_kv).repeat_interleave(2 * N_HEADS // n_kv, dim=1)
    gate = torch.sigmoid(x @ w["gate.weight"].T).transpose(1, 2)[..., None]
    torch.testing.assert_close(mixer(x)[0], joined(heads[:, ::2] - gate * heads[:, 1::2], w), rtol=0, atol=EXACT)


def mixed(maps: Tensor, matrix: Tensor | None) -> Tensor:
    if matrix is None:
        return maps
    return torch.einsum("gop,bgpij->bgoij", matrix, maps.unflatten(1, matrix.shape[:2])).flatten(1, 2)


def convolved(maps: Tensor, kernel: Tensor | None) -> Tensor:
    """Masked to zero, padded with past queries and with keys on both sides, cross-correlated head by head."""
    if kernel is None:
        return maps
    c_q, c_k = kernel.shape[1:]
    return F.conv2d(F.pad(maps.tril(), (c_k // 2, c_k // 2, c_q - 1, 0)), kernel[:, None], groups=len(kernel))


def multi_token_module(x: Tensor, w: Weights, norm: str, layer: int, n_kv: int) -> Tensor:
    """The module of arXiv 2504.00927, section 3: whichever kernels `w` holds."""
    maps = logits(x, w, N_HEADS, n_kv)
    maps = causal_softmax(mixed(convolved(maps, w.get("kq_pre")), w.get("head_pre")))
    maps = mixed(convolved(maps, w.get("kq_post")).tril(), w.get("head_post"))
    heads = maps @ heads_of(x, w["project.v.weight"], n_kv).repeat_interleave(N_HEADS // n_kv, dim=1)
    if norm != "none":
        heads = rms(heads, w["norm_weight"])
    if norm == "depth":
        heads = heads * (1 - lambda_init(layer))
    if "gate.weight" in w:
        heads = heads * torch.sigmoid(heads @ w["gate.weight"].T + w["gate.bias"])
    return joined(heads, w)


MULTI_TOKEN = {
    "mta": ("mta", {}),
    "mta_v1, layer 2": ("mta_v1", {"layer": 2}),
    "mta_toy": ("mta_toy", {}),
    "talking_heads": ("talking_heads", {}),
    "no kernels in this layer": ("mta", {"kq": False}),
    "grouped heads": ("mta", {"n_kv_heads": 2}),
    "rms": ("mta", {"norm": "rms"}),
    "vector gate": ("mta", {"norm": "vector_gate"}),
    "groups of two": ("mta", {"c_h": 2, "norm": "none"}),
    "before only": ("mta", {"kq_post": False, "head_post": False}),
    "after only": ("mta", {"kq_pre": False, "head_pre": False}),
}


@pytest.mark.parametrize("case", MULTI_TOKEN)
def test_multi_token_mixers_equal_their_equations(case: str) -> None:
    """Prevents wrong order, orientation, norm, depth factor or gate in any preset."""
    name, options = MULTI_TOKEN[case]
    mixer, x = maker(name, **options)(), sequence(2, LENGTH)
    norm = {"mta_v1": "depth", "mta_toy": "none", "talking_heads": "none"}.get(name, options.get("norm", "gate"))
    expected = multi_token_module(x, weights_of(mixer), norm, options.get("layer", 0), options.get("n_kv_heads", N_HEADS))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=EXACT)


def test_merged_convolution_equals_the_loops() -> None:
    """Prevents a merged kernel whose output and input heads are exchanged."""
    mixer, x = maker("mta", merged=True, c_h=2, c_q=3, c_k=3, norm="none")(), sequence(1, 7)
    w = weights_of(mixer)
    assert w["kq_pre"].shape == w["kq_post"].shape == (4, 2, 3, 3)
    q, k, v = (heads_of(x, w[f"project.{part}.weight"], N_HEADS) for part in "qkv")
    out = naive.multi_token_attention(
        *(turned(part).transpose(1, 2) for part in (q, k)), v.transpose(1, 2), kq_pre=w["kq_pre"], kq_post=w["kq_post"]
    )
    torch.testing.assert_close(mixer(x)[0], joined(out.transpose(1, 2), w), rtol=0, atol=EXACT)


# --- presets, layers, initialisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mta", {"kq_pre": (4, 6, 11), "kq_post": (4, 6, 11), "head_pre": (1, 4, 4), "head_post": (1, 4, 4)}),
        ("mta_v2", {"kq_pre": (4, 6, 11), "kq_post": (4, 6, 11), "head_pre": (1, 4, 4), "head_post": (1, 4, 4)}),
        ("mta_v1", {"kq_pre": (4, 6, 11), "head_post": (2, 2, 2)}),
        ("mta_toy", {"kq_pre": (4, 2, 9)}),
        ("talking_heads", {"head_pre": (1, 4, 4), "head_post": (1, 4, 4)}),
    ],
)
def test_presets_have_the_papers_parts(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Prevents a preset that silently has a part more or less than the paper's model."""
    mixer = build(name, dim=DIM, n_heads=N_HEADS)
    found = {part: tuple(p.shape) for part, p in mixer.named_parameters() if part.startswith(("kq_", "head_"))}
    assert found == shapes
    gates = {part: p.numel() for part, p in mixer.named_parameters() if part.startswith(("norm", "gate"))}
    assert gates == {"mta_v1": {"norm_weight": 4}, "mta_toy": {}, "talking_heads": {}}.get(
        name, {"norm_weight": 4, "gate.weight": 4, "gate.bias": 1}
    )


@pytest.mark.parametrize(
    ("n_layers", "expected"), [(20, [2, 6, 10, 14, 18]), (24, [2, 6, 10, 14, 18, 22]), (4, [2]), (2, [1]), (1, [0])]
)
def test_key_query_layers_are_the_papers(n_layers: int, expected: list[int]) -> None:
    """Prevents kernels in the wrong layers, and small models without any; head mixing, norm and gate are on all layers."""
    layers = layer_options("mta", n_layers)
    mixers = [build(layer.pop("mixer"), dim=DIM, n_heads=N_HEADS, **layer) for layer in layers]
    names = [dict(mixer.named_parameters()) for mixer in mixers]
    assert [n for n, found in enumerate(names) if "kq_pre" in found and "kq_post" in found] == expected
    assert all("head_pre" in found and "head_post" in found and "gate.weight" in found for found in names)


@pytest.mark.parametrize("merged", [False, True])
def test_multi_token_starts_as_plain_attention(merged: bool) -> None:
    """Prevents a start that is not the Transformer's: without norm and gate, the same projections give the same output."""
    plain = build("attention", dim=DIM, n_heads=N_HEADS).double()
    mta = build("mta", dim=DIM, n_heads=N_HEADS, norm="none", merged=merged).double()
    mta.load_state_dict(plain.state_dict(), strict=False)
    x = sequence(2, LENGTH)
    torch.testing.assert_close(mta(x)[0], plain(x)[0], rtol=0, atol=EXACT)


@pytest.mark.parametrize(("c_q", "c_k"), [(6, 11), (2, 9), (4, 3)])
def test_kernel_initialisations(c_q: int, c_k: int) -> None:
    """Prevents an initialisation under another's name; "diagonal" pairs query i - a with key j - a."""

    def kernel(init: str) -> Tensor:
        return build("mta_toy", dim=DIM, n_heads=N_HEADS, init=init, c_q=c_q, c_k=c_k).get_parameter("kq_pre").detach()

    identity = torch.zeros(c_q, c_k)
    identity[-1, c_k // 2] = 1
    assert torch.equal(kernel("identity"), identity.expand(N_HEADS, -1, -1))
    diagonal = torch.zeros(c_q, c_k)
    for a in range(min(c_q, c_k // 2 + 1)):
        diagonal[c_q - 1 - a, c_k // 2 - a] = 1
    assert torch.equal(kernel("diagonal"), diagonal.expand(N_HEADS, -1, -1))
    assert not kernel("zero").any()
    assert torch.equal(kernel("const"), torch.full((N_HEADS, c_q, c_k), 0.3))
    uniform = kernel("uniform")
    assert uniform.min() >= -1
    assert uniform.max() <= 1
    assert uniform.unique().numel() > uniform.numel() // 2
    assert kernel("normal").unique().numel() > uniform.numel() // 2


@pytest.mark.parametrize("name", ["attention", "diff", "diff_v2", "mta", "talking_heads"])
def test_dropout_acts_in_training_only_and_follows_torchs_seed(name: str) -> None:
    """Prevents baselines that are evaluated with dropout, and runs that a seed does not reproduce."""
    mixer, x = maker(name, dropout=0.4)(), sequence(2, LENGTH)
    plain = maker(name)()(x)[0]
    assert torch.equal(mixer(x)[0], plain)
    mixer.train()
    torch.manual_seed(1)
    first, second = mixer(x)[0], mixer(x)[0]
    torch.manual_seed(1)
    assert torch.equal(mixer(x)[0], first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)
