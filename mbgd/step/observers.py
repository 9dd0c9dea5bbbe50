"""Observers of a run: they see each step and evaluation, may stop training, and may keep state in checkpoints."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mbgd.checkpoints.snapshot import Snapshot
from mbgd.errors import ObserverFailed, UsageError
from mbgd.files.observed import Write
from mbgd.files.state_tree import Flattening, unflatten
from mbgd.step.done import Done
from mbgd.workers.group import Workers

METHODS = (
    "before_training",
    "with_writer",
    "at_start",
    "after_update",
    "after_evaluation",
    "other_weights",
    "at_end",
)
STATE = ("state_dict", "load_state_dict")
FILE = "observers"


class Observers:
    """Calls each observer's methods in order; one part of a checkpoint.

    An observer is an object with any of these methods:
    - `before_training(trainer)`: once the trainer is made, before its state is restored;
    - `with_writer(write)`: before the first step that this process makes. From then on `write(step, values)` appends
      {"step": step, **values} to observed/NAME.jsonl in the run's folder; only the main worker's lines are written;
    - `at_start(step)`: before the first step that this process makes, after `step` steps;
    - `after_update(done)`: after each step, with a `Done`;
    - `after_evaluation(step, metrics)`: returns True to stop training;
    - `other_weights()`: a context in which the model has other weights. They are evaluated as well, as eval/NAME/…,
      unless the observer's attribute `evaluate` is False, and exported as model_NAME.safetensors;
    - `at_end()`: after the last checkpoint. It may change the weights to those of an earlier step, and then returns
      that step's number.
    With `state_dict()` and `load_state_dict(state)` its state is part of the checkpoints. Every worker has one, and all
    must do the same.
    """

    def __init__(self, given: Mapping[str, Any] | Sequence[Any], workers: Workers, names: list[str]) -> None:
        """given: by name, or a list, named by their attribute `name` or their class. names: of the metrics that an
        evaluation gives; those of other weights are added. UsageError where one has none of the methods."""
        self._by_name, self._workers = _named(given), workers
        self.other_weights = dict(self._methods("other_weights"))
        """Name → context in which the model has other weights."""
        self._evaluated = [name for name in self.other_weights if getattr(self._by_name[name], "evaluate", True)]
        self.names_of_other_weights = [_renamed(metric, name) for name in self._evaluated for metric in names]
        """Names of the metrics that an evaluation of other weights gives."""
        if twice := sorted({*names} & {*self.names_of_other_weights}):
            raise UsageError(f"two evaluations give {twice[0]}: an evaluation set and an observer have one name.")
        names += self.names_of_other_weights
        self.stopped_by = ""
        """The name of the observer that stopped training; empty while none has."""
        self._with_state = {name: one for name, one in self._by_name.items() if all(hasattr(one, m) for m in STATE)}
        self._after_update = list(self._methods("after_update"))
        self._after_evaluation = dict(self._methods("after_evaluation"))

    def of_users(self) -> list[str]:
        """Names of those whose classes are not mbgd's own."""
        return [name for name, one in self._by_name.items() if not type(one).__module__.startswith("mbgd.")]

    @property
    def act_at_end(self) -> bool:
        """Whether any may change the weights once training is over."""
        return any(True for _ in self._methods("at_end"))

    def before_training(self, trainer: Any) -> None:
        for name, method in self._methods("before_training"):
            try:
                method(trainer)
            except UsageError as error:
                raise UsageError(f"observers.{name}: {error}") from error

    def at_start(self, step: int, write: Write) -> None:
        for name, method in self._methods("with_writer"):
            with _failing(name, "with_writer"):
                method(partial(write, name))
        for name, method in self._methods("at_start"):
            with _failing(name, "at_start"):
                method(step)

    def at_end(self) -> int | None:
        """The step whose weights the model has now, if that is not the last; otherwise None."""
        step = None
        for name, method in self._methods("at_end"):
            with _failing(name, "at_end"):
                found = method()
                step = step if found is None else found
        return step

    def evaluated(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The metrics with the model's own weights, and those with other weights."""
        metrics = evaluate()
        for name in self._evaluated if metrics else ():
            with self.other_weights[name]():
                metrics |= {_renamed(metric, name): value for metric, value in evaluate().items()}
        return metrics

    def after_update(self, done: Done) -> None:
        for name, method in self._after_update:
            with _failing(name, "after_update"):
                method(done)

    def after_evaluation(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Tell each; returns the names of those that want to stop."""
        stops = []
        for name, method in self._after_evaluation.items():
            with _failing(name, "after_evaluation"):
                if method(step, dict(metrics)):
                    stops.append(name)
        return stops

    def stop(self, step: int, stops: Sequence[str]) -> None:
        """Stop after this step if any wants to. UsageError, on every worker, where they do not decide alike."""
        if self._after_evaluation and self._workers.num_workers > 1:
            of_workers = self._workers.gather_values(stops)
            for name in self._after_evaluation:
                ranks = [rank for rank, names in enumerate(of_workers) if name in names]
                if len(ranks) not in (0, self._workers.num_workers):
                    raise UsageError(
                        f"observers.{name} stops training after step {step} on the workers {ranks} alone. An observer "
                        "must decide the same on every worker: from the metrics and the step, which all workers share."
                    )
        if stops:
            self.stopped_by = stops[0]

    def problems(self) -> list[str]:
        """State that a checkpoint cannot hold."""
        found = []
        for name in self._with_state:
            try:
                self._tree(name, Flattening())
            except UsageError as error:
                found.append(str(error))
        return found

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        tensors = self._flatten()[1]
        return {FILE: tensors} if tensors else {}

    def values(self) -> Mapping[str, Any]:
        trees = self._flatten()[0]
        return {"observers": trees, "stopped_by": self.stopped_by} if self._by_name else {}

    def mismatches(self, snapshot: Snapshot) -> list[str]:
        then, now = snapshot.values.get("observers", {}).keys(), self._with_state.keys()
        found = [f"observers.{name}: the checkpoint has no state of it" for name in now if name not in then]
        for name in now & then:
            try:
                self._state(snapshot, name)
            except Exception as error:
                found.append(f"observers.{name}: its state cannot be read ({type(error).__name__}: {error})")
        return found

    def restore(self, snapshot: Snapshot) -> None:
        stopped_by = str(snapshot.values.get("stopped_by", ""))
        self.stopped_by = stopped_by if stopped_by in self._by_name else ""  # without it, the run goes on
        for name, one in self._with_state.items():
            with _failing(name, "load_state_dict"):
                one.load_state_dict(self._state(snapshot, name))

    def _flatten(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        flatten = Flattening()
        trees = {name: self._tree(name, flatten) for name in self._with_state}
        return trees, flatten.tensors

    def _tree(self, name: str, flatten: Flattening) -> Any:
        """The observer's state as JSON; its tensors are added to `flatten`."""
        with _failing(name, "state_dict"):
            return flatten(self._with_state[name].state_dict(), name)

    def _state(self, snapshot: Snapshot, name: str) -> Any:
        """The observer's state in the snapshot, as copies."""
        tensors = snapshot.tensors.get(FILE, {})
        copies = {one: tensor.clone() for one, tensor in tensors.items() if one.startswith(f"{name}.")}
        tree = snapshot.values["observers"][name]
        return unflatten(tree, lambda one, pairs: torch.view_as_complex(copies[one]) if pairs else copies[one])

    def _methods(self, method: str) -> Iterator[tuple[str, Any]]:
        for name, one in self._by_name.items():
            if found := getattr(one, method, None):
                yield name, found


def _renamed(metric: str, name: str) -> str:
    return f"eval/{name}/{metric.removeprefix('eval/')}"


def _named(given: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        names = [str(getattr(one, "name", type(one).__name__)) for one in given]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UsageError(f"observers: two are named {twice[0]}. Name them: observers={{'a': …, 'b': …}}.")
        given = dict(zip(names, given, strict=True))
    for name, one in given.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise UsageError(f"observers.{name!r}: a name is made of letters, digits, _ and -.")
        if isinstance(one, type):
            raise UsageError(f"observers.{name} is the class {one.__name__}; give an object of it.")
        if not any(callable(getattr(one, method, None)) for method in METHODS):
            raise UsageError(
                f"observers.{name} is a {type(one).__name__} without any of the methods {', '.join(METHODS)}."
            )
        if sum(hasattr(one, method) for method in STATE) == 1:
            raise UsageError(f"observers.{name} has one of {' and '.join(STATE)}; its state needs both, or none.")
    return dict(given)


@contextmanager
def _failing(name: str, method: str) -> Iterator[None]:
    """ObserverFailed, which names the observer, for whatever its method raises."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise ObserverFailed(name, method, error) from error
