"""What a person sees: the plan at the start, and plain lines where standard output is not a terminal."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch

from mbgd.plan import Plan
from mbgd.tracking.base import Ending, Metrics, Tracker
from mbgd.trainer import Result, Trainer

LEAST_SECONDS_BETWEEN_LINES, MOST_SECONDS_BETWEEN_LINES = 2.0, 60.0
SHARE_BETWEEN_LINES = 0.01
"""Lines come as often as every hundredth of the time so far, so that a long run's log stays readable."""

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
        parts.append(f"{'eval ' if is_first_of_evaluation else ''}{short.replace('_', ' ')} {value:.4g}")
    for unit in ("examples", "tokens"):
        speeds = [value for name, value in metrics.items() if name.endswith(f"/{unit}_per_second")]
        parts += [f"{speed:,.0f} {unit}/s" for speed in speeds if not isinstance(speed, str)]
    return " · ".join(parts)


def is_evaluation(metrics: Metrics) -> bool:
    return any(name.startswith("eval/") for name in metrics)


class PlainLines:
    """A line for every evaluation, and for logged steps now and then."""

    def __init__(self, num_steps: int, first_step: int = 0, file: TextIO | None = None) -> None:
        self._num_steps, self._first_step, self._file = num_steps, first_step, file or sys.stdout
        self._started = time.monotonic()
        self._next_line = self._started

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        if metrics and (is_evaluation(metrics) or now >= self._next_line):
            print(f"step {step}/{self._num_steps} · {describe(metrics)}{self._left(step)}", file=self._file, flush=True)
            interval = SHARE_BETWEEN_LINES * (now - self._started)
            self._next_line = now + min(max(interval, LEAST_SECONDS_BETWEEN_LINES), MOST_SECONDS_BETWEEN_LINES)

    def close(self, ending: Ending) -> None:
        pass

    def _left(self, step: int) -> str:
        """The time left, from the second line on, while there is any."""
        elapsed = time.monotonic() - self._started
        steps_done, steps_left = step - self._first_step, self._num_steps - step
        if elapsed < LEAST_SECONDS_BETWEEN_LINES or not steps_done or not steps_left:
            return ""
        return f" · {timedelta(seconds=round(elapsed / steps_done * steps_left))} left"


def tracker(num_steps: int, first_step: int) -> Tracker:
    """A progress bar where standard output is a terminal, plain lines elsewhere."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        from mbgd.tracking.progress_bar import ProgressBar  # rich takes a while to import

        return ProgressBar(num_steps, first_step)
    return PlainLines(num_steps, first_step)


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
        "device": f"{workers.device.type}, {count(torch.get_num_threads(), 'thread')} per worker",
    }


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
