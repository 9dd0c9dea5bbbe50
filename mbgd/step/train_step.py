"""One optimizer step on this worker: examples → losses → gradients → their mean → the update."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mbgd import averaging as averagings
from mbgd.averaging import batch_norm
from mbgd.batches.loader import Examples, Shard
from mbgd.batches.randomness import key_generators
from mbgd.checks.alarm import Alarm
from mbgd.checks.recomputing import Recomputing
from mbgd.checks.setup import Setup
from mbgd.config import BatchNormOver
from mbgd.measuring.clock import FORWARD, Clock
from mbgd.measuring.profiling import part
from mbgd.step.done import Done, Observer
from mbgd.step.noise_scale import NoiseMeter
from mbgd.step.speeds import Speeds
from mbgd.step.sums import Means, MovingBuffers, Sums
from mbgd.step.update import Update
from mbgd.task.compiling import compile_
from mbgd.task.objective import PerExample
from mbgd.task.precision import autocast

BeforeUpdate = Callable[[Shard, int | Tensor], None]
"""Called with the shard and the minibatch's weight, while each trained parameter's `.grad` is the minibatch's sum."""


class TrainStep:
    """Makes steps, each exact over all examples of all workers."""

    def __init__(self, setup: Setup, logs: Callable[[int], bool], clock: Clock) -> None:
        """logs(step): whether a step is logged. clock: measures the step's parts."""
        self._setup, self._lap = setup, clock.lap
        settings, workers, trained = setup.settings, setup.workers, setup.trained
        compile_(setup.model, settings.compile, workers.device)
        varies = bool(setup.findings.unused_parameters)
        is_over_minibatch = settings.batch_norm is BatchNormOver.minibatch and workers.num_workers > 1
        norms = batch_norm.layers_of(setup.task) if is_over_minibatch else {}
        self.averaging = averagings.create(
            settings.averaging,
            setup.task,
            trained,
            setup.plan,
            workers,
            parameters_vary=varies,
            exchanges_in_backward=bool(norms),
        )
        self.autocast = autocast(settings.precision, workers.device)
        self.alarm = Alarm(setup, self._forward_again)
        statistics = batch_norm.Statistics(norms, self.averaging.gather, self.alarm.check_layers)
        self._minibatch_norm = batch_norm.MinibatchNorm(norms, statistics)
        self._norm_alone = batch_norm.MinibatchNorm(norms, batch_norm.Statistics(norms, batch_norm.alone))
        self.update = Update(setup, self.alarm.everywhere)
        self.noise_scale = NoiseMeter(settings.noise_scale, setup.plan, trained.parameters, self.update.loss_scale)
        self._means = Means(setup.findings, self.alarm, logs, self.noise_scale.measures)
        self._moving = MovingBuffers(setup.buffers, self.alarm)
        self._speeds = Speeds(workers, logs, lambda: clock.own_seconds)
        kinds = (self._means, self.noise_scale, self._moving, self._speeds)
        self._sums = Sums(kinds, self.averaging, setup.plan)
        self.recomputing = Recomputing.of(setup, self._gradients_again)
        self.observers: list[Observer] = [self.noise_scale]
        self.before_update: list[BeforeUpdate] = []
        """Called in each step between averaging and the division, on every worker."""
        self._forwards_differ = setup.plan.most_forwards > 1
        self._on_gpu = workers.device.type == "cuda"

    def __call__(self, shard: Shard) -> Done:
        """One optimizer step: gradient = Σ w_i ∇L_i / Σ w_i over every example of every worker."""
        self._begin(shard.step)
        try:
            for examples in shard.micro_batches:
                terms = self._forward_backward(shard, examples)
                if not examples.micro_batch.is_stand_in:
                    self._sums.add(terms, examples.micro_batch)
            self._lap("forward_backward")
            self._average(shard)
            self._lap("averaging")
            return self._finish(shard)
        finally:
            self.update.hooks.put_back()
            self._lap("optimizer")

    def metrics(self) -> dict[str, float]:
        """Metrics for the log beside those in `Done`; this waits for the device."""
        return {**self.noise_scale.metrics(), **self.update.metrics()}

    def _begin(self, step: int) -> None:
        self._setup.trained.start_step()
        self._setup.buffers.start_step()
        self._sums.begin(step)
        norms = self.noise_scale.norms
        self.averaging.start(norms if self.recomputing is None else self.recomputing.watch(step, norms))
        self.update.hooks.take_off()

    def _forward_backward(self, shard: Shard, examples: Examples) -> PerExample:
        """Add Σ w_i ∇L_i over this micro-batch to the parameters' gradients."""
        setup, micro_batch = self._setup, examples.micro_batch
        is_last = examples is shard.micro_batches[-1]
        if examples is not shard.micro_batches[0]:
            setup.buffers.put_back()
            setup.trained.put_back_flags()
        elif not is_last:
            setup.trained.remember_flags()
        key_generators(setup.workers.device, setup.settings.seed, shard.step, micro_batch.number)
        statistics = self._minibatch_norm(shard.step, is_stand_in=micro_batch.is_stand_in)
        with self.averaging.micro_batch(micro_batch, is_last=is_last), statistics:
            with part("forward"), self.autocast:
                terms = self.averaging.forward(examples.batch, micro_batch.size)
            if is_last:
                self._lap(FORWARD)
            with part("backward"):
                # backward from the vector of losses, with gradient w_i for L_i, gives the gradient of Σ w_i L_i.
                weights = self.update.backward_weights(terms, is_stand_in=micro_batch.is_stand_in)
                torch.autograd.backward(terms.losses, weights)
        setup.buffers.end_micro_batch(micro_batch.number, micro_batch.size, is_stand_in=micro_batch.is_stand_in)
        return terms

    def _average(self, shard: Shard) -> None:
        """Finish the sums over all workers' examples: first the gradients, then everything in sums.py."""
        if self._forwards_differ:
            self.alarm.check_parameters(shard.step)
        if self.recomputing is not None:
            self.recomputing.check(shard)
        with part("averaging"):
            notes = self.averaging.finish(self.alarm.note())
            if (notes is None or any(notes)) and self.alarm.heed(notes, shard):
                self._sums.include(self._moving)
            self._sums.exchange(shard.minibatch)

    def _finish(self, shard: Shard) -> Done:
        """Check the totals, divide once, step the optimizer and tell the observers."""
        step, totals, is_logged = shard.step, self._means.totals, self._means.is_logged
        if totals is not None:
            self.alarm.check_totals(shard, totals, waits=is_logged)
        if is_logged:
            self.update.check_skipped(step)
        has_weights = totals is not None and self._setup.findings.has_weights
        weight = totals.weight if totals is not None and has_weights else shard.minibatch.size
        for look in self.before_update:
            look(shard, weight)
        with part("optimizer"):
            wants_norm = self._means.is_measured or self._on_gpu
            norms = self.update(step, weight, want_norm=wants_norm, want_change=is_logged)
        if self.alarm.everywhere.found():
            self.alarm.stop(step, shard)
        done = Done(step, shard.minibatch, weight, totals, norms, self._speeds.by_rank)
        for observer in self.observers:
            observer.after_update(done)
        return done

    def _forward_again(self, step: int, examples: Examples) -> PerExample:
        """Repeat the forward of a micro-batch, with the same buffers and random numbers.

        With batch_norm=minibatch its statistics are this worker's alone, and may be of a single value.
        """
        self._setup.buffers.put_back()
        key_generators(self._setup.workers.device, self._setup.settings.seed, step, examples.micro_batch.number)
        with self.autocast, self._norm_alone(step):
            terms: PerExample = self._setup.task(examples.batch, examples.micro_batch.size)
            return terms

    def _gradients_again(self, step: int, examples: Examples) -> dict[Tensor, Tensor]:
        """Compute the gradients of a micro-batch again, as the averaging gets them; this changes no state."""
        terms = self._forward_again(step, examples)
        held: Sequence[Tensor] = self._setup.trained.with_gradient()
        weights = self.update.backward_weights(terms, is_stand_in=False)
        found = torch.autograd.grad(terms.losses, held, weights, allow_unused=True)
        self._setup.buffers.put_back()
        varies = bool(self._setup.findings.unused_parameters)
        return {p: g + 0.0 if varies else g for p, g in zip(held, found, strict=True) if g is not None}
