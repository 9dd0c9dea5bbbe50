"""The small files of a run's folder and their schemas. All readers use these functions.

Known fields must have their types, without conversions; missing and unknown fields are allowed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from mbgd.files.reading import Unreadable, read_json, read_yaml

CONFIG, SUMMARY, RUN, MODEL = "config.yaml", "summary.json", "run.json", "model.safetensors"
METRICS = "metrics.jsonl"
REPORT = "report.html"
OBSERVED = "observed"
"""The folder of what observers write, NAME.jsonl for each."""
OBJECTIVE = "objective.safetensors"
"""Parameters and buffers of the objective, if it has any."""


def of_other_weights(name: str) -> str:
    """The file of an observer's weights, such as a moving average, for the model."""
    return f"model_{name}.safetensors"


Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Node = dict[str, Any]


class Batch(msgspec.Struct):
    size: Annotated[int, msgspec.Meta(ge=1, le=2**53)] | None = None
    drop_last: bool | None = None


class Best(msgspec.Struct):
    best: str | None = None
    direction: Literal["minimize", "maximize"] = "minimize"


class Ranked(msgspec.Struct):
    metric: str = "eval/loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None


class Config(msgspec.Struct):
    """The fields of config.yaml that are read."""

    data: Node = {}
    batch: Batch | None = None
    schedule: Node | None = None
    evaluation: Node | None = None
    checkpoint: Best | None = None
    sweep: Ranked | None = None
    tracking: Node | None = None


class Summary(msgspec.Struct):
    metrics: dict[str, float | str | None] = {}
    weights_sha256: Sha256 | None = None
    steps: Count | None = None
    examples_seen: Count | None = None
    examples_per_second: float | None = None
    skipped_steps: Count | None = None
    stopped_by: str = ""
    weights_step: Count | None = None
    num_workers: Count | None = None
    num_micro_batches: Count | None = None
    averaging: str | None = None
    conditions: dict[str, str | int | float | None] = {}
    versions: dict[str, str] = {}
    model_sha256: Sha256 | None = None
    sha256: Sha256 | None = None


class Code(msgspec.Struct):
    commit: str = ""
    dirty: bool = False


class Ending(msgspec.Struct):
    outcome: str
    message: str


class Run(msgspec.Struct):
    """run.json."""

    plan: dict[str, Any] = {}
    numbers: dict[str, Annotated[int, msgspec.Meta(ge=1, le=2**53)]] = {}
    environment: dict[str, Any] = {}
    code: Code | None = None
    script: str = ""
    first_step: Count = 0
    ending: Ending | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """The run's configuration; FileNotFoundError, or Unreadable."""
    return read_yaml(folder / CONFIG, Config)


def read_run(folder: Path) -> dict[str, Any]:
    """run.json; FileNotFoundError, or Unreadable."""
    return read_json(folder / RUN, Run)


def read_summary(folder: Path) -> dict[str, Any]:
    """The run's results; FileNotFoundError, or Unreadable, also if the file has changed since it was written."""
    summary = read_json(folder / SUMMARY, Summary)
    if "sha256" in summary and summary["sha256"] != seal(summary):
        raise Unreadable(folder / SUMMARY, "it has other content than was written")
    return summary


def read_or_tell(reader: Callable[[Path], dict[str, Any]], *, folder: Path, problems: list[str]) -> dict[str, Any]:
    """`reader(folder)`; {} if the file is missing or cannot be read. The latter is added to `problems`."""
    try:
        return reader(folder)
    except FileNotFoundError:
        return {}
    except Unreadable as error:
        problems.append(f"{error.path.name} cannot be read: {error.reason}")
        return {}


def seal(values: Mapping[str, Any]) -> str:
    """The hash of a file's values, which the file itself holds under `sha256`."""
    unsealed = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()
