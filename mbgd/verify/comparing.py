"""A few steps of all workers against the same steps on one worker alone."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mbgd.batches.loader import Shard
from mbgd.batches.plan import Minibatch
from mbgd.batches.randomness import random_state_kept
from mbgd.building.build import build_trainer
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.config import AveragingName, Config, Precision
from mbgd.verify import findings, looking, trainers
from mbgd.verify.findings import Finding, Severity
from mbgd.verify.reference import Reference, digests
from mbgd.verify.subject import Done, Gradient, Subject
from mbgd.workers.group import Workers

EXACT = 1e-12
"""Relative error in float64 up to which a gradient is exact."""

PARTLY_FLOAT32 = 1e-6
"""The same for a model that computes partly in float32, whatever its parameters' precision."""

EPSILONS = {Precision.fp64: 2.0**-52, Precision.fp32: 2.0**-23, Precision.bf16: 2.0**-7, Precision.fp16: 2.0**-10}
EPSILONS[Precision.bf16_true] = EPSILONS[Precision.bf16]
MOST_EPSILONS, MOST_TIMES = 16, 8
"""Allowed error: MOST_EPSILONS units in the last place, or MOST_TIMES one worker's rounding error."""

ALMOST = 1e-2
"""Relative difference up to which a wrong gradient counts as a known mistake."""


@dataclass(frozen=True)
class Row:
    """One step, compared; errors are relative to the right gradient's norm."""

    step: int
    loss: float
    loss_difference: float
    num_examples: int
    error: float
    """Of the trainer's gradient, against the right one in float64."""
    one_worker_error: float
    """Of a single worker's one backward in the same precision."""
    mean_of_means_error: float
    update_error: float
    replicas_alike: bool
    parameters: dict[str, tuple[float, float]]
    """By name: (error, error of the mean of means)."""


@dataclass
class Comparison:
    """All steps in one precision."""

    precision: Precision
    about: dict[str, Any]
    num_bytes: int
    """Of the gradients."""
    rows: list[Row] = field(default_factory=list)
    found: list[Finding] = field(default_factory=list)
    is_random: bool = False
    """The model draws random numbers: draws are the same only for the same micro-batches and precision."""

    @property
    def error(self) -> float:
        return max((row.error for row in self.rows), default=math.inf)

    @property
    def allowed(self) -> float:
        if self.precision is Precision.fp64:
            return PARTLY_FLOAT32
        alone = max((row.one_worker_error for row in self.rows), default=0.0)
        return max(MOST_TIMES * alone, MOST_EPSILONS * EPSILONS[self.precision])

    @property
    def verdict(self) -> str:
        if any(one.severity is Severity.wrong for one in self.found) or not self.error <= self.allowed:
            return "WRONG"
        return "exact" if self.error <= EXACT else "within rounding"


def compare(
    config: Config, workers: Workers, num_steps: int, precision: Precision, known: Comparison | None = None
) -> Comparison:
    """Make the steps on all workers and compare on the main one; on others the comparison is empty.

    known: the result in another precision; without it, model, objective and data are probed for reasons.
    """
    subject = Subject(config, workers, precision)
    num_bytes = sum(p.nbytes for p in subject.parameters.values())
    comparison = Comparison(precision, subject.about(), num_bytes)
    indices = subject.trainer.setup.loader.minibatch_indices(0)
    of_workers = workers.gather_values(trainers.losses_here(subject.trainer, indices))
    judge = _Judge(config, subject, comparison, num_steps) if workers.is_main else None
    if judge is not None:
        if known is None:
            judge.look(indices)
            comparison.found += trainers.compare_workers(of_workers)
        else:
            comparison.is_random = known.is_random
        comparison.found += trainers.look_at_trainer(subject.trainer)
    for shard in subject.shards(num_steps):
        if judge is not None:
            judge.before()
        done = subject.step(shard)
        if judge is not None:
            judge.after(done)
    return comparison


class _Judge:
    """Compares on the main worker, with a reference in float64 and one in the compared precision."""

    def __init__(self, config: Config, subject: Subject, comparison: Comparison, num_steps: int) -> None:
        self._subject, self._comparison = subject, comparison
        self._plan, device = subject.trainer.setup.plan, subject.trainer.setup.workers.device
        with self._undisturbed():
            self._exact = Reference(config, device, Precision.fp64)
            is_exact = comparison.precision is Precision.fp64
            self._same = self._exact if is_exact else Reference(config, device, comparison.precision)
        self._whole, self._whole_same = self._exact.shards(num_steps), self._same.shards(num_steps)
        ranks, plan = range(self._plan.num_workers), self._plan
        self._cuts = [self._exact.shards_of(plan, rank, num_steps, Precision.fp64) for rank in ranks]
        self._cuts_same = [self._same.shards_of(plan, rank, num_steps, comparison.precision) for rank in ranks]
        self._load()

    def look(self, indices: Any) -> None:
        with self._undisturbed():
            look = looking.Looking(self._exact, indices)
            self._comparison.found += look()
        self._comparison.is_random = look.is_random

    def before(self) -> None:
        """Before a step: copy parameters and buffers, and compute the right gradient."""
        with self._undisturbed():
            self._load()
            whole, whole_same = next(self._whole), next(self._whole_same)
            cut, cut_same = ([next(one) for one in shards] for shards in (self._cuts, self._cuts_same))
            self._digests = [digests(shard) for shard in cut_same]
            if self._comparison.is_random:
                self._cut = self._same.cut(cut_same)
                self._loss, self._right = self._cut.loss, self._cut.gradient
                self._alone = self._right
                return
            self._cut = self._exact.cut(cut)
            self._loss, self._right = self._exact.whole(whole)
            self._alone = self._right if self._same is self._exact else self._same.whole(whole_same)[1]

    def after(self, done: Done) -> None:
        gradient, right = done.gradient, self._right
        if self._comparison.precision is Precision.fp16 and not _is_finite(gradient):
            self._comparison.found.append(findings.overflow(step=done.step + 1))
            return
        row = Row(
            done.step,
            done.loss,
            abs(done.loss - self._loss) / max(abs(self._loss), 1e-300),
            sum(stop - start for of_worker in done.positions for start, stop in of_worker),
            _error(gradient, right),
            _error(self._alone, right),
            _error(self._cut.mean_of_means, right),
            self._update_error(done),
            done.replicas_alike,
            {name: (_of(name, gradient, right), _of(name, self._cut.mean_of_means, right)) for name in right},
        )
        self._comparison.rows.append(row)
        self._comparison.found += [one for one in self._look_at(done, row) if one not in self._comparison.found]

    def _look_at(self, done: Done, row: Row) -> Iterator[Finding]:
        step = done.step + 1
        if not _once(done.positions, self._plan.minibatch(done.step)):
            yield findings.wrong_positions(step=step)
        for rank, (theirs, mine) in enumerate(zip(done.digests, self._digests, strict=True)):
            if theirs != mine:
                yield findings.other_examples(rank=rank, step=step)
        if not row.replicas_alike:
            yield findings.replicas(step=step)
        if not row.error <= self._comparison.allowed:
            yield from self._known_mistakes(done.gradient)
        if row.update_error > 1.0:
            yield findings.wrong_update(step=step, error=row.update_error)

    def _known_mistakes(self, gradient: Gradient) -> Iterator[Finding]:
        """Known mistakes that this wrong gradient equals."""
        right, means = self._right, self._cut.mean_of_means
        error = _error(gradient, right)
        if _error(gradient, means) < ALMOST * error and _error(means, right) > 0.5 * error:
            yield findings.mean_of_means()
            return
        length = sum((g.abs().square()).sum().item() for g in right.values())
        dot = sum((gradient[name] * g.conj()).sum().real.item() for name, g in right.items() if name in gradient)
        factor = dot / length if length else 0.0
        scaled = {name: g * factor for name, g in right.items()}
        if factor and abs(factor - 1) > ALMOST and _error(gradient, scaled) < ALMOST * error:
            yield findings.scaled(factor=factor)

    def _update_error(self, done: Done) -> float:
        """Difference to a single-process optimizer step with the same gradient, in units of the allowed rounding; more
        than 1 is wrong."""
        before = {name: p.detach().clone() for name, p in self._same.trained.by_name.items()}
        after = self._same.update(done.step, done.gradient)
        worst = 0.0
        epsilon = EPSILONS[Precision.fp64 if self._comparison.precision is Precision.fp64 else Precision.fp32]
        for name, mine in self._subject.parameters.items():
            change = (after[name] - before[name]).norm().item()
            allowed = 8 * epsilon * before[name].norm().item() + 1e4 * epsilon * change + 1e-300
            worst = max(worst, (after[name] - mine.detach()).norm().item() / allowed)
        return worst

    def _load(self) -> None:
        for reference in {id(one): one for one in (self._exact, self._same)}.values():
            reference.load(self._subject.parameters, self._subject.buffers)

    def _undisturbed(self) -> ExitStack:
        """Keep the subject's random state."""
        stack = ExitStack()
        stack.enter_context(random_state_kept(self._subject.trainer.setup.workers.device))
        return stack


def _is_finite(gradient: Gradient) -> bool:
    return all(bool(g.isfinite().all()) for g in gradient.values())


def _error(gradient: Mapping[str, Tensor], right: Gradient) -> float:
    squares = [_difference(gradient.get(name), g) for name, g in right.items()]
    return _ratio(math.sqrt(sum(squares)), _norm(right))


def _of(name: str, gradient: Mapping[str, Tensor], right: Gradient) -> float:
    """A parameter's error, relative to its own gradient, but at least to a thousandth of the whole one."""
    own = right[name].norm().item()
    return _ratio(math.sqrt(_difference(gradient.get(name), right[name])), max(own, 1e-3 * _norm(right)))


def _difference(a: Tensor | None, b: Tensor) -> float:
    return float((b if a is None else a - b).abs().square().sum())


def _norm(gradient: Gradient) -> float:
    return math.sqrt(sum(float(g.abs().square().sum()) for g in gradient.values()))


def _ratio(difference: float, norm: float) -> float:
    if difference == 0:
        return 0.0
    return difference / norm if norm else float("inf")


def _once(positions: list[list[tuple[int, int]]], minibatch: Minibatch) -> bool:
    stretches = sorted(stretch for of_worker in positions for stretch in of_worker)
    edges = [minibatch.start, *(stop for _, stop in stretches)]
    return [start for start, _ in stretches] == edges[:-1] and edges[-1] == minibatch.stop


def same_bits(config: Config, workers: Workers, num_steps: int) -> bool | None:
    """Whether all workers and a single one end with the same bits; None without averaging=reproducible."""
    if config.averaging.name is not AveragingName.reproducible:
        return None
    hashes = []
    for group in (workers, Workers(device=workers.device)):
        if group is workers or workers.is_main:
            trainer = build_trainer(replace(config, log_every_steps=1), group)
            for shard in _shards(trainer, num_steps):
                trainer.train_step(shard)
                trainer.state.step = shard.step + 1
            hashes.append(weights_sha256(trainer.setup.task))
    return bool(workers.broadcast(hashes[0] == hashes[-1]))


def _shards(trainer: Any, num_steps: int) -> Iterator[Shard]:
    shards: Iterator[Shard] = trainer.setup.loader.shards(0, num_steps)
    return shards
