"""What a person sees: the plan at the start, and plain lines where standard output is not a terminal."""

import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from mbgd.plan import Plan
from mbgd.tracking.base import Metrics, Tracker
from mbgd.trainer import Result, Trainer

SECONDS_BETWEEN_LINES = 2.0
DETAILS = ("epoch", "parameter_norm", "update_ratio", "noise_scale", "gradient_variance", "skipped_steps")
"""Metrics that would only make a line long."""


def describe(metrics: Metrics) -> str:
    """Metrics in one line, most important first."""
    parts = []
    for name, value in metrics.items():
        group, _, short = name.partition("/")
        if short in DETAILS or group == "time" or isinstance(value, str):
            continue
        label = f"eval {short}" if group == "eval" else short
        parts.append(f"{label.replace('_', ' ')} {value:.4g}")
    if "time/examples_per_second" in metrics:
        parts.append(f"{metrics['time/examples_per_second']:,.0f} examples/s")
    return " · ".join(parts)


class PlainLines:
    """A line for every evaluation, and for logged steps no more often than every two seconds."""

    def __init__(self, num_steps: int, file: TextIO | None = None) -> None:
        self._num_steps, self._file = num_steps, file or sys.stdout
        self._last_line = -SECONDS_BETWEEN_LINES

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        is_evaluation = any(name.startswith("eval/") for name in metrics)
        now = time.monotonic()
        if metrics and (is_evaluation or now - self._last_line >= SECONDS_BETWEEN_LINES):
            print(f"step {step}/{self._num_steps} · {describe(metrics)}", file=self._file, flush=True)
            self._last_line = now

    def close(self) -> None:
        pass


def tracker(num_steps: int) -> Tracker:
    """A progress bar where standard output is a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        from mbgd.tracking.progress_bar import ProgressBar  # rich takes a while to import

        return ProgressBar(num_steps)
    return PlainLines(num_steps)


def describe_start(trainer: Trainer) -> str:
    """The plan of a run in one block."""
    plan, workers = trainer.plan, trainer.workers
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    lines = {
        "minibatch": describe_cut(plan),
        "examples": f"{plan.num_examples:,} for training, {trainer.num_evaluation_examples:,} for evaluation",
        "steps": f"{trainer.num_steps:,}, {plan.steps_per_epoch:,} an epoch",
        "parameters": f"{parameters:,}, {trainer.settings.precision.value}",
        "averaging": f"{trainer.settings.averaging.name.value} over {workers.backend}",
        "noise scale": trainer.noise_scale.describe(),
        "device": f"{workers.device.type}, {count(torch.get_num_threads(), 'thread')} per worker",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


def describe_end(result: Result, folder: Path) -> str:
    """What a run came to, in a few lines."""
    last = {name: value for name, value in result.metrics.items() if name.startswith("eval/")}
    lines = {
        "result": describe(last or {k: v for k, v in result.metrics.items() if k == "train/loss"}),
        "speed": f"{result.examples_per_second:,.0f} examples/s",
        "folder": str(folder),
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
