"""Recall when some values are outliers: which attentional biases survive them.

    python -m bench.robustness [--json FILE]

A fresh perceptron memory writes 256 random pairs once, chunk by chunk; 5 % of the values are 20 times as large. Recall is the mean
cosine between what the memory then answers to the clean keys and their values. The step size of every bias is the best of a grid on
seeds of its own, found without outliers and with them; the seeds reported are others.

Axis legend: B seeds, T pairs, K width.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from recollect.ops.miras import MirasSpec, scan
from recollect.ops.miras.biases import AttentionalBias, huber, l1, l2, l_infinity, lp, pseudo_huber, value_shift
from recollect.ops.miras.memories import Parameters, mlp
from recollect.ops.miras.retentions import none
from recollect.ops.miras.rules import gd

BIASES: dict[str, AttentionalBias] = {
    "l2": l2(),
    "l1": l1(),
    "l3 (Moneta)": lp(3.0),
    "l_infinity": l_infinity(),
    "Huber, coordinates (Yaad)": huber("coordinate"),
    "Huber, norm": huber("norm"),
    "Huber, literal switch": huber("switch"),
    "Huber, switch on rms": huber("switch_rms"),
    "pseudo-Huber": pseudo_huber(),
    "value shift": value_shift(),
}
ETAS = tuple(10.0 ** (-n / 4) for n in range(17))  # 1 to 1e-4
N_PAIRS, WIDTH, CHUNK, OUTLIERS, FACTOR = 256, 64, 16, 0.05, 20.0
SEEDS, TUNING_SEEDS = range(5), range(100, 103)


def pairs(seeds: range, *, outliers: bool) -> tuple[Tensor, Tensor, Tensor, Parameters]:
    """Unit keys and standard normal values [B, T, 1, K], bool [B, T] of the clean ones, and one memory per seed (as heads)."""
    keys, values, clean, memories = [], [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        keys.append(torch.nn.functional.normalize(torch.randn(N_PAIRS, WIDTH, generator=generator), dim=-1))
        values.append(torch.randn(N_PAIRS, WIDTH, generator=generator))
        hit = torch.randperm(N_PAIRS, generator=generator)[: round(OUTLIERS * N_PAIRS)]
        kept = torch.ones(N_PAIRS, dtype=torch.bool).index_fill(0, hit, False)
        clean.append(kept)
        values[-1] = values[-1] * torch.where(kept | (not outliers), 1.0, FACTOR)[:, None]
        memories.append(mlp().init(1, WIDTH, WIDTH, generator=generator))
    fast = tuple(torch.cat(matrices) for matrices in zip(*(memory.fast for memory in memories), strict=True))
    slow = tuple(torch.cat(vectors) for vectors in zip(*(memory.slow for memory in memories), strict=True))
    return torch.stack(keys, 1)[None], torch.stack(values, 1)[None], torch.stack(clean, 1)[None], Parameters(fast, slow)


def recall(bias: AttentionalBias, eta: float, seeds: range, *, outliers: bool) -> Tensor:
    """Mean cosine on the clean pairs, one number per seed; -1 where the memory has diverged."""
    k, v, clean, memory = pairs(seeds, outliers=outliers)
    spec = MirasSpec(memory=mlp(), bias=bias, retention=none(), rule=gd(), chunk_size=CHUNK)
    own = {name: torch.ones(k.shape[:3]) for name in bias.gates}
    with torch.no_grad():
        _, state = scan(spec, k, k, v, {"eta": torch.full(k.shape[:3], eta), **own}, parameters=memory)
        answers, _ = scan(spec, k, k, v, {"eta": torch.zeros(k.shape[:3]), **own}, state, parameters=memory)
    cosine = torch.nn.functional.cosine_similarity(answers, v, dim=-1)
    found = torch.where(clean, cosine, 0.0).sum(1)[0] / clean.sum(1)[0]
    return torch.where(answers.isfinite().all(-1).all(1)[0], found, -1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    rows = []
    for name, bias in BIASES.items():
        row: dict[str, object] = {"bias": name}
        for outliers in (False, True):
            tuned = {eta: float(recall(bias, eta, TUNING_SEEDS, outliers=outliers).mean()) for eta in ETAS}
            eta = max(tuned, key=lambda step: tuned[step])
            found = recall(bias, eta, SEEDS, outliers=outliers)
            label = "outliers" if outliers else "clean"
            row[label] = [round(float(value), 4) for value in found]
            row[f"eta_{label}"] = eta
        rows.append(row)
    seeds = f"seeds {SEEDS[0]} to {SEEDS[-1]}"
    print(f"| bias | clean: mean | outliers: mean | {seeds} with outliers | eta clean, outliers |")
    print("|---|---|---|---|---|")
    for row in rows:
        clean, hit = torch.tensor(row["clean"]), torch.tensor(row["outliers"])
        print(
            f"| {row['bias']} | {clean.mean():.3f} | {hit.mean():.3f} | {', '.join(f'{x:.3f}' for x in hit)} "
            f"| {row['eta_clean']:.2g}, {row['eta_outliers']:.2g} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
