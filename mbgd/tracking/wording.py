"""Metrics, the plan of a run and what it came to, in words."""

from pathlib import Path

import torch

from mbgd import threads
from mbgd.escaping import plain
from mbgd.plan import Plan
from mbgd.tracking.base import Metrics
from mbgd.trainer import Result, Trainer

DETAILS = (
    "epoch",
    "parameter_norm",
    "update_ratio",
    "noise_scale",
    "gradient_variance",
    "num_workers",
    "skipped_steps",
    "examples_per_second",
)
"""What is in metrics.jsonl and the report, and would only make a line long; speed comes last in a line."""


def describe(metrics: Metrics) -> str:
    """Metrics in one line, most important first."""
    parts: list[str] = []
    for name, value in metrics.items():
        group, _, short = name.partition("/")
        if short in DETAILS or group == "time" or isinstance(value, str):
            continue
        is_first_of_evaluation = group == "eval" and not any(part.startswith("eval") for part in parts)
        parts.append(f"{'eval ' if is_first_of_evaluation else ''}{plain(short.replace('_', ' '))} {value:.4g}")
    for unit in ("examples", "tokens"):
        speeds = [value for name, value in metrics.items() if name.endswith(f"/{unit}_per_second")]
        parts += [f"{speed:,.0f} {unit}/s" for speed in speeds if not isinstance(speed, str)]
    return " · ".join(parts)


def is_evaluation(metrics: Metrics) -> bool:
    return any(name.startswith("eval/") for name in metrics)


def describe_start(trainer: Trainer) -> str:
    """The plan of a run in one block."""
    return "\n".join(f"{name:<11} {value}" for name, value in plan_lines(trainer).items())


def plan_lines(trainer: Trainer) -> dict[str, str]:
    """The plan of a run, line by line."""
    plan, workers = trainer.plan, trainer.workers
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "minibatch": describe_cut(plan),
        "examples": f"{plan.num_examples:,} for training, {trainer.num_evaluation_examples:,} for evaluation",
        "steps": f"{trainer.num_steps:,}, {plan.steps_per_epoch:,} an epoch",
        "parameters": f"{parameters:,}, {trainer.settings.precision.value}",
        "averaging": trainer.averaging_description,
        "noise scale": trainer.noise_scale.describe(),
        "device": f"{workers.device.type}, {count(torch.get_num_threads(), 'thread')} per worker"
        + "".join(f" ({reason})" for reason in threads.why),
    }


def describe_folder(folder: Path) -> str:
    return f"{'folder':<11} {plain(folder)}"


def describe_end(result: Result, folder: Path) -> str:
    """What a run came to, in a few lines."""
    last = {name: value for name, value in result.metrics.items() if name.startswith("eval/")}
    lines = {
        "result": describe(last or {k: v for k, v in result.metrics.items() if k == "train/loss"}),
        "speed": f"{result.examples_per_second:,.0f} examples/s",
        "folder": plain(folder),
    }
    if result.num_skipped_steps:
        lines["skipped"] = f"{count(result.num_skipped_steps, 'step')} whose gradients overflowed in fp16"
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


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
