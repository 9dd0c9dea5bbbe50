"""How far a run is: the step, the last metrics, and the trackers' run ids."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from mbgd.checkpoints.format import differences
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.checks.same_program import of_training_examples
from mbgd.checks.setup import Setup
from mbgd.files import strict_json


class RunState:
    """One part of a checkpoint, beside the task, the optimizer and the noise scale."""

    def __init__(self, setup: Setup) -> None:
        self.step = 0
        """Optimizer steps completed."""
        self.metrics: dict[str, float] = {}
        """The last value of each metric."""
        self.tracking: dict[str, str] = {}
        """The trackers' run ids, so that a resumed run continues them."""
        self._setup = setup
        self._must_match: dict[str, Any] = {
            "number of training examples": setup.plan.num_examples,
            "batch.size": setup.plan.minibatch_size,
            "optimizer": type(setup.optimizer).__name__,
        }
        """What must be the same, beside the model, for a run to restore the state of another."""
        if setup.data.order is not None:
            self._must_match["data.order"] = setup.data.order.described()

    @cached_property
    def _examples(self) -> dict[str, str]:
        return of_training_examples(self._setup.data)

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {}

    def values(self) -> Mapping[str, Any]:
        return {
            "metrics": dict(self.metrics),
            "run": dict(self._must_match),
            "tracking": dict(self.tracking),
            "examples": dict(self._examples),
        }

    def mismatches(self, snapshot: Snapshot) -> list[str]:
        return differences(snapshot.values["run"], self._must_match)

    def restore(self, snapshot: Snapshot) -> None:
        self.step, self.metrics = snapshot.step, strict_json.numbers(snapshot.values["metrics"])
        self.tracking = dict(snapshot.values.get("tracking", {}))
        before = snapshot.values.get("examples", {})
        if other := [end for end, look in self._examples.items() if before.get(end, look) != look]:
            # No error: a decoder of images may give other bits on another host.
            self._setup.tell(
                f"warning: the {' and the '.join(other)} training example is not what it was when this state was saved "
                f"after step {self.step}. Training goes on with other data from here."
            )
