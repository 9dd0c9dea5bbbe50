"""From a configuration to an Explanation: one optimizer step in float64, in all its parts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mbgd.batches.describing import kind
from mbgd.batches.plan import cut
from mbgd.batches.reading import read
from mbgd.config import Config, Precision
from mbgd.errors import UsageError
from mbgd.explain.explanation import Example, Explanation, Next, Opposite, Share, Weight
from mbgd.explain.one_by_one import Chosen, by_vmap, choose, one_at_a_time, part, sums, values_at
from mbgd.explain.variance import Variance, measure
from mbgd.verify.reference import Reference

MOST_EXAMPLES = 512
LOSSES = 2.0, -2.0


class Explained:
    """The configuration's first minibatch, and all that explain computes from it."""

    def __init__(self, config: Config, num_workers: int, seconds: float) -> None:
        """seconds: limit for measuring the variance."""
        if config.batch.size > MOST_EXAMPLES:
            raise UsageError(
                f"batch.size={config.batch.size}; explain shows each example, {MOST_EXAMPLES} at most. Use "
                "batch.size=4."
            )
        self._config, self._seconds = config, seconds
        self._reference = Reference(config, torch.device("cpu"), Precision.fp64)
        trainer = self._reference.trainer
        self.dataset, self._collate = trainer.setup.data.train, trainer.setup.data.collate
        self._task = self._reference.task
        if self._task.pair is not None:
            raise UsageError(
                f"objective={kind(self._task.given_objective).rpartition('.')[2]}: its losses look at several examples "
                "at once, so no example has a loss and a gradient of its own, and explain has nothing to show. "
                "`mbgd verify` compares the whole minibatch's gradient."
            )
        if config.batch.size > len(self.dataset):
            raise UsageError(
                f"batch.size={config.batch.size}, but there are {len(self.dataset)} training examples; a minibatch "
                f"holds each once. Use batch.size={min(4, len(self.dataset))}."
            )
        (self.examples,) = next(self._reference.shards(1)).micro_batches
        self.size = self.examples.micro_batch.size
        if not 1 <= num_workers <= self.size:
            raise UsageError(
                f"--workers {num_workers} with {self.size} examples; the minibatch is split over 1 to {self.size}."
            )
        self._num_workers = num_workers
        self.numbers = [int(number) for number in trainer.setup.loader.minibatch_indices(0)]
        self._notes: list[str] = []
        self._leave_out_noise()

    def __call__(self) -> Explanation:
        with self._reference.without_hooks():
            mean_loss, gradient = self._reference.whole(self._shard())
            chosen = choose(gradient)
            before = values_at(self._parameters(), chosen)
            examples, difference = self._each(gradient, chosen)
            method = self._method(examples, chosen)
            shares = self._shares(chosen)
            opposite = self._opposite(chosen) if self.size > 1 else None
            variance = self._variance()
        weight = sum(one.weight for one in examples)
        means = [sum(one.weight * one.gradient[n] for one in examples) / weight for n in range(len(chosen))]
        self._reference.update(0, {name: g for name, g in gradient.items() if g.any()})
        columns = (before, means, values_at(gradient, chosen), values_at(self._parameters(), chosen))
        return Explanation(
            about=self._about(),
            notes=self._notes,
            method=method,
            examples=examples,
            weights=[Weight(one.label, *values) for one, *values in zip(chosen, *columns, strict=True)],
            mean_loss=mean_loss,
            difference=difference,
            shares=shares,
            total=[sum(share.sums[n] for share in shares) for n in range(len(chosen))],
            total_weight=weight,
            opposite=opposite,
            next=self._next(examples[0], chosen),
            variance=variance,
        )

    def _leave_out_noise(self) -> None:
        """Use evaluation mode if an example's loss would depend on random draws or on other examples."""
        names = {
            type(module).__name__
            for module in self._task.modules()
            if isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0)
        }
        if names:
            self._task.eval()
            self._notes.append(
                f"The model has {' and '.join(sorted(names))}: it is shown in evaluation mode, in which each example "
                "has a loss of its own."
            )

    def _shard(self) -> Any:
        return next(self._reference.shards(1))

    def _parameters(self) -> Mapping[str, Tensor]:
        return self._reference.trained.by_name

    def _about(self) -> dict[str, str]:
        trainer = self._reference.trainer
        rate = self._reference.trainer.setup.optimizer.param_groups[0]["lr"]
        return {
            "model": type(trainer.setup.model).__name__,
            "weights": f"{sum(p.numel() for p in self._parameters().values()):,}",
            "data": f"{len(self.dataset):,} examples of {type(self.dataset).__name__}",
            "objective": kind(self._task.given_objective).rpartition(".")[2],
            "optimizer": f"{type(trainer.setup.optimizer).__name__}, learning rate {rate:g}",
            "minibatch": f"{self.size} examples",
        }

    def _each(self, gradient: Mapping[str, Tensor], chosen: list[Chosen]) -> tuple[list[Example], float]:
        """Each example alone; and the relative difference between their mean gradient and `gradient`."""
        length = _norm(gradient)
        found, total, weights = [], {name: torch.zeros_like(g) for name, g in gradient.items()}, 0.0
        for number, (of_sum, loss, weight) in zip(
            self.numbers, one_at_a_time(self._task, self.examples.batch, self.size), strict=True
        ):
            norm = _norm(of_sum)
            dot = sum(float((of_sum[name] * g).sum()) for name, g in gradient.items() if name in of_sum)
            cosine = dot / (norm * length) if norm and length else 0.0
            divisor = weight or 1.0
            shown = [value / divisor for value in values_at(of_sum, chosen)]
            found.append(Example(number, loss / divisor, weight, shown, norm / divisor, cosine))
            for name in total.keys() & of_sum.keys():
                total[name] += of_sum[name]
            weights += weight
        off = _norm({name: g / weights - gradient[name] for name, g in total.items()})
        return found, off / length if length else off

    def _method(self, per_example: list[Example], chosen: list[Chosen]) -> str:
        """Compute the same gradients by torch.func if the model allows it; UsageError if they differ."""
        weights = torch.tensor([one.weight or 1.0 for one in per_example], dtype=torch.float64)
        try:
            found = by_vmap(self._task, self.examples.batch, self.size, chosen) / weights[:, None]
        except Exception as error:  # vmap raises many types for models that it does not support
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self._notes.append(f"torch.func.vmap cannot take this model ({reason}), so examples were taken in a loop.")
            return "a loop over the examples, each forward and backward alone"
        alone = torch.tensor([one.gradient for one in per_example], dtype=torch.float64)
        if not torch.allclose(found, alone, rtol=1e-6, atol=1e-9):
            raise UsageError(
                "the examples' gradients by torch.func are others than by backward of each example alone; a hook or a "
                "backward of the model's own works over the batch. `python -m mbgd verify` looks for it."
            )
        return "torch.func: vmap of grad, and each example alone by backward: the same"

    def _shares(self, chosen: list[Chosen]) -> list[Share]:
        """Each worker's sum: one backward of the sum of its own examples' losses."""
        shares = []
        for worker in range(self._num_workers):
            start, stop = (cut(self.size, self._num_workers, n) for n in (worker, worker + 1))
            losses, weights = sums(self._task(part(self.examples.batch, start, stop), stop - start))
            of_sum = values_at(self._gradient(losses.sum()), chosen)
            shares.append(Share(worker, start + 1, stop, float(weights.sum()), of_sum))
        return shares

    def _opposite(self, chosen: list[Chosen]) -> Opposite:
        losses, weights = sums(self._task(part(self.examples.batch, 0, 2), 2))
        losses = losses / weights.clamp(min=1e-300)
        mean = (losses - losses.detach() + losses.new_tensor(LOSSES)).mean()
        gradient = self._gradient(mean)
        return Opposite(float(mean.detach()), values_at(gradient, chosen), _norm(gradient))

    def _next(self, before: Example, chosen: list[Chosen]) -> Next:
        (of_sum, loss, weight) = next(one_at_a_time(self._task, self.examples.batch, 1))
        divisor = weight or 1.0
        after = [value / divisor for value in values_at(of_sum, chosen)]
        return Next(before.loss, loss / divisor, before.gradient, after)

    def _variance(self) -> Variance:
        seed = self._config.seed

        def gradient(numbers: Tensor) -> Tensor:
            (batch,) = read(
                self.dataset,
                [numbers.numpy()],
                num_workers=0,
                device=torch.device("cpu"),
                dtype=torch.float64,
                seed=seed,
                collate=self._collate,
            )
            losses, weights = sums(self._task(batch, len(numbers)))
            found = self._gradient(losses.sum() / weights.sum().clamp(min=1e-300))
            return torch.cat([one.flatten() for one in found.values()])

        return measure(gradient, len(self.dataset), self._seconds)

    def _gradient(self, loss: Tensor) -> dict[str, Tensor]:
        held = self._parameters()
        found = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(held.items(), found, strict=True)}


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return float(sum(float(g.square().sum()) for g in gradient.values()) ** 0.5)
