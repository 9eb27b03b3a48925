"""Multi-Token Attention: time and memory against the materialised formulation and plain attention. `python -m bench.mta [--json FILE]`

The headline size is that of the paper's 880M model: 16 heads of 96, 6 x 11 kernels and 16 x 16 head mixing on both sides, fp32, B = 1.
Nothing is timed before it has been shown to be right.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import recollect
from bench.harness import Measure, copy_rate, extra_peak_bytes, interleaved, machine, matmul_rate, peak_during, ratio, show
from recollect.bench.suites.attention import operations
from recollect.models import RecollectConfig, RecollectForCausalLM
from recollect.ops.multi_token import Mixing, choose, multi_token_attention

HEADS, SIZE, C_Q, C_K = 16, 96, 6, 11


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor, Mixing, Tensor]:
    """q, k, v [1, T, H, K], mixing near the identity, and an output gradient; all but the last require gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale)

    q, k, v, grad = (draw(1, length, HEADS, SIZE) for _ in range(4))
    kernels = [draw(HEADS, C_Q, C_K, scale=0.1) for _ in range(2)]
    matrices = [torch.eye(HEADS)[None] + draw(1, HEADS, HEADS, scale=0.1) for _ in range(2)]
    for kernel in kernels:
        kernel[:, -1, C_K // 2] += 1
    mixing = Mixing(kernels[0], matrices[0], kernels[1], matrices[1])
    for t in (q, k, v, *mixing):
        t.requires_grad_()
    return q, k, v, mixing, grad


def step(q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, grad: Tensor, backend: str | None) -> tuple[Tensor, ...]:
    """Forward and backward of the op: output and the seven gradients."""
    out = multi_token_attention(q, k, v, **mixing._asdict(), backend=backend)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v, *mixing), grad))


def plain_step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The same of `scaled_dot_product_attention`."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return torch.autograd.grad(out, (q, k, v), grad.transpose(1, 2))


def worst_error(length: int) -> tuple[float, float]:
    """Largest relative error in fp32 against the materialised form in fp64: of the default form, and of the materialised form."""
    q, k, v, mixing, grad = inputs(length)
    double = [t.detach().double().requires_grad_() for t in (q, k, v, *mixing)]
    exact = step(*double[:3], Mixing(*double[3:]), grad.double(), "materialized")

    def error(backend: str | None) -> float:
        got = step(q, k, v, mixing, grad, backend)
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))

    return error(None), error("materialized")


def train_step(model: RecollectForCausalLM, tokens: Tensor) -> None:
    """One training step's forward and backward."""
    model.zero_grad(set_to_none=True)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def op_rows(length: int, repeats: int) -> list[Measure]:
    """Forward + backward of the op against the materialised form and plain attention."""
    q, k, v, mixing, grad = inputs(length)
    runs = {
        "default": lambda: step(q, k, v, mixing, grad, None),
        "materialized": lambda: step(q, k, v, mixing, grad, "materialized"),
        "sdpa": lambda: plain_step(q, k, v, grad),
    }
    seconds = interleaved(runs, repeats=repeats)
    faster, low, high = ratio(seconds["materialized"], seconds["default"])
    slower, plain_low, plain_high = ratio(seconds["default"], seconds["sdpa"])
    median = sorted(seconds["default"])[len(seconds["default"]) // 2]
    rate, count = matmul_rate(), operations(HEADS, SIZE, length)
    total = sum(count.values())
    work = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in count.items())
    return [
        Measure(
            f"forward + backward, materialised / ours, T={length}",
            f"{faster:.2f}x ({low:.2f}-{high:.2f})",
            ">= 4x",
            faster >= 4,
        ),
        Measure(
            f"forward + backward, ours / scaled_dot_product_attention, T={length}",
            f"{slower:.2f}x ({plain_low:.2f}-{plain_high:.2f})",
            "<= 1.6x",
            slower <= 1.6,
        ),
        Measure(
            "seconds, median: ours; materialised; sdpa", "; ".join(f"{sorted(s)[len(s) // 2]:.3f}" for s in seconds.values())
        ),
        Measure("GFLOP of ours", f"{total / 1e9:.0f} ({work})"),
        Measure("matrix-product rate of the machine, fp32", f"{rate / 1e9:.0f} GFLOP/s; copy {copy_rate() / 1e9:.1f} GB/s"),
        Measure(
            "achieved / floor (operations at the matrix-product rate)",
            f"{total / rate / median:.2f} (floor {total / rate:.3f} s)",
        ),
    ]


def memory_rows() -> list[Measure]:
    """Peak memory beyond the inputs, each in a fresh process."""
    peak = {
        (name, length): extra_peak_bytes("bench.mta", "--memory", name, str(length))
        for name, length in (("default", 2048), ("materialized", 2048), ("default", 8192), ("blocked", 1024), ("blocked", 4096))
    }
    share = peak["materialized", 2048] / peak["default", 2048]
    growth, plain_growth = peak["default", 8192] / peak["default", 2048], peak["blocked", 4096] / peak["blocked", 1024]
    mebi = {key: f"{value / 2**20:.0f} MiB" for key, value in peak.items()}
    return [
        Measure(
            "peak extra memory, T=2048: materialised / ours",
            f"{share:.1f}x ({mebi['materialized', 2048]} / {mebi['default', 2048]})",
            ">= 8x",
            share >= 8,
        ),
        Measure(
            "peak extra memory, T=8192 / T=2048",
            f"{growth:.2f}x ({mebi['default', 8192]})",
            "linear: <= 4x",
            growth <= 4,
        ),
        Measure(
            "the same of the plain-PyTorch blocks, T=4096 / T=1024",
            f"{plain_growth:.2f}x ({mebi['blocked', 1024]}, {mebi['blocked', 4096]})",
        ),
    ]


def decode_rows(length: int, repeats: int) -> list[Measure]:
    """One token of a layer of the headline size against `length` cached ones."""
    torch.manual_seed(0)
    x, one = torch.randn(1, length, HEADS * SIZE), torch.randn(1, 1, HEADS * SIZE)
    runs, states = {}, {}
    with torch.inference_mode():
        for name in ("attention", "mta", "talking_heads", "diff"):
            mixer = recollect.build(name, dim=HEADS * SIZE, n_heads=HEADS).eval()
            states[name] = mixer(x)[1]

            def decode(name: str = name, mixer: recollect.Mixer = mixer) -> None:
                states[name] = mixer(one, states[name])[1]

            runs[name] = decode
        seconds = interleaved(runs, repeats=repeats)
    rows = []
    for name in ("mta", "talking_heads", "diff"):
        value, low, high = ratio(seconds[name], seconds["attention"])
        goal = ("<= 1.5x", value <= 1.5) if name == "mta" else ("", None)
        rows.append(Measure(f"decode one token, T={length}, {name} / attention", f"{value:.2f}x ({low:.2f}-{high:.2f})", *goal))
    return rows


def model_rows(repeats: int) -> list[Measure]:
    """Training tokens/s of a whole model: 6 layers, width 512, 8 heads, T = 1024, batch 1, byte vocabulary."""
    tokens = torch.randint(0, 256, (1, 1024), generator=torch.Generator().manual_seed(0))
    runs = {}
    for name in ("attention", "mta", "talking_heads", "diff"):
        torch.manual_seed(0)
        config = RecollectConfig(vocab_size=257, hidden_size=512, num_attention_heads=8, num_hidden_layers=6, layers=name)
        model = RecollectForCausalLM(config)
        runs[name] = lambda model=model: train_step(model, tokens)
    seconds = interleaved(runs, repeats=repeats)
    rows = []
    for name in ("mta", "talking_heads", "diff"):
        value, low, high = ratio(seconds["attention"], seconds[name])
        goal = (">= 0.6", value >= 0.6) if name == "mta" else ("", None)
        rows.append(
            Measure(
                f"training tokens/s, 6 layers of 512, T=1024: {name} / attention", f"{value:.2f} ({low:.2f}-{high:.2f})", *goal
            )
        )
    return rows


def main() -> int:
    """Run the benchmark; exit code 1 if a goal is missed or the default form is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the table as a list of {measure, value, goal, met}")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each timing (median; at least 5)")
    parser.add_argument("--memory", nargs=2, metavar=("FORM", "T"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        name, length = arguments.memory
        form = None if name == "default" else name
        step(*inputs(64), form)  # compile and warm up outside the measurement
        data = inputs(int(length))
        print(peak_during(lambda: step(*data, form)))
        return 0
    repeats = max(5, arguments.repeats)
    q, k, _, mixing, _ = inputs(64)
    print(machine(), flush=True)
    print(f"default form of multi_token_attention here: {choose(q, k, mixing).__name__}", flush=True)
    ours, plain = worst_error(300)
    if not ours <= 2 * plain + 1e-6:
        print(
            f"not timed: relative error {ours:.1e} of the default form exceeds twice that of the materialised form, {plain:.1e}"
        )
        return 1
    rows = [
        Measure(
            "relative error in fp32 against fp64: ours; materialised",
            f"{ours:.1e}; {plain:.1e}",
            "<= 2x",
            ours <= 2 * plain + 1e-6,
        )
    ]
    rows += op_rows(2048, repeats) + memory_rows() + decode_rows(4096, 5 * repeats) + model_rows(repeats)
    return show(
        "Multi-Token Attention, fp32, B=1, 16 heads of 96, 6x11 kernels and 16x16 head mixing on both sides",
        rows,
        arguments.json,
    )


if __name__ == "__main__":
    sys.exit(main())
