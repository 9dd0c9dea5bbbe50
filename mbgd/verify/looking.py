"""Looks for reasons why an average is wrong: computes a few examples alone, together and with other examples.

All in float64 and on one worker, except `losses_here`, which all workers compute.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mbgd.batches.reading import Indices
from mbgd.config import BatchNormOver, Precision
from mbgd.task.objective import PerExample
from mbgd.task.task import plain_name
from mbgd.text.listing import shown
from mbgd.verify import findings
from mbgd.verify.findings import Finding
from mbgd.verify.reference import Reference
from mbgd.verify.trainers import NUM_EXAMPLES, SAME, of_each, read_examples, same

STEP = 1e-6
"""Step of finite differences, relative to the parameter's norm."""

NEARBY = 1e-3
"""Distance of the nearby point, relative to the parameter's norm."""

DERIVATIVE_TOLERANCE = 1e-3


class Looking:
    """The probes, on a reference with the subject's parameters."""

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
        if not same(first, again):
            self.is_random = True
            number = int((first - again).abs().argmax())
            return [findings.unkeyed(first=first[number].item(), again=again[number].item())]
        found = list(self._look_for_keyed(first))
        found += self._look_for_coupling(first)
        found += self._look_at_derivatives()
        if operations := self._nondeterministic():
            found.append(findings.nondeterministic(operations=operations))
        return found

    def _look_for_keyed(self, losses: Tensor) -> Iterator[Finding]:
        with torch.no_grad():
            by_key = [of_each(self._terms(self._few, key)) for key in (1, 2)]
        if not same(losses, self._each(self._few, 2)) or not same(*by_key):
            self.is_random = True
            names = [name for name, module in _modules(self._task, _DropoutNd) if getattr(module, "p", 0) > 0]
            yield findings.keyed(where=f" ({shown(names)})" if names else "")

    def _look_for_coupling(self, together: Tensor) -> Iterator[Finding]:
        """The first example with other examples, then each example alone."""
        if len(self._few) < 2:
            return
        in_company = self._each(np.repeat(self._few[:1], len(self._few)), 1)[:1]
        norms = [name for name, module in _modules(self._task, _BatchNorm) if module.training]
        if norms:
            if not same(together[:1], in_company) or self._gradients_differ():
                is_over_minibatch = self._reference.trainer.setup.settings.batch_norm is BatchNormOver.minibatch
                yield findings.minibatch_norm(names=norms) if is_over_minibatch else findings.batch_norm(names=norms)
            with _in_evaluation(self._task, _BatchNorm):  # is BatchNorm the only cause?
                found = list(self._coupling(self._each(self._few, 1)))
            yield from found
            return
        yield from self._coupling(together)

    def _coupling(self, together: Tensor) -> Iterator[Finding]:
        in_company = self._each(np.repeat(self._few[:1], len(self._few)), 1)[:1]
        is_coupled = not same(together[:1], in_company)
        with _in_evaluation(self._task, _DropoutNd):
            batch = self._each(self._few, 1)
            is_fixed = same(batch, self._each(self._few, 2))
            repeated = self._each(np.repeat(self._few[:1], len(self._few)), 1)
            if is_fixed and not same(repeated, repeated[:1]):
                yield findings.seeded(least=min(repeated.tolist()), greatest=max(repeated.tolist()))
                is_fixed = False
            try:
                alone = torch.cat([self._each(self._few[n : n + 1], 1) for n in range(len(self._few))])
            except Exception as error:  # a model that needs several examples may raise anything
                yield findings.not_alone(reason=f"{type(error).__name__}: {error}")
                is_fixed = False
        if is_fixed and not same(batch, alone):
            if self._task.pair is not None:
                yield findings.coupled_encodings(alone=alone[0].item(), together=batch[0].item())
                return
            if (batch.max() - batch.min()).abs() <= SAME * batch.abs().max() and not same(alone, alone[:1]):
                yield findings.reduced(
                    size=len(batch), losses="all examples have one and the same loss, although alone they have not"
                )
                return
            ratio = batch / alone
            if ratio.isfinite().all() and same(ratio, ratio.mean().expand_as(ratio)):
                losses = f"each example's loss is {ratio.mean().item():.4g} times its loss alone"
                yield findings.reduced(size=len(batch), losses=losses)
                return
            is_coupled = True
        if is_coupled:
            other = alone if is_fixed else in_company
            before = batch if is_fixed else together
            if self._task.pair is None:
                yield findings.coupled(alone=other[0].item(), together=before[0].item())
            else:
                yield findings.coupled_encodings(alone=other[0].item(), together=before[0].item())
        elif self._gradients_differ():
            yield findings.coupled_gradients()

    def _gradients_differ(self) -> bool:
        """Whether the gradient of the first example's loss depends on the other examples."""
        pairs = []
        for indices in (self._few, np.repeat(self._few[:1], len(self._few))):
            loss = of_each(self._alone(indices, 1))[0]
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
            yield findings.detached(names=detached)
        if unused:
            yield findings.unused(names=unused)
        if partly:
            yield findings.partly_detached(names=partly)

    def _compare_derivatives(self) -> tuple[list[str], list[str], list[str]]:
        """Names of parameters: (that the loss depends on but no gradient reaches, with another gradient, unused)."""
        trained = self._reference.with_gradient()
        gradients = dict(zip(trained, self._gradient(of_each(self._terms(self._few, 1)).sum()), strict=True))
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
        """Whether the gradient equals central finite differences, for one of two step lengths."""
        assert gradient is not None
        for scale in (1.0, 0.1):
            measured, direction = self._derivative(parameter, scale)
            expected = (gradient * direction).sum().item()
            if abs(measured - expected) <= DERIVATIVE_TOLERANCE * (abs(expected) + abs(measured)) + self._noise(scale):
                return True
        return False

    def _noise(self, scale: float = 1.0) -> float:
        """Rounding error of the difference quotient."""
        return 1e-14 / (STEP * scale) * max(1.0, self._size)

    def _derivative(self, parameter: Tensor, scale: float = 1.0) -> tuple[float, Tensor]:
        """(derivative of the summed loss along a random direction, the direction)."""
        direction = _direction(parameter, 0)
        distance = STEP * scale * max(parameter.norm().item(), 1.0)
        before, sums = parameter.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(before + sign * distance * direction)
                sums.append(of_each(self._terms(self._few, 1)).sum().item())
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
                self._gradient(of_each(self._terms(self._few, 1)).sum())
            finally:
                torch.use_deterministic_algorithms(was, warn_only=only_warned)
        texts = [str(one.message) for one in caught if "deterministic implementation" in str(one.message)]
        return sorted({text.split(" does not")[0] for text in texts})

    def _terms(self, indices: Indices, key: int) -> PerExample:
        return self._reference.losses(read_examples(self._reference.trainer, indices, Precision.fp64), key)

    def _each(self, indices: Indices, key: int) -> Tensor:
        with torch.no_grad():
            return of_each(self._alone(indices, key))

    def _alone(self, indices: Indices, key: int) -> PerExample:
        """What is computed of each example by itself: its loss, or one number made of its encodings."""
        if self._task.pair is None:
            return self._terms(indices, key)
        examples = read_examples(self._reference.trainer, indices, Precision.fp64)
        encodings = self._reference.encodings(self._task.pair, examples, key)
        return PerExample(torch.stack([_projected(one) for one in encodings]).sum(0))

    def _gradient(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        held = list(self._reference.with_gradient().values())
        return torch.autograd.grad(loss, held, allow_unused=True)


def _projected(encodings: Tensor) -> Tensor:
    """Each example's values along one random direction: shape (N,)."""
    values = encodings.reshape(len(encodings), -1)
    wide = values.to(torch.promote_types(values.dtype, torch.float64))
    return (wide * _direction(wide[0], 0)).sum(1).real


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
    """Inside, modules of this kind are in evaluation mode."""
    switched = [module for _, module in _modules(task, kind) if module.training]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True
