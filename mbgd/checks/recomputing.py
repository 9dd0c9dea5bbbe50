"""Finds hardware that computes wrongly: at some steps another worker computes one micro-batch again.

With averaging=reproducible a micro-batch's gradient is a function of (seed, step, micro-batch) alone, to the bit,
whichever worker computes it. At the checked steps, another worker computes one micro-batch, chosen by the step, again
before gradients are averaged, and the workers compare its bits and those of their parameters. If they differ, a third
worker computes it too, and the run ends before the optimizer steps.
"""

import socket
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mbgd.averaging.norms import MicroBatchNorms
from mbgd.batches.loader import Examples, Shard
from mbgd.batches.order import mix
from mbgd.batches.plan import cut
from mbgd.checks.replicas import checksum
from mbgd.checks.setup import Setup
from mbgd.config.duration import whole
from mbgd.errors import ComputedWrongly
from mbgd.text.listing import shown

_CHOICE = 0x6C656166  # different from all other keys

GradientsOf = Callable[[int, Examples], dict[Tensor, Tensor]]

Sums = list[int]
"""One checksum for each trained parameter: of its gradient, or of its values."""


class _Seen(MicroBatchNorms):
    """Takes the checksums of one micro-batch's gradients as the averaging gets them."""

    def __init__(self, parameters: Sequence[Tensor], number: int, device: torch.device) -> None:
        super().__init__(parameters)
        self._number, self._device = number, device
        self._sums: dict[Tensor, Tensor] = {}

    def take(
        self, number: int, gradients: Mapping[Tensor, Tensor], before: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        if number == self._number:
            self._sums.update({p: checksum([gradient], self._device) for p, gradient in gradients.items()})
        super().take(number, gradients, before)

    def sums(self) -> Sums | None:
        """None if this worker did not compute the micro-batch; a parameter without a gradient has checksum 0."""
        if not self._sums:
            return None
        return [int(self._sums[p]) if p in self._sums else 0 for p in self._parameters]


class Recomputing:
    """Chooses the micro-batches, and compares their gradients; for `check.recompute_every_steps`."""

    def __init__(self, setup: Setup, every_steps: int, gradients_of: GradientsOf) -> None:
        self._every_steps, self._plan, self._workers = every_steps, setup.plan, setup.workers
        self._seed, self._examples_of = setup.settings.seed, setup.loader.micro_batch
        self._names, self._parameters = list(setup.trained.by_name), setup.trained.parameters
        self._gradients_of = gradients_of
        self._seen: _Seen | None = None

    @classmethod
    def of(cls, setup: Setup, gradients_of: GradientsOf) -> "Recomputing | None":
        """None if the run has no `check.recompute_every_steps`.

        gradients_of(step, examples): the gradients of Σ w L, as the averaging gets them; it changes no state.
        """
        every_steps = setup.settings.check.recompute_every_steps
        return None if every_steps is None else cls(setup, whole(every_steps), gradients_of)

    def watch(self, step: int, norms: MicroBatchNorms | None) -> MicroBatchNorms | None:
        """The norms for the averaging of this step: at a checked step they take checksums, otherwise `norms`."""
        self._seen = None
        if (step + 1) % self._every_steps:
            return norms
        self._seen = _Seen(self._parameters, self.leaf(step), self._workers.device)
        return self._seen

    def leaf(self, step: int) -> int:
        """Number of the micro-batch that is computed again."""
        return mix(self._seed, step, _CHOICE) % self._num_leaves(step)

    def owner(self, step: int) -> int:
        """Rank of the worker whose shard has that micro-batch."""
        num_leaves, num_workers = self._num_leaves(step), self._workers.num_workers
        edges = [cut(num_leaves, num_workers, rank + 1) for rank in range(num_workers)]
        return next(rank for rank, edge in enumerate(edges) if self.leaf(step) < edge)

    def check(self, shard: Shard) -> None:
        """ComputedWrongly, on every worker alike and before gradients are averaged, where bits differ."""
        if self._seen is None:
            return
        step, rank = shard.step, self._workers.rank
        owner, checker, third = self._judges(step)
        again = self._sums(step) if rank == checker else None
        mine = {
            "parameters": [int(checksum([p], self._workers.device)) for p in self._parameters],
            "first": self._seen.sums() if rank == owner else None,
            "again": again,
        }
        of_workers = self._workers.gather_values(mine)
        self._compare_parameters(step, [one["parameters"] for one in of_workers])
        first, again = of_workers[owner]["first"], of_workers[checker]["again"]
        if first != again:
            self._vote(step, first, again, third)

    def _judges(self, step: int) -> tuple[int, int, int | None]:
        """(owner, checker, voter), by rank. One worker is all three; with two workers there is no voter."""
        num_workers, owner = self._workers.num_workers, self.owner(step)
        if num_workers == 1:
            return owner, owner, owner
        distance = 1 + mix(self._seed, step, _CHOICE, 1) % (num_workers - 1)
        checker = (owner + distance) % num_workers
        others = [rank for rank in range(num_workers) if rank not in (owner, checker)]
        return owner, checker, others[0] if others else None

    def _vote(self, step: int, first: Sums | None, again: Sums, third: int | None) -> None:
        owner, checker, _ = self._judges(step)
        voters = [third] if third is not None else [owner, checker]
        votes = self._workers.gather_values(self._sums(step) if self._workers.rank in voters else None)
        if third is not None:
            agrees = {"again": votes[third] == again, "first": votes[third] == first}
            guilty = [owner] if agrees["again"] else [checker] if agrees["first"] else [owner, checker, third]
        else:  # each computes once more: a worker that now agrees with the other was wrong the first time
            guilty = [rank for rank, other in ((owner, again), (checker, first)) if votes[rank] == other]
            guilty = guilty if len(guilty) == 1 else [owner, checker]
        names = [name for name, a, b in zip(self._names, first or again, again, strict=True) if a != b]
        raise ComputedWrongly(
            f"step {step + 1}: the gradient of micro-batch {self.leaf(step)} (of {shown(names, 3)}), "
            f"computed by worker {owner}, has other bits when worker {checker} "
            f"computes it. {self._convict(guilty, by_vote=third is not None)}"
        )

    def _compare_parameters(self, step: int, of_workers: list[Sums]) -> None:
        if all(one == of_workers[0] for one in of_workers):
            return
        usual = max(of_workers, key=lambda one: (of_workers.count(one), one == of_workers[0]))
        has_majority = of_workers.count(usual) * 2 > len(of_workers)
        guilty = [rank for rank, one in enumerate(of_workers) if one != usual or not has_majority]
        names = [name for n, name in enumerate(self._names) if any(one[n] != of_workers[0][n] for one in of_workers)]
        raise ComputedWrongly(
            f"step {step + 1}: the workers' copies of {shown(names, 3)} differ "
            f"before the update; at the last comparison they were the same. "
            f"{self._convict(guilty, by_vote=has_majority)}"
        )

    def _sums(self, step: int) -> Sums:
        gradients = self._gradients_of(step, self._examples_of(step, self.leaf(step)))
        device = self._workers.device
        return [int(checksum([gradients[p]], device)) if p in gradients else 0 for p in self._parameters]

    def _convict(self, guilty: Sequence[int], *, by_vote: bool) -> str:
        """The end of the message; every worker calls this."""
        device = self._workers.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        places = self._workers.gather_values([socket.gethostname(), f"{device} ({name})" if name != "cpu" else "cpu"])
        named = [f"worker {rank} (host {places[rank][0]}, device {places[rank][1]})" for rank in guilty]
        judged = f"By vote, {named[0]} is wrong" if by_vote and len(named) == 1 else None
        judged = judged or (f"{named[0]} is wrong" if len(named) == 1 else f"It is one of {', '.join(named)}")
        return (
            f"{judged}: its processor, memory or device computes other bits than the others. The step was not made. "
            "Take it out of service and start again: the same command goes on from the newest checkpoint."
        )

    def _num_leaves(self, step: int) -> int:
        return self._plan.num_micro_batches(self._plan.minibatch(step).size)
