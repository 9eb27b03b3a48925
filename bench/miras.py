"""Miras memories: time and memory against titans-pytorch, the machine's floor, and sequence length.

    python -m bench.miras [--json FILE] [--peer FOLDER]

The headline size is 8 heads of 64, fp32, B = 1: a memory of two matrices (hidden size 256) with a decay per token, forward + backward.
Nothing is timed before it has been shown to be right.

The peer is `NeuralMemory` of titans-pytorch, installed by hand (its dependencies must not replace torch); see `INSTALL`. It gets the
same sizes, the same chunk, `batch_size = chunk` so that it too takes its gradients at the last state, no momentum, and no norm or
projection around the memory: what is left is the memory and two maps from 512 channels to a gate per head. It is the same kind of
memory, not the same function. Less work than ours: one decay per chunk, and no read within a chunk (it reads with the chunk's first
weights). More work: gelu by erf, and the norm's scale is rewritten too. Queries, keys and values are one tensor, three for ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Measure, extra_peak_bytes, interleaved, machine, matmul_rate, peak_during, ratio, show
from recollect.bench.peers import install
from recollect.bench.suites.memories import perceptron_operations
from recollect.bench.suites.memory_peers import titans_memory
from recollect.ops.miras import MirasSpec, MirasState, Parameters, presets, scan
from recollect.ops.miras.biases import l2
from recollect.ops.miras.memories import mlp
from recollect.ops.miras.retentions import l2 as decay
from recollect.ops.miras.rules import gd

HEADS, SIZE, LENGTH = 8, 64, 2048
CHUNKS = {64: 5.0, 16: 10.0}  # chunk size: how many times faster than the peer
FLOOR_SHARE = 0.5  # of the rate of matrix products, forward
INSTALL = f"{install('titans_pytorch')} --target FOLDER; then --peer FOLDER"


class Inputs(NamedTuple):
    """q, k, v [1, T, H, K], gates by name, the memory's parameters (None: zeros), and a gradient of y."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]
    parameters: Parameters | None
    grad: Tensor

    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        learned = [] if self.parameters is None else [*self.parameters.fast, *self.parameters.slow]
        return [self.q, self.k, self.v, *self.gates.values(), *learned]


def perceptron(chunk_size: int) -> MirasSpec:
    """The 2-layer memory of Titans and Yaad with a decay per token, written by plain gradient descent."""
    return MirasSpec(memory=mlp(), bias=l2(), retention=decay(), rule=gd(), chunk_size=chunk_size)


def inputs(
    spec: MirasSpec, length: int, *, channels: bool = False, gates: tuple[str, ...] = ("eta", "log_alpha"), dtype: torch.dtype
) -> Inputs:
    """Unit keys and queries, steps below 0.02, decays of 0.95 to 1; gates per head, or per channel."""
    generator = torch.Generator().manual_seed(0)

    def draw(make: Callable[..., Tensor], *shape: int) -> Tensor:
        return make(*shape, generator=generator, dtype=dtype)

    q, k = (F.normalize(draw(torch.randn, 1, length, HEADS, SIZE), dim=-1) for _ in range(2))
    v, grad = (draw(torch.randn, 1, length, HEADS, SIZE) for _ in range(2))
    scales = {"eta": 0.02, "log_alpha": -0.05}
    shape = (1, length, HEADS, *((SIZE,) if channels else ()))
    drawn = {name: draw(torch.rand, *shape) * scales[name] for name in gates}
    parameters = spec.memory.init(HEADS, SIZE, SIZE, generator=generator, dtype=dtype) if spec.memory.initial_std else None
    made = Inputs(q, k, v, drawn, parameters, grad)
    for leaf in made.leaves():
        leaf.requires_grad_()
    return made


def forward(spec: MirasSpec, x: Inputs, backend: str | None = None) -> tuple[Tensor, MirasState]:
    """Outputs and the last state."""
    return scan(spec, x.q, x.k, x.v, x.gates, parameters=x.parameters, backend=backend)


def step(spec: MirasSpec, x: Inputs, backend: str | None = None) -> list[Tensor]:
    """Forward and backward: outputs and all gradients."""
    y, _ = forward(spec, x, backend)
    return [y.detach(), *torch.autograd.grad(y, x.leaves(), x.grad)]


def read_only(spec: MirasSpec, x: Inputs) -> None:
    """Forward without gradients."""
    with torch.no_grad():
        forward(spec, x)


# --- right before fast ------------------------------------------------------------------------------------------------------


def worst_error(spec: MirasSpec, length: int, *, channels: bool) -> tuple[float, float]:
    """Largest relative error in fp32 against the token loop in fp64, outputs and gradients: of the default form, of the token loop."""
    double = inputs(spec, length, channels=channels, dtype=torch.float64)
    assert double.parameters is not None
    parameters = Parameters(*(tuple(part.detach().float().requires_grad_() for part in group) for group in double.parameters))
    q, k, v = (part.detach().float().requires_grad_() for part in (double.q, double.k, double.v))
    gates = {name: gate.detach().float().requires_grad_() for name, gate in double.gates.items()}
    single = Inputs(q, k, v, gates, parameters, double.grad.float())
    exact = step(spec, double, "sequential")

    def error(backend: str | None) -> float:
        pairs = zip(step(spec, single, backend), exact, strict=True)
        return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)

    return error(None), error("sequential")


def error_rows() -> list[Measure]:
    """Both chunk sizes, gates per head and per channel."""
    rows = []
    for chunk in CHUNKS:
        for channels in (False, True):
            ours, loop = worst_error(perceptron(chunk), 80, channels=channels)
            rows.append(
                Measure(
                    f"relative error in fp32 against the token loop in fp64, chunk {chunk}, gates per "
                    f"{'channel' if channels else 'head'}: ours; the loop in fp32",
                    f"{ours:.1e}; {loop:.1e}",
                    "<= 2x",
                    ours <= 2 * loop + 1e-6,
                )
            )
    return rows


# --- against the peer, and the floor ------------------------------------------------------------------------------------------


def has_peer(folder: str | None) -> bool:
    """Whether the peer is installed, in the folder or in this environment."""
    if folder:
        sys.path.insert(0, folder)
    return importlib.util.find_spec("titans_pytorch") is not None


def peer_step(chunk: int) -> Callable[[], object]:
    """Forward + backward of the peer at the headline size."""
    module = titans_memory(HEADS, SIZE, chunk)
    x = F.normalize(torch.randn(1, LENGTH, HEADS * SIZE), dim=-1).requires_grad_()
    grad = torch.randn(1, LENGTH, HEADS * SIZE)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        y, _ = module(x)
        y.backward(grad)

    return run


def operations(chunk: int, length: int) -> float:
    """FLOPs of the forward pass as matrix products: 28 K^2 + 10 C K multiply-adds per token and head.

    Two matrices of 4 K x K: 8 K^2 predict the value of the key at the chunk's first weights, 4 K^2 take its error back to the hidden
    units, 8 K^2 read the query there, 8 K^2 write the chunk. Of the tokens written inside the chunk a read takes C x (K + 4 K) scores
    and C x (4 K + K) values, counted as whole squares.
    """
    return perceptron_operations(SIZE, chunk) * length * HEADS


def training_operations(chunk: int, length: int) -> float:
    """FLOPs of forward + backward: a product of the forward pass has two in the backward pass, the gradients of both of its factors.

    Every factor needs its gradient (the first weights are learned, too) but those of the last chunk's write, which nobody reads. What
    a form computes again in its backward pass is not counted.
    """
    return 3 * operations(chunk, length) - 2 * 16 * SIZE**2 * chunk * HEADS


def peer_rows(peer: bool, repeats: int) -> list[Measure]:
    """Forward + backward against the peer, forward and both against the floor, for each chunk size."""
    rows = []
    for chunk, goal in CHUNKS.items():
        spec = perceptron(chunk)
        x, wide = (inputs(spec, LENGTH, channels=channels, dtype=torch.float32) for channels in (False, True))
        runs: dict[str, Callable[[], object]] = {
            "ours": lambda spec=spec, x=x: step(spec, x),  # type: ignore[misc]
            "channels": lambda spec=spec, x=wide: step(spec, x),  # type: ignore[misc]
            "forward": lambda spec=spec, x=x: read_only(spec, x),  # type: ignore[misc]
        }
        if peer:
            runs["peer"] = peer_step(chunk)
        seconds = interleaved(runs, repeats=repeats)
        name = f"chunk {chunk}, T={LENGTH}"
        if not peer:
            rows.append(
                Measure(
                    f"forward + backward, titans-pytorch / ours, {name}", f"peer not installed: {INSTALL}", f">= {goal:.0f}x"
                )
            )
        else:
            faster, low, high = ratio(seconds["peer"], seconds["ours"])
            rows.append(
                Measure(
                    f"forward + backward, titans-pytorch / ours, {name}",
                    f"{faster:.1f}x ({low:.1f}-{high:.1f})",
                    f">= {goal:.0f}x",
                    faster >= goal,
                )
            )
        medians = [f"{label} {statistics.median(series):.3f}" for label, series in seconds.items()]
        rows.append(Measure(f"seconds, median, {name}: gates per head; per channel; forward alone; peer", "; ".join(medians)))
        rate = matmul_rate()
        floor = operations(chunk, LENGTH) / rate
        share = floor / statistics.median(seconds["forward"])
        trained = training_operations(chunk, LENGTH)
        share_trained = trained / rate / statistics.median(seconds["ours"])
        rows.append(
            Measure(
                f"forward, achieved / floor (operations at the matrix-product rate), {name}",
                f"{share:.2f} (floor {floor:.4f} s, {operations(chunk, LENGTH) / 1e9:.1f} GFLOP)",
                f">= {FLOOR_SHARE}",
                share >= FLOOR_SHARE,
            )
        )
        rows.append(
            Measure(
                f"forward + backward, achieved / floor (two products backward for each one forward; nothing that is computed "
                f"again is counted), {name}",
                f"{share_trained:.2f} (floor {trained / rate:.4f} s, {trained / 1e9:.1f} GFLOP)",
            )
        )
    return rows


# --- length -------------------------------------------------------------------------------------------------------------------


def length_rows(repeats: int) -> list[Measure]:
    """Training time and memory against T up to 32K."""
    spec, lengths = perceptron(64), (2048, 8192, 32768)
    runs: dict[str, Callable[[], object]] = {}
    for length in lengths:
        x = inputs(spec, length, dtype=torch.float32)
        runs[str(length)] = lambda x=x: step(spec, x)  # type: ignore[misc]
    seconds = interleaved(runs, repeats=repeats)
    per_token = {length: statistics.median(seconds[str(length)]) / length * 1e6 for length in lengths}
    growth = per_token[lengths[-1]] / per_token[lengths[0]]
    peaks = {length: extra_peak_bytes("bench.miras", "--memory", str(length)) for length in lengths}
    rise = (peaks[lengths[-1]] - peaks[lengths[1]]) / (peaks[lengths[1]] - peaks[lengths[0]])
    steps = (lengths[-1] - lengths[1]) / (lengths[1] - lengths[0])
    return [
        Measure(
            "training time per token, T=32768 / T=2048, chunk 64",
            f"{growth:.2f}x ({', '.join(f'{t}: {us:.1f} us' for t, us in per_token.items())})",
            "linear: <= 1.25x",
            growth <= 1.25,
        ),
        Measure(
            "peak training memory beyond the inputs, 32768 - 8192 over 8192 - 2048 tokens",
            f"{rise:.2f}x ({', '.join(f'{t}: {peak / 2**20:.0f} MiB' for t, peak in peaks.items())})",
            f"linear: <= {1.1 * steps:.1f}x",
            rise <= 1.1 * steps,
        ),
    ]


def state_bytes(state: Any) -> int:
    """Bytes of the distinct tensors of a state."""
    if state is None:
        return 0
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(state_bytes(part) for part in state)


def decode_rows(repeats: int) -> list[Measure]:
    """One token after a short and after a long sequence."""
    spec, lengths = perceptron(64), (256, 8192)
    one = inputs(spec, 1, dtype=torch.float32)
    states: dict[int, MirasState] = {}
    runs: dict[str, Callable[[], object]] = {}

    def decode(state: MirasState) -> None:
        scan(spec, one.q, one.k, one.v, one.gates, state, parameters=one.parameters)

    with torch.no_grad():
        for length in lengths:
            _, states[length] = forward(spec, inputs(spec, length, dtype=torch.float32))
            runs[str(length)] = lambda state=states[length]: decode(state)  # type: ignore[misc]
        seconds = interleaved(runs, repeats=repeats)
    value, low, high = ratio(seconds[str(lengths[1])], seconds[str(lengths[0])])
    sizes = [state_bytes(states[length]) for length in lengths]
    return [
        Measure(
            "decode one token, after 8192 / after 256 tokens",
            f"{value:.2f}x ({low:.2f}-{high:.2f}; {statistics.median(seconds['256']) * 1e3:.2f} ms)",
            "constant: <= 1.1x",
            value <= 1.1,
        ),
        Measure("state, after 8192; after 256 tokens", f"{sizes[1]:,}; {sizes[0]:,} bytes", "constant", sizes[0] == sizes[1]),
    ]


def linear_rows(repeats: int) -> list[Measure]:
    """Training time per token of matrix memories, short and long."""
    made = {
        "mamba2": (presets.mamba2(), False, ("eta", "log_alpha")),
        "gla": (presets.gla(), True, ("log_alpha",)),
        "delta_net": (presets.delta_net(), False, ("eta",)),
        "gated_delta_net": (presets.gated_delta_net(), False, ("eta", "log_alpha")),
    }
    lengths, rows = (2048, 16384), []
    for name, (spec, channels, gates) in made.items():
        runs: dict[str, Callable[[], object]] = {}
        for length in lengths:
            x = inputs(spec, length, channels=channels, gates=gates, dtype=torch.float32)
            runs[str(length)] = lambda spec=spec, x=x: step(spec, x)  # type: ignore[misc]
        seconds = interleaved(runs, repeats=repeats)
        short, long = (statistics.median(seconds[str(length)]) / length * 1e6 for length in lengths)
        rows.append(
            Measure(
                f"{name}, training time per token, T=16384 / T=2048",
                f"{long / short:.2f}x ({short:.1f} us, {long:.1f} us)",
                "linear: <= 1.25x",
                long / short <= 1.25,
            )
        )
    return rows


def main() -> int:
    """Run the benchmark; exit code 1 if a goal is missed or the default form is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the table as a list of {measure, value, goal, met}")
    parser.add_argument("--peer", metavar="FOLDER", help="where titans-pytorch was installed with pip --target")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each timing (median; at least 5)")
    parser.add_argument("--memory", type=int, metavar="T", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    spec = perceptron(64)
    if arguments.memory:
        step(spec, inputs(spec, 64, dtype=torch.float32))  # compile and warm up outside the measurement
        data = inputs(spec, arguments.memory, dtype=torch.float32)
        print(peak_during(lambda: step(spec, data)))
        return 0
    repeats = max(5, arguments.repeats)
    print(machine(), flush=True)
    rows = error_rows()
    if not all(row.met for row in rows):
        print("not timed: the default form is less exact than twice the token loop")
        return show("Miras, errors", rows, arguments.json) or 1
    peer = has_peer(arguments.peer)
    rows += peer_rows(peer, repeats) + length_rows(repeats) + decode_rows(10 * repeats) + linear_rows(repeats)
    return show("Miras memories, fp32, B=1, 8 heads of 64, two matrices of hidden size 256", rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
