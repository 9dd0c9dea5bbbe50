"""The state of a run in the memory of its workers, for the group that goes on after workers were lost or have come.

Workers differ by at most one step: no worker finishes a step without all others. The one that is furthest gives its
state to those that are behind, and to those that are new.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mbgd.checkpoints.snapshot import Snapshot
from mbgd.workers.group import Workers
from mbgd.workers.messages import bytes_of, empty

Told = tuple[str, int, Any]
"""What a tracker was told after a step: its method, the step, and the method's other arguments."""


@dataclass
class Progress:
    """How much of what follows a step is done: evaluating, asking the observers, saving."""

    step: int = 0
    """Optimizer steps completed."""
    evaluation: dict[str, float] | None = None
    """The metrics of this step's evaluation, once there was one."""
    stops: list[str] | None = None
    """The observers that want to stop after this evaluation, once they were asked."""
    is_over: bool = False
    """Everything is done, and the next step may have begun."""

    @property
    def order(self) -> tuple[int, bool, bool, bool]:
        """Larger for a worker that is further."""
        return self.step, self.is_over, self.stops is not None, self.evaluation is not None


@dataclass(frozen=True)
class Carried:
    """What a worker takes with it from one group to the next."""

    snapshot: Snapshot
    progress: Progress
    told: list[Told] = field(default_factory=list)
    """What the main worker's trackers were told after the last step, or have to be."""


def hand_over(workers: Workers, mine: Carried | None) -> Carried | None:
    """The state of the worker that is furthest, on every worker; None if no worker has any.

    mine: None where this worker is new, or was lost to the others before it had a state.
    """
    orders = workers.gather_values(None if mine is None else list(mine.progress.order))
    known = [order for order in orders if order is not None]
    if not known:
        return None
    if mine is not None and len(known) == len(orders) and all(order == known[0] for order in known):
        return mine
    source = orders.index(max(known))
    header: Any = None
    if workers.rank == source:
        assert mine is not None
        tensors = mine.snapshot.tensors
        kinds = {file: {name: [list(t.shape), str(t.dtype)] for name, t in tensors[file].items()} for file in tensors}
        header = [kinds, {"values": mine.snapshot.values, "told": mine.told, **asdict(mine.progress)}]
    kinds, rest = workers.broadcast(header, source=source)
    received: dict[str, dict[str, torch.Tensor]] = {}
    for file, of_file in kinds.items():
        received[file] = {}
        for name, (shape, dtype) in of_file.items():
            tensor = mine.snapshot.tensors[file][name] if mine and workers.rank == source else empty(shape, dtype)
            if tensor.numel():
                workers.broadcast_(bytes_of(tensor), source=source)
            received[file][name] = tensor
    return _carried(received, rest)


def _carried(tensors: dict[str, dict[str, torch.Tensor]], rest: dict[str, Any]) -> Carried:
    values, told = rest.pop("values"), [(method, step, given) for method, step, given in rest.pop("told")]
    progress = Progress(**rest)
    return Carried(Snapshot(progress.step, tensors, values), progress, told)
