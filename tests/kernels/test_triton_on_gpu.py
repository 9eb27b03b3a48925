"""The Triton kernels on a GPU, at real sizes: errors against fp64, bits of repeated runs, memory. Skipped without one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.kernels.triton import INSTALLED
from recollect.ops import multi_token_attention
from recollect.ops.linear_scan import delta_scan, gated_linear_scan
from recollect.ops.miras import MirasSpec, Parameters, Retention, scan
from recollect.ops.miras.biases import AttentionalBias, huber, l2, lp
from recollect.ops.miras.memories import mlp
from recollect.ops.miras.retentions import kl, lq
from recollect.ops.miras.retentions import l2 as decay
from recollect.ops.miras.rules import LearningRule, gd, momentum

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not (INSTALLED and torch.cuda.is_available()), reason="no GPU, or no triton")

LOW = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """fp32 on the device, from the global seed."""
    return scale * torch.randn(*shape, device=DEVICE)


def attention_inputs(length: int, n_heads: int, n_kv: int, size: int, c_q: int, c_k: int, group: int) -> dict[str, Tensor]:
    """Inputs by name, kernels and matrices near the identity."""
    named = {"q": random(2, length, n_heads, size), "k": random(2, length, n_kv, size), "v": random(2, length, n_kv, size)}
    for side in ("pre", "post"):
        kernel = random(n_heads, c_q, c_k, scale=0.1)
        kernel[:, -1, c_k // 2] += 1
        named[f"kq_{side}"] = kernel
        named[f"head_{side}"] = torch.eye(group, device=DEVICE) + random(n_heads // group, group, group, scale=0.1)
    return named


def everything(run: Any, named: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Outputs in a dtype, and the gradients of a fixed sum over them by every input."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in named.items()}
    found = run(**leaves, **options)
    outputs = list(found) if isinstance(found, tuple) else [found]
    total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=DEVICE).view_as(x)).sum() for x in outputs)
    assert isinstance(total, Tensor)
    return [*outputs, *torch.autograd.grad(total, list(leaves.values()))]


def assert_as_exact(run: Any, named: dict[str, Tensor], dtype: torch.dtype, oracle: str, **options: Any) -> None:
    """Errors against the oracle in fp64 are at most twice those of the oracle in this dtype, and a rounding."""
    rounded = {name: x.to(dtype) for name, x in named.items()}
    exact = everything(run, rounded, torch.float64, backend=oracle, **options)

    def errors(backend: str) -> list[float]:
        got = everything(run, rounded, dtype, backend=backend, **options)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]

    for ours, theirs in zip(errors("triton"), errors(oracle), strict=True):
        assert ours <= 2 * theirs + torch.finfo(dtype).eps


SHAPES = [  # length, heads, key-value heads, size, c_q, c_k, group
    (257, 16, 16, 96, 6, 11, 16),
    (512, 16, 4, 64, 6, 11, 16),
    (100, 8, 8, 128, 4, 9, 2),
    (63, 4, 1, 256, 2, 5, 4),
]


@pytest.mark.parametrize(("shape", "dtype"), list(itertools.product(SHAPES, LOW)), ids=str)
def test_attention_errs_no_more_than_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Prevents kernels whose tiles only fit the interpreter's small shapes."""
    ids = torch.arange(shape[0], device=DEVICE).expand(2, -1) // 50
    assert_as_exact(multi_token_attention, attention_inputs(*shape), dtype, "materialized", document_ids=ids)


@pytest.mark.parametrize(("shape", "dtype"), list(itertools.product(SHAPES[1:4], LOW)), ids=str)
def test_a_wider_product_errs_no_more_than_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Prevents the convolution as a product, which runs where no heads are mixed before the softmax, from being less exact."""
    named = {name: x for name, x in attention_inputs(*shape).items() if name != "head_pre"}
    assert_as_exact(multi_token_attention, named, dtype, "materialized")


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_attention_repeats_its_bits(shape: tuple[int, ...], mixed: bool) -> None:
    """Prevents sums whose order depends on the scheduler."""
    named = {name: x for name, x in attention_inputs(*shape).items() if mixed or name != "head_pre"}
    first = everything(multi_token_attention, named, torch.bfloat16, backend="triton")
    for _ in range(100):
        again = everything(multi_token_attention, named, torch.bfloat16, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_attention_is_the_default_and_its_memory_linear() -> None:
    """Prevents a T x T tensor anywhere: four times the length may take at most five times the memory."""
    peaks = []
    for length in (2048, 8192):
        named = {name: x.bfloat16().requires_grad_() for name, x in attention_inputs(length, 8, 8, 64, 6, 11, 8).items()}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        multi_token_attention(**named).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 5 * peaks[0]


def scan_inputs(length: int, size: int, *, delta: bool) -> dict[str, Tensor]:
    """Tokens of a gated linear memory, or of a gated delta rule, with decays per key."""
    k = torch.nn.functional.normalize(random(2, length, 4, size), dim=-1)
    named = {"q": random(2, length, 4, size), "k": k, "v": random(2, length, 4, size)}
    named["log_decay"] = -0.1 * torch.rand(2, length, 4, size, device=DEVICE)
    return {**named, "a": k, "b": -torch.rand(2, length, 4, 1, device=DEVICE) * k} if delta else named


@pytest.mark.parametrize(("size", "delta", "dtype"), list(itertools.product([64, 128, 80], [False, True], LOW)))
def test_recurrences_err_no_more_than_the_oracle(size: int, delta: bool, dtype: torch.dtype) -> None:
    """Prevents a cumulative sum for the decays that loses what it adds up, and states in low precision."""
    run = delta_scan if delta else gated_linear_scan
    assert_as_exact(run, scan_inputs(300, size, delta=delta), dtype, "sequential")


MEMORIES: dict[str, tuple[AttentionalBias, Retention, LearningRule]] = {
    "yaad": (huber(), decay(), gd()),
    "moneta": (lp(3.0), lq(4.0), gd()),
    "memora": (l2(), kl(), gd()),
    "titans": (l2(), decay(), momentum()),
}


def memory_inputs(length: int, size: int, model: str) -> dict[str, Tensor]:
    """Tokens of a perceptron memory with gates per channel (one per head with momentum), and what is learned of it."""
    tokens, heads = (2, length, 2), 2
    width = 1 if model == "titans" else size
    named = {name: torch.nn.functional.normalize(random(*tokens, size), dim=-1) for name in "qk"} | {"v": random(*tokens, size)}
    named |= {
        "eta": 0.1 * torch.rand(*tokens, width, device=DEVICE),
        "log_alpha": -0.1 * torch.rand(*tokens, width, device=DEVICE),
    }
    named |= {"delta": 0.1 + torch.rand(*tokens, width, device=DEVICE)} if model == "yaad" else {}
    named |= {"log_momentum": -torch.rand(*tokens, device=DEVICE)} if model == "titans" else {}
    named |= {
        "first": random(heads, 4 * size, size, scale=size**-0.5),
        "last": random(heads, size, 4 * size, scale=size**-0.5 / 2),
    }
    return named | {"scale": 1 + random(heads, size, scale=0.1), "shift": random(heads, size, scale=0.1)}


def remember(model: str, chunk: int, *, backend: str, **named: Tensor) -> tuple[Tensor, ...]:
    """Outputs and last states of a perceptron memory; the second row starts a document inside a piece."""
    bias, retention, rule = MEMORIES[model]
    spec = MirasSpec(memory=mlp(), bias=bias, retention=retention, rule=rule, chunk_size=chunk)
    q, k, v, *learned = (named.pop(name) for name in ("q", "k", "v", "first", "last", "scale", "shift"))
    reset = torch.zeros(q.shape[:2], dtype=torch.bool, device=DEVICE)
    reset[1, q.shape[1] // 2] = True
    parameters = Parameters((learned[0], learned[1]), (learned[2], learned[3]))
    y, state = scan(spec, q, k, v, named, parameters=parameters, reset=reset, backend=backend)
    return y, *state.dual


@pytest.mark.parametrize(("model", "size", "chunk"), list(itertools.product(MEMORIES, [16, 64, 96], [16, 64])))
def test_memories_err_no_more_than_the_plain_chunks(model: str, size: int, chunk: int) -> None:
    """Prevents matrices that one thread reads before another has written them, and products in less than three parts."""
    named = memory_inputs(150, size, model)
    assert_as_exact(lambda **inputs: remember(model, chunk, **inputs), named, torch.float32, "chunked")


def test_memories_repeat_their_bits() -> None:
    """Prevents a walk that depends on which warp comes first."""
    named = memory_inputs(200, 64, "yaad")
    first = everything(lambda **inputs: remember("yaad", 64, **inputs), named, torch.float32, backend="triton")
    for _ in range(100):
        again = everything(lambda **inputs: remember("yaad", 64, **inputs), named, torch.float32, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
