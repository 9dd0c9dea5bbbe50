"""One optimizer step on this worker: examples → losses → gradients → their mean → the update."""

from collections.abc import Callable, Sequence

from torch import Tensor

from mbgd import averaging as averagings
from mbgd.batches.loader import Shard
from mbgd.checkpoints.keeper import Keeper, NoCheckpoints
from mbgd.checks.alarm import Alarm
from mbgd.checks.recomputing import Recomputing
from mbgd.checks.setup import Setup
from mbgd.measuring.clock import Clock
from mbgd.measuring.profiling import part
from mbgd.step.done import Done, Observer
from mbgd.step.graphed import graphed
from mbgd.step.noise_scale import NoiseMeter
from mbgd.step.one_pass import OnePass, Passes
from mbgd.step.sharding import shard
from mbgd.step.speeds import Speeds
from mbgd.step.sums import Means, MovingBuffers, Sums, Weights
from mbgd.step.two_pass import TwoPass
from mbgd.step.update import Update
from mbgd.task.compiling import compile_
from mbgd.task.coupled import Encoder
from mbgd.task.precision import autocast

BeforeUpdate = Callable[[Shard, int | Tensor], None]
"""Called with the shard and the minibatch's weight, while each trained parameter's `.grad` is the minibatch's sum."""


class TrainStep:
    """Makes steps, each exact over all examples of all workers."""

    def __init__(
        self, setup: Setup, logs: Callable[[int], bool], clock: Clock, users_observers: Sequence[str] = ()
    ) -> None:
        """logs(step): whether a step is logged. clock: measures the step's parts.

        users_observers: names of observers of the user's own.
        """
        self._setup, self._lap = setup, clock.lap
        settings, workers, trained = setup.settings, setup.workers, setup.trained
        compile_(setup.model, settings.compile, workers.device)
        varies, pair = bool(setup.findings.unused_parameters), setup.task.pair
        norms = setup.minibatch_norms if workers.num_workers > 1 else {}
        self.averaging = averagings.create(
            settings.averaging,
            setup.task if pair is None else Encoder(setup.task, pair, setup.model),
            trained,
            setup.plan,
            workers,
            parameters_vary=varies,
            exchanges_in_backward=bool(norms),
        )
        self.autocast = autocast(settings.precision, workers.device)
        self.alarm = Alarm(setup, lambda step, examples: self.passes.forward_again(step, examples))
        self.sharded, self.describe_sharding = shard(setup, self.averaging, users_observers)
        self.update = Update(setup, self.alarm.everywhere, self.sharded)
        noise, own = settings.noise_scale, setup.has_own_losses
        self.noise_scale = NoiseMeter(noise, setup.plan, trained.parameters, self.update.loss_scale, is_defined=own)
        eager: Passes = (
            OnePass(setup, self.averaging, self.update, norms, self.alarm.check_layers, clock.lap)
            if pair is None
            else TwoPass(setup, pair, self.averaging, self.update, clock.lap)
        )
        self._means = Means(setup.findings, self.alarm, logs, self.noise_scale.measures)
        self.passes, self.describe_cuda_graphs = graphed(
            setup, self.averaging, self.update, eager, self._means.wants, clock.lap, users_observers
        )
        self._weights = Weights(setup.findings, self._means.wants)
        self._moving = MovingBuffers(setup.buffers, self.alarm)
        self._speeds = Speeds(workers, logs, lambda: clock.own_seconds)
        kinds = (self._means, self._weights, self.noise_scale, self._moving, self._speeds)
        self._sums = Sums(kinds, self.averaging, setup.plan)
        self.recomputing = Recomputing.of(setup, self.passes.gradients_again)
        self.observers: list[Observer] = [self.noise_scale]
        self.before_update: list[BeforeUpdate] = []
        """Called in each step between averaging and the division, on every worker."""
        self._forwards_differ = setup.plan.most_forwards > 1
        self._on_gpu = workers.device.type == "cuda"

    def __call__(self, shard: Shard) -> Done:
        """One optimizer step: gradient = Σ w_i ∇L_i / Σ w_i over every example of every worker."""
        self._begin(shard)
        try:
            self.passes.begin(shard)
            for examples in shard.micro_batches:
                self.passes.forward_backward(shard, examples, after_forward=self._sums.add)
            self._lap("forward_backward")
            self._average(shard)
            self._lap("averaging")
            return self._finish(shard)
        finally:
            self.update.hooks.put_back()
            self._lap("optimizer")

    def begin(self, step: int) -> None:
        """Call before step number `step` where the parameters may have been set by others than the steps."""
        self.update.state.begin(step)

    def together(self, checkpoints: Keeper | None) -> Keeper:
        """The checkpoints, taken by all workers together where each has a part of the state. Every worker calls it."""
        checkpoints = checkpoints or NoCheckpoints()
        return checkpoints if self.sharded is None else self.sharded.state.together(checkpoints)

    def check_state(self, num_steps: int) -> None:
        """Stop where the state after `num_steps` steps is wrong; every worker calls this."""
        self.alarm.check_state(num_steps)
        if self.sharded is not None:
            self.sharded.check(num_steps)

    def end(self) -> None:
        """Leave the optimizer as it was given, some steps further; every worker calls this."""
        if self.sharded is not None:
            self.sharded.state.release()

    def metrics(self) -> dict[str, float]:
        """Metrics for the log beside those in `Done`; this waits for the device."""
        return {**self.noise_scale.metrics(), **self.update.metrics()}

    def _begin(self, shard: Shard) -> None:
        self._setup.trained.start_step()
        self._setup.buffers.start_step()
        self._sums.begin(shard)
        norms = self.noise_scale.norms
        self.averaging.start(norms if self.recomputing is None else self.recomputing.watch(shard.step, norms))
        self.update.hooks.take_off()

    def _average(self, shard: Shard) -> None:
        """Finish the sums over all workers' examples: first the gradients, then everything in sums.py."""
        if self._forwards_differ:
            self.alarm.check_parameters(shard.step)
        if self.recomputing is not None:
            self.recomputing.check(shard)
        with part("averaging"):
            whole = bool(self.before_update) or bool(self.update.hooks)
            notes = self.averaging.finish(self.alarm.note(), whole=whole)
            if (notes is None or any(notes)) and self.alarm.heed(notes, shard):
                self._sums.include(self._moving)
            self._sums.exchange(shard.minibatch)

    def _finish(self, shard: Shard) -> Done:
        """Check the totals, divide once, step the optimizer and tell the observers."""
        step, is_logged = shard.step, self._means.is_logged
        totals = self._means.totals or self._weights.totals
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
        self._moving.move()
        self.passes.end()
        if self.alarm.everywhere.found():
            self.alarm.stop(step, shard)
        num_tokens = totals.count if totals is not None and self._setup.findings.has_tokens else None
        done = Done(step, shard.minibatch, weight, self._means.totals, norms, self._speeds.by_rank, num_tokens)
        for observer in self.observers:
            observer.after_update(done)
        return done
