"""The same model on a single worker in plain torch: forward, backward, optimizer, without any averaging."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from mbgd.averaging.batch_norm import layers_of
from mbgd.batches.describing import content
from mbgd.batches.loader import Examples, Loader, Shard
from mbgd.batches.plan import Plan
from mbgd.batches.randomness import key_generators
from mbgd.building.build import build_trainer
from mbgd.config import AveragingName, BatchNormOver, Config, Precision
from mbgd.step.two_pass import OF_LOSSES
from mbgd.task.coupled import Pair
from mbgd.task.objective import PerExample
from mbgd.task.precision import autocast, parameter_dtype
from mbgd.task.trained import GradientHooks
from mbgd.verify.subject import Gradient
from mbgd.verify.together import together
from mbgd.workers.group import Workers

FP16_SCALE = 2.0**12
"""Loss scale, so that small gradients do not underflow."""


@dataclass(frozen=True)
class Cut:
    """A step's gradient from the plan's micro-batches, with the workers' cut and random keys."""

    loss: float
    gradient: Gradient
    mean_of_means: Gradient
    """The mean of the workers' means, for comparison; coupled losses then look at one worker's examples alone."""


class Reference:
    """A second instance of the configuration's model, objective, data and optimizer, in a given precision."""

    def __init__(self, config: Config, device: torch.device, precision: Precision) -> None:
        averaging = replace(config.averaging, name=AveragingName.ddp)
        batch = replace(config.batch, micro_batch_size=None)
        alone = replace(config, precision=precision, averaging=averaging, batch=batch)
        self.trainer = build_trainer(alone, Workers(device=device))
        self.task, self.trained = self.trainer.setup.task, self.trainer.setup.trained
        self._buffers, self._precision, self._config = self.trainer.setup.buffers, precision, config
        self._device, self._rates = device, [group["lr"] for group in self.trainer.setup.optimizer.param_groups]
        is_over_minibatch = config.batch_norm is BatchNormOver.minibatch
        self._layers = layers_of(self.task) if is_over_minibatch else {}
        self.data = replace(self.trainer.setup.data, num_workers=0)

    def load(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Copy the values of the verified trainer."""
        with torch.no_grad():
            for name, parameter in self.trained.by_name.items():
                parameter.copy_(parameters[name])
            for name, buffer in self.task.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])
        self._buffers.start_step()

    def with_gradient(self) -> dict[str, nn.Parameter]:
        """The optimizer's parameters that require a gradient now, by name."""
        return {name: p for name, p in self.trained.by_name.items() if p.requires_grad}

    def shards(self, num_steps: int) -> Iterator[Shard]:
        """The whole minibatches."""
        return self.trainer.setup.loader.shards(0, num_steps)

    def shards_of(self, plan: Plan, rank: int, num_steps: int, precision: Precision) -> Iterator[Shard]:
        """The shards that worker `rank` should read, read here."""
        workers = Workers(rank=rank, num_workers=plan.num_workers, device=self._device)
        dtype = parameter_dtype(precision)
        loader = Loader(self.data, plan, self._config.seed, workers, dtype=dtype, own_copies=True)
        return loader.shards(0, num_steps)

    def losses(self, examples: Examples, *key: int) -> PerExample:
        """One forward from the loaded buffers, with keyed generators."""
        self._buffers.put_back()
        key_generators(self._device, self._config.seed, *key)
        with autocast(self._precision, self._device):
            terms: PerExample = self.task(examples.batch, examples.micro_batch.size)
            return terms

    def encodings(self, pair: Pair, examples: Examples, *key: int) -> list[Tensor]:
        """The same for the encodings of a coupled objective."""
        self._buffers.put_back()
        key_generators(self._device, self._config.seed, *key)
        with autocast(self._precision, self._device):
            return pair.encode(self.task.model, examples.batch, examples.micro_batch.size)

    def whole(self, shard: Shard) -> tuple[float, Gradient]:
        """(mean loss, its gradient), by one backward of the whole minibatch."""
        (examples,) = shard.micro_batches
        with self.without_hooks():
            weighted, weight = self._sums(self.losses(examples, shard.step, 0))
            gradient = self._gradient(weighted / weight)
        return (weighted / weight).item(), gradient

    def cut(self, shards: list[Shard]) -> Cut:
        """From every worker's shard of a step."""
        if self.task.pair is not None:
            return self._cut_of_pair(self.task.pair, shards)
        counting = [[one for one in of_worker.micro_batches if not one.micro_batch.is_stand_in] for of_worker in shards]
        step, sums, total, weights = shards[0].step, [], 0.0, []
        with self.without_hooks():
            if self._layers:
                forwards = [partial(self._sums_of, step, one) for of_worker in counting for one in of_worker]
                results = iter(together(self._layers, forwards))
            else:
                results = (self._sums_of(step, one) for of_worker in counting for one in of_worker)
            for of_worker in counting:
                parts: list[Gradient] = []
                weight = 0.0
                for weighted, its_weight in islice(results, len(of_worker)):
                    parts.append(self._gradient(weighted, is_last=not self._layers))
                    total += weighted.item()
                    weight += its_weight.item()
                if weight:
                    sums.append({name: torch.stack([one[name] for one in parts]).sum(0) for name in parts[0]})
                    weights.append(weight)
        names = self.trained.by_name
        gradient = {name: torch.stack([one[name] for one in sums]).sum(0) / sum(weights) for name in names}
        means = [{name: one[name] / weight for name in names} for one, weight in zip(sums, weights, strict=True)]
        mean_of_means = {name: torch.stack([one[name] for one in means]).mean(0) for name in names}
        return Cut(total / sum(weights), gradient, mean_of_means)

    def _cut_of_pair(self, pair: Pair, shards: list[Shard]) -> Cut:
        step = shards[0].step
        of_workers = [[one for one in shard.micro_batches if not one.micro_batch.is_stand_in] for shard in shards]
        with self.without_hooks():
            loss, gradient = self._of_group(pair, step, [one for of_worker in of_workers for one in of_worker])
            groups = [of_worker for of_worker in of_workers if sum(one.micro_batch.size for one in of_worker) > 1]
            means = [self._of_group(pair, step, group)[1] for group in groups] or [gradient]
        mean_of_means = {name: torch.stack([one[name] for one in means]).mean(0) for name in gradient}
        return Cut(loss, gradient, mean_of_means)

    def _of_group(self, pair: Pair, step: int, group: list[Examples]) -> tuple[float, Gradient]:
        """(mean loss, its gradient) of examples that look at each other, each micro-batch encoded under its own key."""
        parts = [self.encodings(pair, one, step, one.micro_batch.number) for one in group]
        key_generators(self._device, self._config.seed, step, OF_LOSSES)
        with autocast(self._precision, self._device):
            terms = pair.losses([torch.cat(of_one) for of_one in zip(*parts, strict=True)])
        weighted, weight = self._sums(terms)
        return (weighted / weight).item(), self._gradient(weighted / weight)

    def update(self, step: int, gradient: Gradient) -> dict[str, Tensor]:
        """Parameters after hooks, clipping and a step of the optimizer with this mean gradient."""
        hooks = GradientHooks(self.trained)
        hooks.take_off()
        try:
            for name, parameter in self.trained.by_name.items():
                parameter.grad = gradient[name].to(parameter.dtype) if name in gradient else None
            hooks.call()
            if self._config.max_grad_value is not None:
                torch.nn.utils.clip_grad_value_(self.trained.parameters, self._config.max_grad_value)
            if self._config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.trained.parameters, self._config.max_grad_norm)
            schedule = self.trainer.setup.settings.schedule
            if schedule is not None:
                for group, rate in zip(self.trainer.setup.optimizer.param_groups, self._rates, strict=True):
                    group["lr"] = rate * schedule(step)
            self.trainer.setup.optimizer.step()
        finally:
            hooks.put_back()
        return {name: parameter.detach() for name, parameter in self.trained.by_name.items()}

    def _sums_of(self, step: int, examples: Examples) -> tuple[Tensor, Tensor]:
        return self._sums(self.losses(examples, step, examples.micro_batch.number))

    def _sums(self, terms: PerExample) -> tuple[Tensor, Tensor]:
        """(Σ w_i L_i, Σ w_i); a loss of weight 0 counts as 0, even if it is not finite."""
        losses = terms.losses.double()
        if terms.weights is None:
            return losses.sum(), losses.new_tensor(float(losses.numel()))
        weights = terms.weights.double()
        return (torch.where(weights != 0, losses, 0.0) * weights).sum(), weights.sum()

    def _gradient(self, loss: Tensor, *, is_last: bool = True) -> Gradient:
        """is_last: no other gradient comes from the same graph."""
        scale = FP16_SCALE if self._precision is Precision.fp16 else 1.0
        held = self.with_gradient()
        found = torch.autograd.grad(loss * scale, list(held.values()), allow_unused=True, retain_graph=not is_last)
        gradients = dict(zip(held, found, strict=True))
        wide = {name: torch.promote_types(p.dtype, torch.float64) for name, p in self.trained.by_name.items()}
        return {
            name: torch.zeros_like(p, dtype=wide[name])
            if (g := gradients.get(name)) is None
            else g.to(wide[name]) / scale
            for name, p in self.trained.by_name.items()
        }

    def without_hooks(self) -> "_HooksOff":
        return _HooksOff(GradientHooks(self.trained))


class _HooksOff:
    """Removes users' hooks on parameters during the reference's backward."""

    def __init__(self, hooks: GradientHooks) -> None:
        self._hooks = hooks

    def __enter__(self) -> None:
        self._hooks.take_off()

    def __exit__(self, *error: object) -> None:
        self._hooks.put_back()


def digests(shard: Shard) -> list[str]:
    """Like `Done.digests`, for one worker."""
    return [content(one.batch) for one in shard.micro_batches if not one.micro_batch.is_stand_in]
