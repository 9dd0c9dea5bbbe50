"""The state of the update in checkpoints: the optimizer's, the loss scale, and the number of skipped steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbgd.checkpoints.snapshot import Snapshot
from mbgd.checks.setup import Setup
from mbgd.step.optimizer_state import OptimizerState
from mbgd.step.sharding import Sharded

_PLAIN = (bool, int, float, str, tuple)


class UpdateState:
    """One part of a checkpoint. With sharding the optimizer's state may have to be gathered to be read."""

    def __init__(
        self, setup: Setup, sharded: Sharded | None, scaler: torch.amp.GradScaler | None, num_skipped: Tensor
    ) -> None:
        """num_skipped: number of steps skipped so far, shape (); what is restored is written into it."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in setup.trained.by_name.items()}
        whole = setup.optimizer if sharded is None else sharded.state.whole
        self._optimizer = OptimizerState(whole, has_schedule=setup.settings.schedule is not None, names=names)
        self._given = setup.optimizer
        """With sharding it holds pieces during training."""
        self._sharded, self._scaler, self._num_skipped = sharded, scaler, num_skipped

    def problems(self) -> list[str]:
        """State that a checkpoint cannot hold, the same on every worker; every worker calls this after a step."""
        find = self._optimizer.problems
        return find() if self._sharded is None else self._sharded.state.problems(find)

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The optimizer's state by <parameter's number>.<path>, not copied."""
        return {"optimizer": self._optimizer.tensors()}

    def values(self) -> Mapping[str, Any]:
        """The rest of the state, as JSON can hold it."""
        return {"optimizer": {**self._optimizer.values(), **self._beside()}}

    def mismatches(self, snapshot: Snapshot) -> list[str]:
        """What in the snapshot cannot be state of this optimizer."""
        return self._optimizer.mismatches(snapshot.tensors["optimizer"], snapshot.values["optimizer"])

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the snapshot's state; no memory is shared with it afterwards."""
        values = snapshot.values["optimizer"]

        def restore() -> None:
            self._optimizer.restore(snapshot.tensors["optimizer"], values)

        if self._sharded is None:
            restore()
        else:
            self._sharded.state.replace(restore)
        self._set_beside(values["skipped_steps"], values.get("scaler"))
        self.begin(snapshot.step)

    def begin(self, step: int) -> None:
        """With sharding: let all workers' pieces be those of the parameters and the state of now, after `step` steps.

        Every worker calls this. ReplicasDiffer if the parameters differ.
        """
        if self._sharded is not None:
            self._sharded.begin(step)
            self.keep(step)
            if self._sharded.kept is not None:
                self._sharded.replicas.workers.barrier()  # all have kept theirs

    def keep(self, step: int) -> None:
        """Keep what this worker alone has of the state after `step` steps, for the others."""
        if self._sharded is not None and self._sharded.kept is not None:
            scaler = None if self._scaler is None else self._scaler.state_dict()
            beside = _Beside(list(map(_copied, self._given.param_groups)), self._num_skipped.clone(), scaler)
            self._sharded.kept.keep(step, self._sharded.state, beside)

    def recall(self, step: int) -> bool:
        """Have the whole state after `step` steps on this worker, without the others, of which some may be lost.

        The optimizer then holds the parameters. False, with nothing changed, where that is not known.
        """
        if self._sharded is None or not self._sharded.state.holds_pieces:
            return True
        kept = self._sharded.kept
        beside: _Beside | None = None if kept is None else kept.recall(step, self._sharded.state)
        if beside is None:
            return False
        for group, options in zip(self._given.param_groups, beside.groups, strict=True):
            group.update(options)
        self._set_beside(beside.num_skipped, beside.scaler)
        return True

    def _set_beside(self, num_skipped: int | Tensor, scaler: dict[str, Any] | None) -> None:
        self._num_skipped.fill_(num_skipped)
        if self._scaler is not None and scaler is not None:
            self._scaler.load_state_dict(scaler)

    @property
    def copied(self) -> "Copied":
        return Copied(self)

    @property
    def is_copied(self) -> bool:
        """Whether every worker has a copy of all of it, instead of its own pieces."""
        return self._sharded is None or self._sharded.state.is_everywhere

    def beside_pieces(self) -> dict[str, Any]:
        """What every worker has a copy of in any case."""
        groups = [{k: v for k, v in group.items() if isinstance(v, _PLAIN)} for group in self._given.param_groups]
        return {"groups": groups, **self._beside()}

    def _beside(self) -> dict[str, Any]:
        values: dict[str, Any] = {"skipped_steps": int(self._num_skipped.item())}
        if self._scaler is not None:
            values["scaler"] = self._scaler.state_dict()
        return values


@dataclass(frozen=True)
class _Beside:
    """What every worker has a copy of."""

    groups: list[dict[str, Any]]
    num_skipped: Tensor
    scaler: dict[str, Any] | None


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options that an optimizer may change in place."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if isinstance(value, (Tensor, *_PLAIN))
    }


@dataclass(frozen=True)
class Copied:
    """The part of the state that every worker has a copy of, to be compared."""

    state: UpdateState

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        return self.state.tensors() if self.state.is_copied else {}

    def values(self) -> Mapping[str, Any]:
        return self.state.values() if self.state.is_copied else {"optimizer": self.state.beside_pieces()}
