"""The predictions for every evaluation example, in the dataset's order, collected by the main worker."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mbgd.batches.plan import MicroBatch
from mbgd.errors import UsageError
from mbgd.evaluation.evaluator import Evaluator
from mbgd.task.objective import PerExample
from mbgd.workers.group import Workers

OUTPUTS, TARGETS, WEIGHTS = NAMES = ("outputs", "targets", "weights")


class Predictions:
    """Arrays of all examples, filled micro-batch by micro-batch."""

    def __init__(self, num_examples: int) -> None:
        self._num_examples = num_examples
        self.arrays: dict[str, Tensor] = {}
        """By NAMES, on the host. Examples of different lengths are padded at the end, with zeros of weight 0."""
        self.problem = ""

    def add(self, micro_batch: MicroBatch, parts: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's parts by NAMES; one that does not fit the others is the `problem`."""
        num_dims = parts[WEIGHTS].dim()
        for name, part in parts.items():
            array = self.arrays.get(name)
            if array is None:
                array = part.new_zeros((self._num_examples, *part.shape[1:]))
            if array.dtype != part.dtype or array.shape[num_dims:] != part.shape[num_dims:]:
                self.problem = self.problem or (
                    f"the {name} of some examples have shape (…, {_inner(array, num_dims)}), {array.dtype}, those of "
                    f"others (…, {_inner(part, num_dims)}), {part.dtype}; one file needs the same for all. Let the "
                    "objective give predictions of one shape."
                )
                return
            shape = [max(sizes) for sizes in zip(array.shape[1:], part.shape[1:], strict=True)]
            if shape != list(array.shape[1:]):
                longer = array.new_zeros((self._num_examples, *shape))
                longer[_corner(array)] = array
                array = longer
            array[micro_batch.start : micro_batch.stop][_corner(part)] = part
            self.arrays[name] = array

    def whole(self) -> dict[str, Tensor]:
        """All arrays; without the weights if each is 1."""
        only_ones = bool((self.arrays[WEIGHTS] == 1).all())
        return {name: array for name, array in self.arrays.items() if name != WEIGHTS or not only_ones}


def _corner(part: Tensor) -> tuple[slice, ...]:
    return tuple(slice(size) for size in part.shape)


def _inner(array: Tensor, num_dims: int) -> str:
    return ", ".join(map(str, array.shape[num_dims:])) or "1 value"


def parts_of(terms: PerExample) -> dict[str, Tensor]:
    """A micro-batch's predictions and weights by NAMES, on the host; UsageError if the objective gives none."""
    given = terms.whole_predictions()
    if given is None:
        raise UsageError(
            "the objective gives no predictions, so there is nothing to write. Let it return "
            "PerExample(…, predictions=(outputs, targets))."
        )
    weights = torch.ones_like(terms.losses) if terms.weights is None else terms.weights
    return {name: one.detach().cpu() for name, one in zip(NAMES, (*given, weights), strict=True)}


def predict(evaluator: Evaluator, workers: Workers) -> dict[str, Tensor]:
    """The arrays by NAMES on the main worker, nothing on the others; UsageError on all if they do not fit.

    The workers send one micro-batch at a time, so only the main worker holds those of the whole set.
    """
    shards = [evaluator.shard_of(rank) for rank in range(workers.num_workers)]
    found = Predictions(evaluator.num_examples)
    with evaluator.evaluating():
        forwards = evaluator.forwards()
        for number in range(max(map(len, shards))):
            mine = next(forwards, None)
            received = iter(workers.collect([] if mine is None else list(parts_of(mine[1]).values())))
            if workers.is_main:
                for shard in (shard for shard in shards if number < len(shard)):
                    found.add(shard[number], {name: next(received) for name in NAMES})
        if next(forwards, None) is not None:
            raise AssertionError("a worker has more micro-batches than its shard")
    if problem := str(workers.broadcast(found.problem)):
        raise UsageError(problem)
    return found.whole() if workers.is_main else {}
