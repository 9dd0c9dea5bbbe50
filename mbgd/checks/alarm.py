"""When training must stop: the faults that this worker or all workers have noticed, and the error that reports them."""

from collections.abc import Callable, Sequence
from typing import NoReturn

from torch import Tensor

from mbgd.batches.loader import Examples, Shard
from mbgd.checks import diagnosis
from mbgd.checks.finite import Watch, Wrong, not_finite
from mbgd.checks.setup import Setup
from mbgd.config import Precision
from mbgd.errors import UsageError
from mbgd.task.objective import PerExample, Totals
from mbgd.text.listing import shown

NOT_FINITE, LATE_BUFFERS = 1, 2
"""Notes that workers exchange with the gradients, as bits."""


class Alarm:
    """Stops all workers at the same step, with the same error."""

    def __init__(self, setup: Setup, forward_again: Callable[[int, Examples], PerExample]) -> None:
        """forward_again(step, examples): repeats the forward of a micro-batch."""
        self._setup, self._forward_again = setup, forward_again
        device = setup.workers.device
        self.everywhere, self.here = Watch(device), Watch(device)
        """Faults that all workers know of; faults that only this worker has noticed."""
        self.expects_finite = setup.settings.precision is not Precision.fp16  # steps that overflow are skipped

    def note(self) -> int:
        """The bits that this worker sends to the others with its gradients."""
        return NOT_FINITE * self.here.found() | LATE_BUFFERS * bool(self._setup.buffers.late_names)

    def heed(self, notes: Sequence[int] | None, shard: Shard) -> bool:
        """Stop where a worker's loss is not finite. True if buffers have begun to move; all workers then expect them.

        notes: every worker's; None: the averaging exchanges no notes, so this worker's own state counts.
        """
        if notes is not None and any(note & NOT_FINITE for note in notes):
            self.stop(shard.step, shard)
        buffers, workers = self._setup.buffers, self._setup.workers
        mine = sorted(buffers.late_names)
        if not (mine if notes is None else any(note & LATE_BUFFERS for note in notes)):
            return False
        buffers.expect(sorted({name for of_worker in workers.gather_values(mine) for name in of_worker}))
        return bool(buffers)

    def check_losses(self, step: int, losses: Tensor) -> None:
        """Check a micro-batch's losses in a step that does not add losses up over the workers."""
        if self.expects_finite:
            self.here.check_losses(step, losses)

    def check_totals(self, shard: Shard, totals: Totals, *, waits: bool) -> None:
        """Stop before the update where weights or losses have no finite mean; waits: this may wait for the device."""
        self.everywhere.check_sums(shard.step, totals.sums, loss=self.expects_finite)
        if (waits and totals.wrong_anywhere) or self.everywhere.found():
            self.stop(shard.step, shard)

    def check_integers(self, step: int, are_alike: Tensor) -> None:
        """Stop where micro-batches left different values in an integer buffer."""
        self.everywhere.check_true(Wrong.buffers, step, are_alike)
        if self.everywhere.found():
            raise UsageError(f"step {step + 1}: {self._setup.buffers.unlike()}")

    def check_layers(self, step: int, are_alike: Tensor) -> None:
        """Stop where workers computed different BatchNorm layers at the same time; on a GPU, at the next log."""
        self.everywhere.check_true(Wrong.layers, step, are_alike)

    def check_parameters(self, step: int) -> None:
        """Stop where a forward has changed parameters; the trial before training refuses those that do so there."""
        if changed := self._setup.trained.changed():
            raise UsageError(
                f"the forward of step {step + 1} changed parameters in place ({shown(changed)}), which it did not do "
                "before training. Each worker and micro-batch would change them differently, and the workers' "
                "copies would differ. Let only the optimizer change parameters; bound them by a parametrization."
            )

    def check_state(self, num_steps: int) -> None:
        """Stop where a worker has noticed a fault or parameters are not finite; every worker calls this."""
        wrong = self._setup.workers.max_(self.here.indicator() + self.everywhere.indicator())
        if wrong.item():
            self.stop(num_steps - 1)
        if spoilt := not_finite(self._setup.trained.by_name):
            raise UsageError(
                f"after step {num_steps} parameters are not finite: {shown(spoilt)}. The gradient of that step was "
                f"not finite, although its loss was. {diagnosis.remedy(self._setup.findings.has_weights)}"
            )

    def check_buffers(self, num_steps: int) -> None:
        """Stop if a buffer has moved unseen; to be asked once the replicas were compared, which may differ in it."""
        if unseen := self._setup.buffers.find_unseen():
            raise UsageError(
                f"by step {num_steps} the buffers {shown(unseen)} have changed without raising their version in "
                "torch, and not in the trial before training: they were not averaged. Let them change from the first "
                "step on, or change them with torch operations (copy_, lerp_)."
            )

    def stop(self, step: int, shard: Shard | None = None) -> NoReturn:
        """End the run. Every worker calls this, after the forwards of `step`."""
        setup = self._setup
        known = [one for watch in (self.everywhere, self.here) if (one := watch.read()) is not None]
        found = min(known, default=None, key=lambda one: one[0])
        examples: list[int] = []
        if found is not None and found == (step, Wrong.loss) and shard is not None:
            indices = setup.loader.minibatch_indices(step)
            examples = diagnosis.examples_not_finite(shard, self._forward_again, indices)
        raise diagnosis.stop(step, found, setup.trained, setup.findings.has_weights, examples, setup.workers)
