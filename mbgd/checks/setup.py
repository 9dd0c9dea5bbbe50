"""What a trainer works with, checked before the first step, with the same result on every worker."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from mbgd import averaging
from mbgd.averaging.batch_norm import layers_of
from mbgd.batches.loader import Data, Loader
from mbgd.batches.plan import Plan, count_steps, make_plan
from mbgd.checks import batch_norm, optimizers
from mbgd.checks.preflight import Findings, Trial
from mbgd.checks.same_program import check_same_program
from mbgd.checks.targets import check_skipping, check_targets, check_vocabulary
from mbgd.config import AveragingName, BatchNormOver, Config, Duration, Precision, Settings, resolved, validate
from mbgd.config.duration import whole
from mbgd.errors import UsageError
from mbgd.schedule import Schedule
from mbgd.task import extra_state
from mbgd.task.activation_checkpointing import checkpoint_
from mbgd.task.buffers import Buffers
from mbgd.task.modes import set_training
from mbgd.task.objective import Objective
from mbgd.task.precision import parameter_dtype
from mbgd.task.task import Task, refuse_odd_parts
from mbgd.task.trained import Trained, check_module_hooks, describe_not_held, move_
from mbgd.text.listing import shown
from mbgd.workers.group import Workers


@dataclass(frozen=True)
class Setup:
    """Model, objective, optimizer and data, cast and moved to this worker's device, and the findings of the trial."""

    model: nn.Module
    optimizer: Optimizer
    data: Data
    settings: Settings
    """With durations in whole steps."""
    workers: Workers
    plan: Plan
    num_steps: int
    """Optimizer steps of the whole run."""
    task: Task
    trained: Trained
    buffers: Buffers
    loader: Loader
    findings: Findings
    warnings: list[str]
    program: Mapping[str, str]
    """What every worker must run alike."""

    def tell(self, *texts: str) -> None:
        """Print the texts on the main worker."""
        for text in texts if self.workers.is_main else ():
            print(text, flush=True)

    @cached_property
    def minibatch_norms(self) -> dict[str, _BatchNorm]:
        """The BatchNorm layers that use the statistics of the whole minibatch, by name."""
        return layers_of(self.task) if self.settings.batch_norm is BatchNormOver.minibatch else {}

    @property
    def has_own_losses(self) -> bool:
        """Whether each example has a loss of its own, which does not depend on the others of the minibatch."""
        return self.task.pair is None and not self.minibatch_norms

    @cached_property
    def compared_every_steps(self) -> list[int]:
        """The copies of the state are compared every N steps, for each N here, and before each evaluation."""
        every: list[Duration | None] = [self.settings.check.replicas_every_steps]
        if isinstance(self.settings, Config):
            every += [self.settings.checkpoint.every_steps, self.settings.checkpoint.memory_every_steps]
        return [whole(one) for one in every if one is not None]

    def compares_after(self, num_steps: int) -> bool:
        """Whether the copies of the state are compared after `num_steps` steps, beside evaluations."""
        return num_steps == self.num_steps or any(num_steps % one == 0 for one in self.compared_every_steps)


def set_up(
    model: nn.Module, objective: Objective, optimizer: Optimizer, data: Data, settings: Settings, workers: Workers
) -> Setup:
    """UsageError, the same on every worker, where a rule is broken or the workers do not run the same program."""
    if found := validate(settings):
        raise UsageError("\n".join(found))
    program = check_same_program(workers, model, objective, optimizer, data, settings)
    plan = make_plan(settings, len(data.train), workers.num_workers)
    if settings.matmul_precision is not None:
        torch.set_float32_matmul_precision(settings.matmul_precision.value)
    settings = resolved(settings, plan)
    if isinstance(settings.schedule, Schedule):
        settings = replace(settings, schedule=settings.schedule.in_steps(plan))
    averaging.prepare(settings.averaging, plan, workers.device)
    optimizers.check(optimizer)
    task = _checked_task(model, objective, settings)
    dtype = parameter_dtype(settings.precision)
    move_(task, optimizer, workers.device, dtype)
    trained = Trained(task, optimizer)
    _check_clipping(trained, settings)
    warnings = _set_up_modes(task, trained) + batch_norm.check(task, settings, plan)
    own_copies = settings.averaging.name is AveragingName.reproducible
    loader = Loader(data, plan, settings.seed, workers, dtype=dtype, own_copies=own_copies)
    buffers = Buffers(task, workers.device)
    for dataset in (data.train, *data.evaluation_sets.values()):
        check_skipping(dataset, objective)
        check_vocabulary(dataset, model)
    findings = Trial(task, trained, buffers, data, plan, settings, workers.device)(loader.minibatch_indices(0))
    check_targets(data.train, objective, findings.output_shape)
    buffers.expect(findings.moving_buffers)
    checkpoint_(model, settings.activation_checkpointing.layers, findings.moving_buffers)
    return Setup(
        model,
        optimizer,
        data,
        settings,
        workers,
        plan,
        count_steps(settings, plan),
        task,
        trained,
        buffers,
        loader,
        findings,
        warnings,
        program,
    )


def _checked_task(model: nn.Module, objective: Objective, settings: Settings) -> Task:
    """UsageError where model or objective have parts that the trainer does not support."""
    task = Task(model, objective, in_bf16=settings.precision is Precision.bf16_true)
    refuse_odd_parts(task)
    _check_pair(task, settings)
    check_module_hooks(task)
    extra_state.check(task)
    return task


def _check_clipping(trained: Trained, settings: Settings) -> None:
    """UsageError where elements that have no order would be clipped by value."""
    complex_ones = [name for name, parameter in trained.by_name.items() if parameter.is_complex()]
    if settings.max_grad_value is not None and complex_ones:
        raise UsageError(
            f"max_grad_value={settings.max_grad_value}, but the parameters {shown(complex_ones)} are complex, which "
            "torch cannot clip by value. Use max_grad_norm."
        )


def _check_pair(task: Task, settings: Settings) -> None:
    """UsageError for settings that a coupled objective does not go with."""
    if task.pair is None:
        return
    if settings.precision is Precision.bf16_true:
        raise UsageError("precision=bf16-true with a coupled objective (encode and losses). Use precision=bf16.")
    if settings.batch_norm is BatchNormOver.minibatch:
        raise UsageError(
            "batch_norm=minibatch with a coupled objective (encode and losses), whose examples pass through the model "
            "twice. Use batch_norm=micro_batch, or a normalisation of single examples, such as GroupNorm."
        )


def _set_up_modes(task: Task, trained: Trained) -> list[str]:
    """Put modules that are wholly in evaluation mode into training mode; warnings, also of untrained parameters."""
    told = [describe_not_held(trained.not_held)] if trained.not_held else []
    for name, module in (("model", task.model), ("objective", task.objective)):
        if module is not None and set_training(module):
            told.append(
                f"note: the {name} came in evaluation mode and is trained in training mode. To keep a part in "
                "evaluation mode, such as a frozen BatchNorm, pass the other parts in training mode."
            )
    return told
