"""An optimizer's state for checkpoints: its whole `state_dict`, checked against the state that it makes itself."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mbgd.errors import UsageError
from mbgd.files.state_tree import Flattening, in_order, unflatten
from mbgd.step.optimizer_trial import Kind, parameters_of, try_out


@dataclass(frozen=True)
class _Found:
    """State read from a checkpoint, by this optimizer's numbers of the parameters."""

    state: dict[Any, Any]
    more: dict[str, Any]
    """Other entries of the `state_dict`, which a class with its own may have."""
    groups: list[dict[str, Any]]


class OptimizerState:
    """Saves and restores the state of an optimizer.

    Tensors are named by their paths: 0.exp_avg, or 3.preconditioners.1 if there are lists. The values hold the
    nesting. Parameters are numbered in the order of the groups, as in `state_dict`.
    """

    def __init__(self, optimizer: Optimizer, *, has_schedule: bool, names: Mapping[Tensor, str] | None = None) -> None:
        """has_schedule: the learning rate follows from the step, so it is not state.

        names: the parameters' names, which match them with those of a checkpoint; without names their order counts.
        """
        self._optimizer = optimizer
        self._parameters = parameters_of(optimizer)
        self._not_moved = {"params", "param_names"} | ({"lr"} if has_schedule else set())
        self._first_groups = [self._group(group) for group in optimizer.param_groups]
        given = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
        by_order = given if len(given) == len(self._parameters) else [None] * len(self._parameters)
        self._names = [(names or {}).get(p, name) for p, name in zip(self._parameters, by_order, strict=True)]

    def problems(self) -> list[str]:
        """State that a checkpoint cannot hold; call this after the first step, when there is state."""
        try:
            self._flatten()
        except UsageError as error:
            return [str(error)]
        except Exception as error:  # from a state_dict() of the user's own
            return [f"the optimizer's state_dict() failed: {type(error).__name__}: {error}"]
        return []

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state by path, not copied; complex ones as pairs of real numbers."""
        return self._flatten()[0]

    def values(self) -> dict[str, Any]:
        """The rest of the state, as JSON can hold it."""
        return self._flatten()[1]

    def mismatches(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> list[str]:
        """What in a checkpoint's `tensors` and `values` cannot be state of this optimizer.

        A fused kernel would read past the end of a tensor that is too small, or pair the wrong elements.
        """
        numbers, found = self._new_numbers(values)
        if found:
            return found
        try:
            loaded = _loaded(tensors, values)
            paths = Flattening()
            state = self._decode(values, loaded, numbers).state
            for number, of_parameter in state.items():
                paths(of_parameter, str(number))
        except Exception as error:
            return [f"optimizer state cannot be read ({type(error).__name__}: {error})"]
        for name, order in _orders(tensors, values).items():
            dims = list(range(loaded[name].dim()))
            if not isinstance(order, list) or any(type(one) is not int for one in order) or sorted(order) != dims:
                return [f"optimizer state {name}: {order!r} is no order of its {len(dims)} dimensions"]
        found += self._odd_keys(values, state)
        for name in tensors.keys() - loaded.keys():
            number = name.partition(".")[0]
            is_known = number.isdecimal() and int(number) < len(self._parameters)
            what = "nothing says what it is" if is_known else f"there are {len(self._parameters)} parameters"
            found.append(f"optimizer state {name}: {what}")
        found += [problem for name, one in paths.tensors.items() if (problem := self._mismatch(name, one))]
        if self._is_known and self._made is not None:  # these make all state at once, and need all
            numbers_with_state = {str(number) for number, of_parameter in state.items() if of_parameter}
            missing = [n for n in self._made if n.partition(".")[0] in numbers_with_state and n not in paths.tensors]
            found += [f"optimizer state {name} is missing" for name in missing]
        return found

    def _odd_keys(self, values: Mapping[str, Any], state: Mapping[Any, Any]) -> list[str]:
        """Keys of the state that should be a parameter's number and are not, or that occur twice."""
        of_parameters = range(len(self._parameters))
        odd = [key for key in state if type(key) is not int or key not in of_parameters]
        if not self._is_known:
            odd = [key for key in odd if isinstance(key, int | float)]  # other optimizers may use texts as keys
        found = [f"optimizer state {key!r} belongs to no parameter; there are {len(of_parameters)}" for key in odd]
        entries = values.get("state")
        if isinstance(entries, list) and len(entries) != len(state):
            found.append("optimizer state: a parameter occurs twice")
        return found

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint that fits; no memory is shared with `tensors` afterwards."""
        numbers, _ = self._new_numbers(values)
        loaded, paths = _loaded(tensors, values), Flattening()
        for number, of_parameter in self._decode(values, loaded, numbers).state.items():
            paths(of_parameter, str(number))
        orders = _orders(tensors, values)
        placed = {name: self._placed(one, paths.names.get(id(one)), orders.get(name)) for name, one in loaded.items()}
        found = self._decode(values, placed, numbers)
        whole = self._optimizer.state_dict()
        more: dict[str, Any] = dict(found.more)
        if "param_groups" in whole:
            more["param_groups"] = [
                group | moved for group, moved in zip(whole["param_groups"], found.groups, strict=True)
            ]
        if type(self._optimizer).load_state_dict is not Optimizer.load_state_dict:
            self._optimizer.load_state_dict({**more, "state": found.state})
            return
        # torch's load_state_dict casts state to the parameter's dtype and breaks texts, so it gets only the groups.
        self._optimizer.load_state_dict({**more, "state": {}})
        for key, value in found.state.items():
            is_number = type(key) is int and key < len(self._parameters)
            self._optimizer.state[self._parameters[key] if is_number else key] = value

    def _flatten(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        whole = dict(self._optimizer.state_dict())
        whole.pop("param_groups", None)
        # By the parameters' numbers, not by when each was first used.
        state = sorted(whole.pop("state", {}).items(), key=lambda one: one[0] if type(one[0]) is int else math.inf)
        flattening = Flattening({id(p): "a parameter" for p in self._parameters})
        try:
            tree = {
                "state": [[flattening(k, str(k)), flattening(v, str(k))] for k, v in state],
                "more": {name: flattening(value, name) for name, value in whole.items()},
                "groups": [
                    {
                        name: flattening(group[name], f"groups.{index}.{name}")
                        for name, (value, holds_tensors) in self._group(group).items()
                        if holds_tensors or (value, holds_tensors) != self._first_groups[index].get(name)
                    }
                    for index, group in enumerate(self._optimizer.param_groups)
                ],
            }
        except UsageError as error:
            raise UsageError(f"optimizer state {error}") from error
        parameters = [[name, list(p.shape)] for name, p in zip(self._names, self._parameters, strict=True)]
        return flattening.tensors, {**tree, "parameters": parameters}

    def _group(self, group: Mapping[str, Any]) -> dict[str, tuple[Any, bool]]:
        """The values of a group that an optimizer may change: name → (as JSON, whether it holds tensors)."""
        found = {}
        for name, value in group.items():
            if name in self._not_moved:
                continue
            flattening = Flattening()
            try:
                tree = flattening(value, name)
            except UsageError:
                continue  # a function, a module: a setting, not state
            found[name] = tree, bool(flattening.tensors)
        return found

    def _new_numbers(self, values: Mapping[str, Any]) -> tuple[dict[int, int], list[str]]:
        """(number of a parameter in the checkpoint → in this optimizer, what does not fit)."""
        now = [[name, list(p.shape)] for name, p in zip(self._names, self._parameters, strict=True)]
        before = values.get("parameters", now)  # a checkpoint of an earlier version: by number
        if len(values["groups"]) != len(self._first_groups):
            return {}, [f"the optimizer had {len(values['groups'])} groups, it has {len(self._first_groups)}"]
        if all(name is not None for name, _ in (*before, *now)):
            numbers, found = {name: number for number, (name, _) in enumerate(now)}, []
            for name in {name for name, _ in before} ^ numbers.keys():
                found.append(f"optimizer parameter {name}: {'not before' if name in numbers else 'before, not now'}")
            return {} if found else {number: numbers[name] for number, (name, _) in enumerate(before)}, found
        shapes_before, shapes = [shape for _, shape in before], [shape for _, shape in now]
        if shapes_before != shapes:
            return {}, [f"the optimizer's parameters: shapes {shapes_before} before, {shapes} now"]
        return {number: number for number in range(len(now))}, []

    def _decode(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor], numbers: Mapping[int, int]) -> _Found:
        def decode(tree: Any) -> Any:
            return unflatten(tree, lambda name, _: tensors[name])

        state: dict[Any, Any] = {}
        for key, value in _state_tree(values, tensors):
            decoded = decode(key)
            state[numbers.get(decoded, decoded) if type(decoded) is int else decoded] = decode(value)
        more = {name: decode(value) for name, value in values.get("more", {}).items()}
        groups = [{name: decode(value) for name, value in group.items()} for group in values["groups"]]
        return _Found(state, more, groups)

    def _mismatch(self, name: str, tensor: Tensor) -> str:
        """What is wrong with a tensor of the state; empty if nothing."""
        parameter, got = self._parameter(name), Kind(tensor.shape, tensor.dtype, tensor.device)
        if parameter is None:
            return ""
        of_parameter = f"optimizer state {name}: shape {tuple(got.shape)}, of a parameter {tuple(parameter.shape)}"
        if self._made is None:
            # One number, or the parameter's shape, or that shape with some dimensions reduced to 1.
            fits = got.shape in ((), parameter.shape) or (
                not self._is_fused
                and len(got.shape) == parameter.dim()
                and all(have in (1, want) for have, want in zip(got.shape, parameter.shape, strict=True))
            )
            return of_parameter if self._is_known and not fits else ""
        made = self._made.get(name)
        if made is None or (got.shape, got.dtype) == (made.shape, made.dtype):
            return ""
        if got.shape != made.shape:
            return f"{of_parameter}; this optimizer makes {tuple(made.shape)}"
        return f"optimizer state {name}: {got}, where this optimizer makes {made}"

    def _placed(self, tensor: Tensor, name: str | None, order: list[int] | None) -> Tensor:
        """A copy of a checkpoint's tensor, on the device and with the strides that this optimizer would use.

        order: of the dimensions in memory when it was saved; None for the usual one.
        """
        made = None if self._made is None or name is None else self._made.get(name)
        parameter = None if name is None else self._parameter(name)
        if parameter is None:
            return tensor.clone()
        device = parameter.device if made is None else made.device
        if order is not None and not self._is_known:
            return in_order(tensor, order, device)
        if tensor.shape == parameter.shape:  # with its strides: fused kernels go through both in memory order
            return torch.empty_like(parameter, dtype=tensor.dtype, device=device, requires_grad=False).copy_(tensor)
        return torch.empty_like(tensor, device=device).copy_(tensor)

    def _parameter(self, name: str) -> Tensor | None:
        number = name.partition(".")[0]
        return self._parameters[int(number)] if number.isdecimal() and int(number) < len(self._parameters) else None

    @property
    def _is_known(self) -> bool:
        """Whether it is torch's or mbgd's own."""
        return type(self._optimizer).__module__.startswith(("torch.optim.", "mbgd.optimizers."))

    @property
    def _is_fused(self) -> bool:
        return any(group.get("fused") for group in self._optimizer.param_groups)

    @cached_property
    def _made(self) -> dict[str, Kind] | None:
        """The state that a step of this optimizer makes, by path; None if a trial step fails."""
        try:
            return try_out(self._optimizer)
        except Exception:  # its step needs a closure, an attribute cannot be copied, …
            return None


def _loaded(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that the values refer to."""
    loaded: dict[str, Tensor] = {}
    for node in _nodes(_trees(tensors, values)):
        name = node["tensor"]
        if name not in loaded:
            loaded[name] = torch.view_as_complex(tensors[name]) if node.get("complex") else tensors[name]
    return loaded


def _orders(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """The order of the dimensions in memory of those tensors that are not in the usual one."""
    return {node["tensor"]: node["order"] for node in _nodes(_trees(tensors, values)) if "order" in node}


def _trees(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> list[Any]:
    return [values.get("more", {}), values["groups"], _state_tree(values, tensors)]


def _nodes(tree: Any) -> Iterator[Mapping[str, Any]]:
    """Those that stand for a tensor."""
    if isinstance(tree, Mapping):
        if isinstance(tree.get("tensor"), str):
            yield tree
        for value in tree.values():
            yield from _nodes(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _nodes(value)


def _state_tree(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sequence[Any]:
    """[key, value] pairs of the state; a checkpoint of an earlier version has {"0.step": 3} beside its tensors."""
    if not isinstance(values["state"], Mapping):
        pairs: Sequence[Any] = values["state"]
        return pairs
    state: dict[int, list[Any]] = {}
    for key, value in {**values["state"], **{name: {"tensor": name} for name in tensors}}.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), []).append([name, value])
    return [[number, {"dict": pairs}] for number, pairs in state.items()]
