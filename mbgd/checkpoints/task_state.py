"""The state of model and objective in checkpoints and exports: parameters, buffers and extra state, by plain names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mbgd.checkpoints.snapshot import Snapshot, Tensors
from mbgd.errors import UsageError
from mbgd.task import extra_state
from mbgd.task.buffers import Buffers
from mbgd.task.task import OBJECTIVE, Task, plain_name


class TaskState:
    """The state of model and objective. Tied parameters are kept once."""

    def __init__(self, task: Task, buffers: Buffers) -> None:
        self._task, self._buffers = task, buffers
        self._kept: Snapshot | None = None

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """All state tensors, not copied: under "model" and, if the objective has state, under "objective"."""
        kept, _ = extra_state.split(extra_state.extra_state(self._task))
        tensors = {**self._task.parameters_by_name(), **self._buffers.tensors(), **kept}
        tensors = {name: _storable(tensor) for name, tensor in tensors.items()}
        if self._task.objective is None:
            return {"model": tensors}
        objective = {name.removeprefix(OBJECTIVE): t for name, t in tensors.items() if name.startswith(OBJECTIVE)}
        model = {name: t for name, t in tensors.items() if not name.startswith(OBJECTIVE)}
        return {"model": model, "objective": objective} if objective else {"model": model}

    def values(self) -> Mapping[str, Any]:
        """Extra state that is not tensors, and the names that an export needs (see `_export_names`)."""
        _, others = extra_state.split(extra_state.extra_state(self._task))
        return {"extra_state": others, "export": self._export_names()}

    def snapshot(self, step: int) -> Snapshot:
        """Copies of all of it, after `step` steps, where the tensors are."""
        tensors = {
            file: {name: tensor.detach().clone() for name, tensor in named.items()}
            for file, named in self.tensors().items()
        }
        return Snapshot(step, tensors, dict(self.values()))

    def keep(self, step: int) -> None:
        """Remember the state of now for `put_back`."""
        self._kept = self.snapshot(step)

    def forget(self) -> None:
        """Forget the state that was kept."""
        self._kept = None

    def put_back_kept(self) -> None:
        """Have the state that was kept, if one was."""
        if self._kept is not None:
            self.restore(self._kept)

    def put_back(self) -> None:
        """Have the state that was kept; where none was, the buffers from before a step that was not finished."""
        if self._kept is None:
            self._buffers.put_back()
        else:
            self.restore(self._kept)

    def objective(self) -> dict[str, Tensor]:
        """Parameters, buffers and extra-state tensors of the objective, on the CPU; empty if it has none."""
        tensors = self.tensors().get("objective", {})
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    def _export_names(self) -> dict[str, str]:
        """Each name in the model's `state_dict` → the name in `tensors`; tied parameters have several names."""
        tensors = {**self._task.parameters_by_name(), **self._buffers.tensors()}
        names = {id(tensor): name for name, tensor in tensors.items()}
        exported = self._task.model.state_dict(keep_vars=True)
        return {
            plain_name(name): names.get(id(value), plain_name(name))
            for name, value in exported.items()
            if isinstance(value, Tensor)
        }

    def mismatches(self, snapshot: Snapshot) -> list[str]:
        """Tensors of the checkpoint that do not fit, with both kinds."""
        now, then = _flat(self.tensors()), _flat(snapshot.tensors)
        optional = self._buffers.recomputable()
        return [
            f"{name}: {_kind(then.get(name))} before, {_kind(now.get(name))} now"
            for name in sorted(now.keys() | then.keys())
            if _kind(now.get(name)) != _kind(then.get(name)) and name not in optional
        ]

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the tensors and values that fit."""
        then, values = _flat(snapshot.tensors), snapshot.values
        with torch.no_grad():
            for name, tensor in {**self._task.parameters_by_name(), **self._buffers.tensors()}.items():
                if name in then and then[name].shape == _storable(tensor).shape:
                    _storable(tensor).copy_(then[name])
        state = {name: then[name].clone() for name in extra_state.extra_state(self._task) if name in then}
        extra_state.set_extra_state(self._task, {**state, **values.get("extra_state", {})})


def exported(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `model.state_dict()` by plain names, tied ones under each name, on the CPU.

    Extra state that is not a tensor is left out, and complex128 becomes pairs of float64: safetensors holds neither.
    """
    return {
        plain_name(name): _storable(value.detach()).cpu().clone().contiguous()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def exported_tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    """The tensors for the model's `load_state_dict`; checkpoints of older versions hold other buffers, too."""
    tensors = snapshot.tensors["model"]
    names = snapshot.values.get("export")
    if not isinstance(names, dict) or not set(names.values()) <= tensors.keys():
        return dict(tensors)
    return {name: tensors[kept].clone() for name, kept in names.items()}


def with_other_weights(snapshot: Snapshot, name: str) -> Snapshot:
    """The snapshot with the parameters that an observer, such as a moving average, keeps in its state.

    UsageError if the snapshot holds none.
    """
    prefix = f"{name}.average."
    average = {
        one.removeprefix(prefix): t
        for one, t in snapshot.tensors.get("observers", {}).items()
        if one.startswith(prefix)
    }
    if not average:
        raise UsageError(
            f"the checkpoint of step {snapshot.step} holds the model's own weights alone, no {name}: it was trained "
            f"without {name}.decay, or the average had not begun."
        )
    own = snapshot.tensors
    tensors = {
        file: {one: average.get(f"{before}{one}", t).to(t.dtype) for one, t in own[file].items()}
        for file, before in (("model", ""), ("objective", OBJECTIVE))
        if file in own
    }
    return replace(snapshot, tensors={**own, **tensors})


def _storable(tensor: Tensor) -> Tensor:
    """The tensor; complex128, which safetensors does not have, as a view of float64 pairs."""
    return torch.view_as_real(tensor) if tensor.dtype is torch.complex128 else tensor


def _flat(files: Tensors) -> dict[str, Tensor]:
    objective = {f"{OBJECTIVE}{name}": tensor for name, tensor in files.get("objective", {}).items()}
    return {**files.get("model", {}), **objective}


def _kind(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
