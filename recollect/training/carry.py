"""Memories that go on from one update to the next: truncated back-propagation through time.

The rows of an update are lanes; lane i of the next update continues lane i of this one. The graph is cut between updates.

Axis legend: n lanes of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recollect import state as states
from recollect.models import RecollectCache, RecollectForCausalLM
from recollect.training.world import World


class Carry:
    """The caches of every micro-batch of this process.

    In a checkpoint each lane is a tensor of its own per leaf of the states, named by the lane's number among all processes, so that
    another number of processes or another micro-batch finds its lanes again.

    Args:
        model: whose states they are. Its mixers need states of constant size.
        n_lanes: rows of this process's share of a batch.
        micro_batch: rows handled at once; n_lanes is a multiple of it.
        world: the processes that read different rows; lane i of process r is number i * size + r.
    """

    def __init__(self, model: RecollectForCausalLM, *, n_lanes: int, micro_batch: int, world: World) -> None:
        self.world, self.micro_batch, self.device = world, micro_batch, world.device
        self.like = model.init_states(1)
        self.caches: list[RecollectCache | None] = [None] * (n_lanes // micro_batch)

    def before(self, n: int, n_rows: int) -> RecollectCache:
        """The cache that micro-batch n of `n_rows` rows continues."""
        if n_rows != self.micro_batch:
            raise ValueError(f"carried memories have {self.micro_batch} rows; the batch has {n_rows}")
        cache = self.caches[n]
        if cache is None:
            cache = self.caches[n] = RecollectCache([None] * len(self.like))
        return cache

    def after(self, n: int) -> None:
        """Cut the graph behind micro-batch n."""
        cache = self.caches[n]
        assert cache is not None
        cache.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Every lane's leaves by name, and how many tokens it has seen."""
        named: dict[str, Tensor] = {}
        for n, cache in enumerate(self.caches):
            if cache is not None and cache.n_seen:
                for i in range(self.micro_batch):
                    lane = self._name(n, i)
                    named[f"{lane}.n_seen"] = torch.tensor([cache.n_seen])
                    named.update({f"{lane}.{name}": leaf[i : i + 1] for name, leaf in states.leaves(cache.states)})
        return named

    def expected(self) -> dict[str, Tensor]:
        """What a checkpoint may hold for this process, as examples of the right dtype."""
        leaves = dict(states.leaves(self.like))
        return {
            f"{self._name(n, i)}.{name}": leaf
            for n in range(len(self.caches))
            for i in range(self.micro_batch)
            for name, leaf in [("n_seen", torch.zeros(1, dtype=torch.int64)), *leaves.items()]
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in what a checkpoint held.

        Raises:
            ValueError: it holds some lanes of this process and not others: it is of another batch size.
        """
        for n in range(len(self.caches)):
            lanes = [self._name(n, i) for i in range(self.micro_batch)]
            known = [lane for lane in lanes if f"{lane}.n_seen" in tensors]
            if not known:
                continue
            if len(known) < len(lanes):
                raise ValueError(f"the checkpoint has no memory of {lanes[-1]}: it was written with another batch")
            leaves = (torch.cat([tensors[f"{lane}.{name}"] for lane in lanes]) for name, _ in states.leaves(self.like))
            layers = states.filled(self.like, (leaf.to(self.device) for leaf in leaves))
            self.caches[n] = RecollectCache(layers, n_seen=int(tensors[f"{lanes[0]}.n_seen"]))

    def _name(self, n: int, i: int) -> str:
        return f"carried.{(n * self.micro_batch + i) * self.world.size + self.world.rank:06d}"
