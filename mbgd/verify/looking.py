"""Looks for reasons why an average cannot be right: computes a few examples alone, together and in other company.

All in float64 and on one worker, but for `losses_here`, which all workers compute.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mbgd.batches.describing import content
from mbgd.batches.loader import Examples
from mbgd.batches.plan import MicroBatch
from mbgd.batches.randomness import key_generators
from mbgd.batches.reading import Indices, read
from mbgd.config import Precision
from mbgd.task.objective import PerExample
from mbgd.task.precision import parameter_dtype
from mbgd.task.task import plain_name
from mbgd.trainer import Trainer
from mbgd.verify import findings
from mbgd.verify.findings import Finding
from mbgd.verify.reference import Reference

NUM_EXAMPLES = 8
SAME = 1e-5
"""Relative difference up to which losses count as the same; models may compute in float32 inside."""

STEP = 1e-6
"""Of finite differences, as a share of a parameter's norm."""

NEARBY = 1e-3
"""How far off the point nearby is, as a share of a parameter's norm."""

DERIVATIVE_TOLERANCE = 1e-3


class Looking:
    """The probes, on a reference that has the subject's parameters."""

    def __init__(self, reference: Reference, indices: Indices) -> None:
        """indices: the examples of the first minibatch."""
        self._reference, self._task = reference, reference.task
        self._few = self._counting(indices)
        self.is_random = False

    def _counting(self, indices: Indices) -> Indices:
        """The first few examples that have a weight: nothing shows in the loss of one that does not count."""
        found = indices[:0]
        for start in range(0, len(indices), NUM_EXAMPLES):
            some = indices[start : start + NUM_EXAMPLES]
            with torch.no_grad():
                weights = self._terms(some, 1).weights
            counts = (
                np.ones(len(some), bool)
                if weights is None
                else (weights.reshape(len(some), -1) != 0).any(1).cpu().numpy()
            )
            found = np.concatenate([found, some[counts]])[:NUM_EXAMPLES]
            if len(found) == NUM_EXAMPLES:
                break
        return found if len(found) else indices[:NUM_EXAMPLES]

    def __call__(self) -> list[Finding]:
        with self._reference.without_hooks():
            return self._look()

    def _look(self) -> list[Finding]:
        first, again = self._each(self._few, 1), self._each(self._few, 1)
        if not _same(first, again):
            self.is_random = True
            number = int((first - again).abs().argmax())
            return [findings.unkeyed([first[number].item(), again[number].item()])]
        found = list(self._look_for_keyed(first))
        found += self._look_for_coupling(first)
        found += self._look_at_derivatives()
        if operations := self._nondeterministic():
            found.append(findings.nondeterministic(operations))
        return found

    def _look_for_keyed(self, losses: Tensor) -> Iterator[Finding]:
        if not _same(losses, self._each(self._few, 2)):
            self.is_random = True
            yield findings.keyed(
                [name for name, module in _modules(self._task, _DropoutNd) if getattr(module, "p", 0) > 0]
            )

    def _look_for_coupling(self, together: Tensor) -> Iterator[Finding]:
        """The first example in other company, then each alone."""
        if len(self._few) < 2:
            return
        in_company = self._each(np.repeat(self._few[:1], len(self._few)), 1)[:1]
        norms = [name for name, module in _modules(self._task, _BatchNorm) if module.training]
        if norms:
            if not _same(together[:1], in_company) or self._gradients_differ():
                yield findings.batch_norm(norms)
            with _in_evaluation(self._task, _BatchNorm):  # whether that is all
                found = list(self._coupling(self._each(self._few, 1)))
            yield from found
            return
        yield from self._coupling(together)

    def _coupling(self, together: Tensor) -> Iterator[Finding]:
        in_company = self._each(np.repeat(self._few[:1], len(self._few)), 1)[:1]
        is_coupled = not _same(together[:1], in_company)
        with _in_evaluation(self._task, _DropoutNd):
            batch = self._each(self._few, 1)
            is_fixed = _same(batch, self._each(self._few, 2))
            repeated = self._each(np.repeat(self._few[:1], len(self._few)), 1)
            if is_fixed and not _same(repeated, repeated[:1]):
                yield findings.seeded(repeated.tolist())
                is_fixed = False
            try:
                alone = torch.cat([self._each(self._few[n : n + 1], 1) for n in range(len(self._few))])
            except Exception as error:  # whatever a model raises that cannot take one example
                yield findings.not_alone(f"{type(error).__name__}: {error}")
                is_fixed = False
        if is_fixed and not _same(batch, alone):
            if (batch.max() - batch.min()).abs() <= SAME * batch.abs().max() and not _same(alone, alone[:1]):
                yield findings.reduced(None, len(batch))
                return
            ratio = batch / alone
            if ratio.isfinite().all() and _same(ratio, ratio.mean().expand_as(ratio)):
                yield findings.reduced(ratio.mean().item(), len(batch))
                return
            is_coupled = True
        if is_coupled:
            other = alone if is_fixed else in_company
            before = batch if is_fixed else together
            yield findings.coupled(other[0].item(), before[0].item())
        elif self._gradients_differ():
            yield findings.coupled_gradients()

    def _gradients_differ(self) -> bool:
        """Whether the gradient of the first example's loss depends on its company."""
        pairs = []
        for indices in (self._few, np.repeat(self._few[:1], len(self._few))):
            loss = _of_each(self._terms(indices, 1))[0]
            pairs.append(self._gradient(loss))
        scale = max(_norm(one) for one in pairs)
        return any(_distance(a, b) > SAME * scale for a, b in zip(*pairs, strict=True))

    def _look_at_derivatives(self) -> Iterator[Finding]:
        """Gradients against finite differences, parameter by parameter.

        What disagrees is compared again at a point nearby: at a kink, such as a ReLU of exactly 0 behind a branch that
        starts at zero, finite differences measure the mean of two slopes, and the gradient is one of them.
        """
        detached, partly, unused = self._compare_derivatives()
        if detached or partly:
            with self._nearby():
                detached_there, partly_there, _ = self._compare_derivatives()
            partly = [name for name in partly_there if name in detached + partly]
            detached = [name for name in detached_there if name in detached]
        if detached:
            yield findings.detached(detached)
        if unused:
            yield findings.unused(unused)
        if partly:
            yield findings.partly_detached(partly)

    def _compare_derivatives(self) -> tuple[list[str], list[str], list[str]]:
        """Names of parameters: (that the loss depends on but no gradient reaches, with another gradient, unused)."""
        trained = self._reference.with_gradient()
        gradients = dict(zip(trained, self._gradient(_of_each(self._terms(self._few, 1)).sum()), strict=True))
        silent = [name for name, g in gradients.items() if g is None or not g.any()]
        detached = [name for name in silent if abs(self._derivative(trained[name])[0]) > self._noise()]
        partly = [name for name, g in gradients.items() if name not in silent and not self._agrees(trained[name], g)]
        unused = [name for name in silent if gradients[name] is None and name not in detached]
        return detached, partly, unused

    @contextmanager
    def _nearby(self) -> Iterator[None]:
        """All parameters are moved inside, a thousand times as far as for a finite difference."""
        trained = self._reference.with_gradient()
        before = {name: p.detach().clone() for name, p in trained.items()}
        with torch.no_grad():
            for seed, parameter in enumerate(trained.values(), start=1):
                distance = NEARBY * max(parameter.norm().item(), 1.0)
                parameter.add_(_direction(parameter, seed), alpha=distance)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(before[name])

    def _agrees(self, parameter: Tensor, gradient: Tensor | None) -> bool:
        """Whether the gradient is what finite differences measure, twice the length of the step apart."""
        assert gradient is not None
        for scale in (1.0, 0.1):
            measured, direction = self._derivative(parameter, scale)
            expected = (gradient * direction).sum().item()
            if abs(measured - expected) <= DERIVATIVE_TOLERANCE * (abs(expected) + abs(measured)) + self._noise(scale):
                return True
        return False

    def _noise(self, scale: float = 1.0) -> float:
        """The rounding of a finite difference's quotient."""
        return 1e-14 / (STEP * scale) * max(1.0, self._size)

    def _derivative(self, parameter: Tensor, scale: float = 1.0) -> tuple[float, Tensor]:
        """(derivative of the losses' sum in a direction, the direction)."""
        direction = _direction(parameter, 0)
        distance = STEP * scale * max(parameter.norm().item(), 1.0)
        before, sums = parameter.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(before + sign * distance * direction)
                sums.append(_of_each(self._terms(self._few, 1)).sum().item())
            parameter.copy_(before)
        self._size = abs(sums[0]) + 1.0
        return (sums[0] - sums[1]) / (2 * distance), direction

    _size = 1.0

    def _nondeterministic(self) -> list[str]:
        was, only_warned = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                self._gradient(_of_each(self._terms(self._few, 1)).sum())
            finally:
                torch.use_deterministic_algorithms(was, warn_only=only_warned)
        texts = [str(one.message) for one in caught if "deterministic implementation" in str(one.message)]
        return sorted({text.split(" does not")[0] for text in texts})

    def _terms(self, indices: Indices, key: int) -> PerExample:
        return self._reference.losses(read_examples(self._reference.trainer, indices, Precision.fp64), key)

    def _each(self, indices: Indices, key: int) -> Tensor:
        with torch.no_grad():
            return _of_each(self._terms(indices, key))

    def _gradient(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        held = list(self._reference.with_gradient().values())
        return torch.autograd.grad(loss, held, allow_unused=True)


def read_examples(trainer: Trainer, indices: Indices, precision: Precision) -> Examples:
    """Examples by number, as evaluations read them."""
    device, dtype = trainer.setup.workers.device, parameter_dtype(precision)
    data = trainer.setup.data.train
    (batch,) = read(data, [indices], num_workers=0, device=device, dtype=dtype, seed=trainer.setup.settings.seed)
    return Examples(MicroBatch(0, 1, 0, len(indices)), batch)


def losses_here(trainer: Trainer, indices: Indices) -> dict[str, Any]:
    """The first examples' losses by the trainer's own model on this worker, which others should give, too."""
    examples = read_examples(trainer, indices[:NUM_EXAMPLES], trainer.setup.settings.precision)
    trainer.setup.buffers.put_back()
    key_generators(trainer.setup.workers.device, trainer.setup.settings.seed)
    with torch.no_grad(), trainer.train_step.autocast:
        terms = trainer.setup.task(examples.batch, examples.micro_batch.size)
    trainer.setup.buffers.put_back()
    return {"losses": [float(loss) for loss in _of_each(terms)], "examples": content(examples.batch)}


def look_at_trainer(trainer: Trainer) -> Iterator[Finding]:
    """What the trainer itself knows."""
    if names := trainer.setup.trained.not_held:
        yield findings.not_held(names)
    if names := list(trainer.setup.findings.moving_buffers):
        yield findings.moving(names)
    hooked = [
        name
        for name, p in trainer.setup.trained.by_name.items()
        if any(not getattr(hook, "is_averaging_hook", False) for hook in (p._backward_hooks or {}).values())
        or any(
            not getattr(hook, "is_averaging_hook", False)
            for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
        )
    ]
    if hooked:
        yield findings.hooks(hooked)
    if trainer.setup.settings.precision in (Precision.bf16, Precision.fp16):
        yield findings.autocast(trainer.setup.settings.precision.value)


def compare_workers(of_workers: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What `losses_here` gave by rank."""
    main, *others = of_workers
    mine = torch.tensor(main["losses"], dtype=torch.float64)
    for rank, other in enumerate(others, start=1):
        if other["examples"] != main["examples"]:
            return [findings.other_examples(rank, 0)]
        theirs = torch.tensor(other["losses"], dtype=torch.float64)
        if not _same(mine, theirs):
            number = int((mine - theirs).abs().nan_to_num().argmax())
            return [findings.of_worker(rank, mine[number].item(), theirs[number].item())]
    return []


def _of_each(terms: PerExample) -> Tensor:
    """One number for each example: Σ w L over its places; float64."""
    losses = terms.losses.double()
    if terms.weights is not None:
        losses = torch.where(terms.weights != 0, losses, 0.0) * terms.weights.double()
    return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b.expand_as(a), rtol=SAME, atol=SAME * 1e-3, equal_nan=True))


def _direction(parameter: Tensor, seed: int) -> Tensor:
    """A random one, of length 1."""
    generator = torch.Generator().manual_seed(seed)
    direction: Tensor = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    direction /= direction.norm().clamp(min=1e-300)
    return direction


def _norm(gradients: Sequence[Tensor | None]) -> float:
    return max((g.norm().item() for g in gradients if g is not None), default=0.0)


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        other = b if a is None else a
        return 0.0 if other is None else float(other.norm())
    return float((a - b).norm())


def _modules(task: nn.Module, kind: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    return [(plain_name(name), module) for name, module in task.named_modules() if isinstance(module, kind)]


@contextmanager
def _in_evaluation(task: nn.Module, kind: type[nn.Module]) -> Iterator[None]:
    """Modules of this kind behave as in evaluations inside."""
    switched = [module for _, module in _modules(task, kind) if module.training]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True
