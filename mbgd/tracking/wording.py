"""Metrics in words."""

from mbgd.text.escaping import plain
from mbgd.tracking.base import Metrics

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
"""Left out of a line to keep it short; metrics.jsonl and the report have them. The speed comes last in a line."""


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
