"""A trial of the task before training, with the same result on every worker and without a collective.

The first examples go forward and backward through the plain model, a few times. Afterwards parameters, buffers
and the default generators are as before, except for what a forward has initialised; gradients are cleared.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbgd.batches.loader import Data
from mbgd.batches.plan import Plan
from mbgd.batches.randomness import key_generators, random_state_kept
from mbgd.batches.reading import Indices, read
from mbgd.checks.bytes_of_images import told_of_bytes
from mbgd.checks.pairs import check_repeated, moved_by_losses
from mbgd.checks.sizes import NUM_EXAMPLES, Sizes
from mbgd.checks.watching import output_shapes, refused_operations
from mbgd.config import AveragingName, Precision, Settings
from mbgd.errors import UsageError
from mbgd.task.buffers import Buffers
from mbgd.task.extra_state import extra_state_kept
from mbgd.task.objective import PerExample, Totals, check_metric_names
from mbgd.task.precision import autocast, parameter_dtype
from mbgd.task.task import Task
from mbgd.task.torch_calls import backward
from mbgd.task.trained import GradientHooks, Trained
from mbgd.text.listing import shown

SCALES = 2.0**-10, 2.0**10
"""The gradient of each loss in the two backwards of the trial; scaling by powers of 2 is exact."""


@dataclass(frozen=True)
class Findings:
    """What the trial found out."""

    has_weights: bool
    """The objective returns weights, or losses per token, so the plan does not know the minibatch's weight."""
    has_tokens: bool
    """The objective returns losses per token."""
    losses_per_example: int
    """Number of losses per example, in the first few examples."""
    metric_names: tuple[str, ...]
    """The objective's metrics in training; an evaluation may have others."""
    moving_buffers: tuple[str, ...]
    """Names of the buffers that a forward in training mode changes."""
    unused_parameters: tuple[str, ...]
    """Names of trained parameters that got no gradient."""
    output_shape: torch.Size | None
    """Of the model's output for a few examples; None: it is not a tensor of two or more dimensions."""


class Trial:
    """Runs examples of the first minibatch through a task; UsageError where the task breaks the contract."""

    def __init__(
        self, task: Task, trained: Trained, buffers: Buffers, data: Data, plan: Plan, settings: Settings, device: Any
    ) -> None:
        self._task, self._trained, self._buffers = task, trained, buffers
        self._data, self._plan, self._settings, self._device = data, plan, settings, device

    def __call__(self, first_minibatch: Indices) -> Findings:
        """first_minibatch: the numbers of its examples."""
        few = first_minibatch[:NUM_EXAMPLES]
        with ExitStack() as stack:
            for context in (random_state_kept(self._device), extra_state_kept(self._task), self._clean()):
                stack.enter_context(context)
            stack.enter_context(refused_operations())
            shapes = stack.enter_context(output_shapes(self._task.model))
            terms, gradients = self._run(few, SCALES[0])
            if self._trained.changed():
                self._initialise(first_minibatch)
                self._buffers.put_back()
                terms, gradients = self._run(few, SCALES[0])
            self._buffers.find_unseen()
            moving = self._buffers.changed()
            if self._task.pair is not None:
                by_losses = moved_by_losses(self._task, self._task.pair, self._buffers, lambda: self._encode(few))
                moving = [name for name in moving if name not in by_losses]
            self._check_used(terms)
            self._check_shape(terms, few)
            self._buffers.put_back()
            self._trained.put_back_flags()
            self._trained.start_step()
            again, gradients_again = self._run(few, SCALES[1])
            self._check_repeated(terms, again, gradients, gradients_again)
            unused = tuple(n for n, p in self._trained.by_name.items() if p.requires_grad and n not in gradients)
            Sizes(self._task, self._buffers, self._plan, self._settings, self._encode)(first_minibatch, moving)
            moving = [name for name in moving if name in self._buffers.tensors()]  # without caches
            check_metric_names(terms.metrics)
            names = tuple(sorted(terms.metrics))
            self._check_weights(terms, first_minibatch, names)
        shape = shapes[-1] if shapes else None
        has_tokens = terms.losses.dim() > 1
        return Findings(
            has_weights=terms.weights is not None or has_tokens,
            has_tokens=has_tokens,
            losses_per_example=terms.losses.numel() // len(few),
            metric_names=names,
            moving_buffers=tuple(moving),
            unused_parameters=unused,
            output_shape=shape,
        )

    @contextmanager
    def _clean(self) -> Iterator[None]:
        """Restores buffers afterwards, clears gradients, and takes users' hooks off for the trial."""
        hooks = GradientHooks(self._trained)
        hooks.take_off()
        self._buffers.start_step()
        self._trained.start_step()
        self._trained.remember_flags()
        try:
            yield
        finally:
            self._buffers.put_back()
            self._trained.put_back_flags()
            for parameter in self._task.parameters():
                parameter.grad = None
            hooks.put_back()

    def _forward(self, indices: Indices) -> PerExample:
        with self._read(indices) as batch:
            terms: PerExample = self._task(batch, len(indices))
            return terms

    def _encode(self, indices: Indices) -> Any:
        """The forward of a micro-batch that is not the whole minibatch."""
        if self._task.pair is None:
            return self._forward(indices)
        with self._read(indices) as batch:
            return self._task.pair.encode(self._task.model, batch, len(indices))

    @contextmanager
    def _read(self, indices: Indices) -> Iterator[Any]:
        """The batch of these examples, with keyed generators and the run's precision."""
        settings = self._settings
        dtype = parameter_dtype(settings.precision)
        data, device, seed = self._data.train, self._device, settings.seed
        how: dict[str, Any] = {"num_workers": 0, "device": device, "dtype": dtype, "seed": seed}
        (batch,) = read(data, [indices], collate=self._data.collate, **how)
        key_generators(self._device, settings.seed)
        with autocast(settings.precision, self._device), told_of_bytes(batch):
            yield batch

    def _run(self, indices: Indices, scale: float) -> tuple[PerExample, dict[str, Tensor]]:
        """Forward and backward; returns the per-example losses and the gradients, by the parameters' names."""
        terms = self._forward(indices)
        if not terms.losses.requires_grad:
            raise UsageError(
                "the objective's losses do not depend on any of the model's "
                f"{len(self._trained.with_gradient())} trainable parameters; there is nothing to train. Compute the "
                "losses from the model's output without detach() or no_grad()."
            )
        backward([terms.losses], [torch.full_like(terms.losses, scale)])
        gradients = {name: p.grad for name, p in self._trained.by_name.items() if p.grad is not None}
        for name, gradient in gradients.items():
            if gradient.layout is not torch.strided:
                raise UsageError(
                    f"the gradient of parameter {name} is sparse; only dense ones can be averaged, clipped and "
                    "measured. Make the layer with sparse=False."
                )
        return terms, gradients

    def _check_shape(self, terms: PerExample, few: Indices) -> None:
        """UsageError if the losses have a second dimension of examples, as torch broadcasts (N, 1) against (N,)."""
        if self._task.pair is not None or len(few) not in terms.losses.shape[1:]:
            return
        shapes = []
        for number in (2, 3):
            self._buffers.put_back()
            with torch.no_grad():
                # The same example, so that padding does not depend on the number.
                shapes.append(self._forward(few[:1].repeat(number)).losses.shape)
        if any(sizes == (2, 3) for sizes in list(zip(*shapes, strict=False))[1:]):
            raise UsageError(
                f"objective returned losses of shape {tuple(terms.losses.shape)} for {len(few)} examples: one for each "
                "pair of examples. This happens where outputs of shape (N, 1) meet targets of shape (N,), which torch "
                "broadcasts. Give both one shape, such as outputs.squeeze(1). A loss of pairs: docs/coupled_losses.md."
            )

    def _check_used(self, terms: PerExample) -> None:
        if not any(parameter.grad is not None for parameter in self._trained.parameters):
            raise UsageError(
                "no parameter that the optimizer holds takes part in the objective's losses; there is nothing to "
                f"train. The optimizer holds {shown(self._trained.by_name)}."
            )

    def _check_repeated(
        self, once: PerExample, again: PerExample, gradients: dict[str, Tensor], others: dict[str, Tensor]
    ) -> None:
        if not torch.equal(once.losses.nan_to_num(), again.losses.nan_to_num()):
            if self._task.pair is not None:
                check_repeated("losses", once.losses.detach(), again.losses.detach())
            if self._settings.averaging.name is AveragingName.reproducible:
                raise UsageError(
                    "averaging=reproducible, but two computations of the same examples differ: losses "
                    f"{once.losses[:2].tolist()} and {again.losses[:2].tolist()}. The model or the objective draws "
                    "random numbers from a generator of its own, or keeps state between calls. Draw from torch's "
                    "default generators, which the trainer keys by (seed, step, micro-batch)."
                )
            return
        if self._settings.precision is Precision.fp16:
            return  # the larger scale overflows
        for name in gradients.keys() & others.keys():
            large = others[name]
            # In its own memory: at the start every worker has a whole model and two gradients, which may be the peak.
            error = torch.linalg.vector_norm(gradients[name].mul_(SCALES[1] / SCALES[0]).sub_(large))
            if error.isfinite() and error > 0.01 * torch.linalg.vector_norm(large):
                raise UsageError(
                    f"the gradient of parameter {name} does not grow in proportion to the losses: a hook on an "
                    "activation or a backward of your own clamps, rounds or normalises it. It would see gradients of "
                    "a sum of losses, not of the minibatch's mean, and do something else on every number of workers. "
                    "Use a hook on the parameter (p.register_hook), which gets the mean gradient, or max_grad_norm."
                )

    def _initialise(self, first_minibatch: Indices) -> None:
        """A forward has changed parameters: let it initialise them from the first minibatch, as in plain torch.

        UsageError where every forward changes them, and so differently on every worker.
        """
        marks = self._buffers.marks()
        self._trained.start_step()
        with torch.no_grad():
            self._forward(first_minibatch[:NUM_EXAMPLES])
        if repeatedly := self._trained.changed():
            if self._plan.most_forwards == 1:
                return
            raise UsageError(
                f"the forward changes parameters in place ({shown(repeatedly)}), as Embedding(max_norm=…) does. Each "
                "worker and micro-batch would change them differently, and the workers' copies would differ. Bound "
                "them in the loss or by a parametrization instead (torch.nn.utils.parametrize); it works as it is with "
                "one worker and one micro-batch."
            )
        flags = [name for name, mark in self._buffers.marks().items() if mark == marks[name]]
        self._buffers.put_back()
        with torch.no_grad():
            self._forward(first_minibatch)
        self._buffers.put_back(but=flags)  # such as a flag that marks the initialisation as done
        self._trained.start_step()

    def _check_weights(self, terms: PerExample, first_minibatch: Indices, names: tuple[str, ...]) -> None:
        if terms.weights is not None and terms.losses.dtype in (torch.bfloat16, torch.float16):
            raise UsageError(
                f"objective returned losses in {terms.losses.dtype} and weights, which would be rounded to 16 bits. "
                "Compute the losses in float32, or return losses.float()."
            )
        totals = Totals(terms.sums(names), names)
        if totals.weight == 0:
            self._buffers.put_back()
            with torch.no_grad():
                totals = Totals(self._forward(first_minibatch).sums(names), names)
        totals.check_weights("in the first minibatch")
