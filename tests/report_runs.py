"""Runs' folders for the tests of the report, written without training."""

import json
import math
from pathlib import Path
from typing import Any

import yaml


def make_run(
    folder: Path, *, num_steps: int = 100, config: dict[str, Any] | None = None, rate: float = 2.0, **record: Any
) -> Path:
    """A run's folder with every kind of metric; record: fields of run.json."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        lines.append(line_of(step, rate))
        if step % 10 == 0:
            accuracy = 0.1 if step == 10 else 0.887 + 0.025 * step / num_steps
            lines.append({"step": step, "eval/loss": 1.25 * rate / step, "eval/accuracy": accuracy, "eval/auroc": 0.9})
    write_lines(folder, lines)
    (folder / "config.yaml").write_text(yaml.safe_dump(config or {"optimizer": {"lr": 0.1}, "seed": 0}))
    whole: dict[str, Any] = {
        "plan": {"minibatch": "64 = 2 workers × 1 micro-batch × 32"},
        "numbers": {"steps": num_steps, "steps_per_epoch": 10, "examples_per_epoch": 640, "minibatch_size": 64},
        "environment": {"host": "here", "workers": 2, "started": "2026-01-02 03:04:05 +0000"},
        "code": {"commit": "c0ffee" * 6, "dirty": True},
        "ending": {"outcome": "finished", "message": ""},
    }
    (folder / "run.json").write_text(json.dumps(whole | record))
    (folder / "summary.json").write_text(json.dumps({"examples_per_second": 1234.0, "steps": num_steps}))
    return folder


def line_of(step: int, rate: float = 2.0) -> dict[str, Any]:
    return {
        "step": step,
        "train/loss": rate / step,
        "train/accuracy": 0.9 + 0.05 * math.sin(step),
        "train/learning_rate": 0.1 / step,
        "train/gradient_norm": 1.0 + 0.1 * (step % 7),
        "train/noise_scale": 10.0 * step,
        "train/epoch": step / 10,
        "train/examples_sha256": "abc",
        "time/examples_per_second": 64.0,
        "time/data_wait_seconds": 0.001,
        "time/forward_backward_seconds": 0.006,
        "time/averaging_seconds": 0.002,
        "time/optimizer_seconds": 0.001,
        "time/step_seconds": 0.01,
        "time/peak_memory_bytes": 3 * 2**30,
        "time/cpu_load": 0.5,
        "time/host_memory_bytes": 2**33 + step * 2**20,
        "time/num_workers": 2,
    }


def write_lines(folder: Path, lines: list[dict[str, Any]], mode: str = "w") -> None:
    with (folder / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def data_of(page: str) -> Any:
    """The data in a page's text."""
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])
