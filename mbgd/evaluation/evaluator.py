"""Exact weighted means, and metrics of the whole evaluation set, on any number of workers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mbgd.batches.plan import MicroBatch, micro_batches
from mbgd.batches.randomness import random_state_kept
from mbgd.batches.reading import Batches, read
from mbgd.checks.setup import Setup
from mbgd.checks.sizes import NUM_EXAMPLES
from mbgd.checks.targets import check_targets
from mbgd.config import Settings
from mbgd.config.duration import whole
from mbgd.errors import UsageError
from mbgd.evaluation.metrics import WholeSetMetrics, check
from mbgd.task.extra_state import extra_state_kept
from mbgd.task.modes import evaluating
from mbgd.task.objective import NUM_SUMS, PerExample, Totals, check_metric_names
from mbgd.task.precision import autocast, parameter_dtype
from mbgd.text.listing import shown


class AddUp(Protocol):
    """`Averager.sum`."""

    def __call__(self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int) -> Tensor: ...


class Evaluator:
    """Evaluates a task on a dataset: every example exactly once, a contiguous share on each worker."""

    def __init__(self, setup: Setup, name: str, dataset: Any) -> None:
        """Tries the first and the last examples; UsageError if something is wrong with them."""
        settings, workers = setup.settings, setup.workers
        self.name, self.dataset = name, dataset
        self._task, self._buffers = setup.task, setup.buffers
        self._workers, self._precision = workers, settings.precision
        self._how: dict[str, Any] = {
            "device": workers.device,
            "dtype": parameter_dtype(settings.precision),
            "seed": settings.seed,
            "collate": setup.data.collate,
        }
        self._metrics = WholeSetMetrics(settings.evaluation.metrics, workers)
        self.num_examples = num_examples = len(dataset)
        self._num_parts = -(-num_examples // settings.evaluation.batch_size)
        self._shard = self.shard_of(workers.rank)
        check_targets(dataset, setup.task.given_objective, setup.findings.output_shape)
        self.metric_names = self._try_out(num_examples, settings)
        self._prefix = f"eval/{name}/" if name else "eval/"
        self.names = [f"{self._prefix}{one}" for one in ("loss", *self.metric_names, *settings.evaluation.metrics)]
        """Names of the metrics that an evaluation returns."""
        # One loader: its processes are kept for all evaluations.
        self._batches = Batches(
            dataset,
            [np.arange(micro_batch.start, micro_batch.stop) for micro_batch in self._shard],
            num_workers=setup.data.num_workers,
            keep_processes=True,
            **self._how,
        )

    def shard_of(self, rank: int) -> list[MicroBatch]:
        """The micro-batches that a worker evaluates, in order: no stand-ins."""
        shard = micro_batches(0, self.num_examples, self._num_parts, rank, self._workers.num_workers)
        return [micro_batch for micro_batch in shard if not micro_batch.is_stand_in]

    def _try_out(self, num_examples: int, settings: Settings) -> tuple[str, ...]:
        """The names of the objective's metrics in an evaluation."""
        names: tuple[str, ...] = ()
        first, last = np.arange(num_examples)[:NUM_EXAMPLES], np.arange(num_examples)[-NUM_EXAMPLES:]
        with random_state_kept(self._workers.device), self.evaluating():
            for position, indices in (("first", first), ("last", last)):
                with _told_of(position, self.name):
                    (batch,) = read(self.dataset, [indices], num_workers=0, **self._how)
                    terms = self._task(batch, len(indices))
                    check_metric_names(terms.metrics)
                    names = self._names(terms, names if position == "last" else None)
                    terms.sums(names)
                if self._metrics and position == "first":
                    check(settings.evaluation.metrics, terms)
        return names

    def _names(self, terms: PerExample, expected: tuple[str, ...] | None) -> tuple[str, ...]:
        names = tuple(sorted(terms.metrics))
        if expected is not None and names != expected:
            raise UsageError(
                f"the objective gives the metrics {', '.join(expected) or 'none'} for some evaluation examples and "
                f"{', '.join(names) or 'none'} for others; their means need the same names for all."
            )
        return names

    def __call__(self, add_up: AddUp) -> dict[str, float]:
        """Mean loss and metrics, the same on every worker; this leaves the model's state as it was.

        add_up: adds up vectors over all workers.
        """
        leaves, predictions = [], []
        with self.evaluating():
            for micro_batch, terms in self.forwards():
                leaves.append((micro_batch.number, terms.sums(self.metric_names)))
                if self._metrics:
                    predictions += [values.cpu() for values in terms.counted_predictions()]
            num_values = NUM_SUMS + len(self.metric_names)
            total = add_up(leaves, num_leaves=self._num_parts, num_values=num_values)
            means = Totals(total, self.metric_names).means()
        return {f"{self._prefix}{name}": value for name, value in {**means, **self._metrics(predictions)}.items()}

    def forwards(self) -> Iterator[tuple[MicroBatch, PerExample]]:
        """Each micro-batch of this worker's, and its terms; to be iterated inside `evaluating`."""
        for micro_batch, batch in zip(self._shard, self._batches, strict=True):
            terms = self._task(batch, micro_batch.size)
            self._names(terms, self.metric_names)
            yield micro_batch, terms

    def first(self, number: int = NUM_EXAMPLES) -> tuple[Any, PerExample]:
        """The first examples and their terms, the same on every worker, without a collective."""
        with random_state_kept(self._workers.device), self.evaluating():
            indices = np.arange(self.num_examples)[:number]
            (batch,) = read(self.dataset, [indices], num_workers=0, **self._how)
            return batch, self._task(batch, len(indices))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; buffers and extra state are restored afterwards.

        no_grad, not inference_mode, which would keep a model from computing derivatives itself.
        """
        self._buffers.start_step()
        versions = [parameter._version for parameter in self._task.parameters()]
        with (
            evaluating(self._task),
            extra_state_kept(self._task),
            torch.no_grad(),
            autocast(self._precision, self._workers.device),
        ):
            try:
                yield
            finally:
                self._buffers.put_back()
        now = zip(self._task.parameters_by_name().items(), versions, strict=True)
        changed = [name for (name, parameter), version in now if parameter._version != version]
        if changed and self._workers.num_workers > 1:
            raise UsageError(
                f"the forward in evaluation mode changes parameters in place ({shown(changed)}); "
                "each worker evaluates other examples, so the workers' copies would differ. Let only the optimizer "
                "change parameters."
            )


class Evaluations:
    """Evaluates a task on every evaluation set."""

    def __init__(self, setup: Setup) -> None:
        sets = setup.data.evaluation_sets
        if not sets and (metrics := setup.settings.evaluation.metrics):
            raise UsageError(
                f"evaluation.metrics={', '.join(metrics)}, but there is no evaluation dataset. Give data.evaluation, "
                "or leave them out."
            )
        self._every_steps = whole(setup.settings.evaluation.every_steps or setup.plan.steps_per_epoch)
        self._last_step = setup.num_steps
        self.by_name = {name: Evaluator(setup, name, dataset) for name, dataset in sets.items()}
        """A single set has the name ""."""
        self.num_examples = {name: len(dataset) for name, dataset in sets.items()}
        self.names = [name for evaluator in self.by_name.values() for name in evaluator.names]
        """Names of the metrics that an evaluation returns, such as eval/loss or eval/NAME/loss."""

    def are_due(self, num_steps: int) -> bool:
        """Whether there is an evaluation after `num_steps` steps."""
        return bool(self) and (num_steps % self._every_steps == 0 or num_steps == self._last_step)

    def number(self, num_steps: int) -> int:
        """The number of evaluations in the first `num_steps` steps."""
        return num_steps // self._every_steps

    def __bool__(self) -> bool:
        return bool(self.by_name)

    def __call__(self, add_up: AddUp) -> dict[str, float]:
        """The metrics of all sets; see `Evaluator`."""
        return {name: value for evaluator in self.by_name.values() for name, value in evaluator(add_up).items()}


@contextmanager
def _told_of(position: str, name: str) -> Iterator[None]:
    """Add to exceptions of the user's code that these examples were tried before training."""
    of_set = f"evaluation set {name}".rstrip()
    try:
        yield
    except UsageError as error:
        raise UsageError(f"the {position} examples of the {of_set}, tried before training: {error}") from error
    except Exception as error:
        error.add_note(f"(the {position} examples of the {of_set} were tried before training)")
        raise
