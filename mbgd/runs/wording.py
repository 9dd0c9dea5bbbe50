"""A run's plan and its result, in words."""

from pathlib import Path

import torch

from mbgd.batches.plan import Plan
from mbgd.config import Config, Precision
from mbgd.optimizers.describing import described
from mbgd.optimizers.scaling import Scale
from mbgd.step.done import Result
from mbgd.task import threads
from mbgd.task.precision import parameter_dtype
from mbgd.text.escaping import plain
from mbgd.tracking.wording import describe
from mbgd.trainer import Trainer


def describe_start(trainer: Trainer) -> str:
    """The plan of a run in one block."""
    return "\n".join(f"{name:<11} {value}" for name, value in plan_lines(trainer).items())


def plan_lines(trainer: Trainer) -> dict[str, str]:
    """The plan of a run, line by line."""
    plan, workers = trainer.setup.plan, trainer.setup.workers
    parameters = sum(p.numel() for p in trainer.setup.model.parameters() if p.requires_grad)
    sets = trainer.evaluations.num_examples
    evaluation = " + ".join(f"{number:,} {name}".rstrip() for name, number in sets.items()) or "0"
    graphs = trainer.train_step.describe_cuda_graphs
    return {
        "minibatch": describe_cut(plan),
        "examples": f"{plan.num_examples:,} for training, {evaluation} for evaluation",
        "steps": f"{trainer.setup.num_steps:,}, {plan.steps_per_epoch:,} an epoch",
        "parameters": f"{parameters:,} in {describe_precision(trainer.setup.settings.precision)}",
        "optimizer": _describe_optimizer(trainer),
        "averaging": trainer.train_step.averaging.describe(),
        "sharding": trainer.train_step.describe_sharding,
        **({"cuda graphs": graphs} if graphs else {}),
        "noise scale": trainer.train_step.noise_scale.describe(),
        "device": f"{workers.device.type}, {count(torch.get_num_threads(), 'thread')} per worker"
        + "".join(f" ({reason})" for reason in threads.why),
    }


def numbers(trainer: Trainer) -> dict[str, int]:
    """The plan's numbers, for programs."""
    plan = trainer.setup.plan
    return {
        "steps": trainer.setup.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "examples_per_epoch": plan.examples_per_epoch,
        "minibatch_size": min(plan.minibatch_size, plan.num_examples),
    }


def _describe_optimizer(trainer: Trainer) -> str:
    settings, rates = trainer.setup.settings, trainer.train_step.update.base_rates
    node = settings.optimizer if isinstance(settings, Config) and isinstance(settings.optimizer, dict) else {}
    scale = Scale.of(node.get("lr_scale_with"))
    return described(trainer.setup.optimizer, rates, scale, settings.batch.size)


def describe_precision(precision: Precision) -> str:
    """For example: fp32, forward in bf16."""
    if precision is Precision.bf16_true:
        return "fp32, matrices and the forward in bf16"
    if parameter_dtype(precision) is torch.float32 and precision is not Precision.fp32:
        return f"{Precision.fp32.value}, forward in {precision.value}"
    return str(precision.value)


def describe_folder(folder: Path) -> str:
    return f"{'folder':<11} {plain(folder)}"


def describe_end(result: Result, report: Path | None, width: float) -> str:
    """A run's result, in a few lines, no wider than `width` where that can be.

    report: its file, if it is written; the run's folder was named at the start.
    """
    last = {name: value for name, value in result.metrics.items() if name.startswith("eval/")}
    shown = last or {k: v for k, v in result.metrics.items() if k == "train/loss"}
    lines = {
        "speed": f"{result.examples_per_second:,.0f} examples/s",
    }
    if report is not None:
        lines["report"] = plain(report)
    if result.stopped_by:
        lines["stopped"] = f"by {result.stopped_by}, after step {result.steps}"
    if result.weights_step is not None:
        lines["weights"] = f"of the best evaluation, after step {result.weights_step}"
    if result.num_skipped_steps:
        lines["skipped"] = f"{count(result.num_skipped_steps, 'step')} whose gradients overflowed in fp16"
    rest = [f"{name:<11} {value}" for name, value in lines.items()]
    return "\n".join([describe(shown, f"{'result':<11} ", width), *rest])


def describe_cut(plan: Plan) -> str:
    """For example: 256 = 2 workers × 2 micro-batches × 64."""
    size = min(plan.minibatch_size, plan.num_examples)
    num_micro_batches = plan.num_micro_batches(size)
    per_worker, uneven_workers = divmod(num_micro_batches, plan.num_workers)
    per_micro_batch, uneven_examples = divmod(size, num_micro_batches)
    if uneven_workers or uneven_examples:
        sizes = f"{per_micro_batch} or {per_micro_batch + 1}" if uneven_examples else str(per_micro_batch)
        return (
            f"{size} examples in {num_micro_batches} micro-batches of {sizes}, for {count(plan.num_workers, 'worker')}"
        )
    return f"{size} = {count(plan.num_workers, 'worker')} × {count(per_worker, 'micro-batch')} × {per_micro_batch}"


def count(number: int, thing: str) -> str:
    """1 worker, 2 workers, 3 micro-batches."""
    plural = thing + ("es" if thing.endswith("ch") else "s")
    return f"{number} {thing if number == 1 else plural}"
