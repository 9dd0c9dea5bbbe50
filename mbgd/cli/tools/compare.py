"""Checks whether two runs gave the same bits; if not, says where they part and possible reasons."""

import argparse
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mbgd.errors import UsageError
from mbgd.files.reading import MOST_YAML_BYTES, Unreadable, check_regular, convert, read
from mbgd.files.run_files import CONFIG, METRICS, MODEL, SUMMARY, read_summary
from mbgd.text.escaping import plain
from mbgd.tracking.json_lines import describe_bad, read_history

DESCRIPTION = "say whether two runs gave the same bits, or where they part"
NOT_COMPARED = "time/"
SHOWN = 10


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_a", type=Path, help="a run's folder")
    parser.add_argument("run_b", type=Path, help="another run's folder")


def main(parsed: argparse.Namespace) -> int:
    """Print the comparison; 0 if the bits are the same, 1 if not."""
    a, b = (_read(folder) for folder in (parsed.run_a, parsed.run_b))
    parted = first_difference(a["metrics"], b["metrics"])
    names = differing_parameters(a["model"], b["model"])
    if parted is None and not names:
        print(f"same bits: {len(a['metrics'])} lines of metrics, weights_sha256 {a['summary']['weights_sha256']}")
        return 0
    print("different bits")
    if parted is not None:
        print(f"  metrics part at {plain(parted)}")
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        print(f"  parameters and buffers that differ: {plain(', '.join(names[:SHOWN]))}{more}")
    reasons = differing_conditions(a, b)
    print("  possible reasons: " + (plain("; ".join(reasons)) if reasons else "none recorded"))
    return 1


class _Compared(msgspec.Struct):
    """The keys that a summary must have."""

    weights_sha256: str
    conditions: dict[str, Any]
    versions: dict[str, Any]
    num_workers: int


def _read(folder: Path) -> dict[str, Any]:
    """UsageError if something is missing or cannot be read: only whole runs can be said to be the same."""
    try:
        lines, bad = read_history(folder)
        if bad:
            raise UsageError(f"{plain(folder / METRICS)}: {describe_bad(bad)}. Only whole runs are compared.")
        summary = read_summary(folder)
        convert(summary, _Compared)
        check_regular(folder / MODEL)
        return {
            "summary": summary,
            "metrics": [{"step": line.step, **line.metrics} for line in lines],
            "config": read(folder / CONFIG, MOST_YAML_BYTES).decode(errors="backslashreplace").splitlines(),
            "model": load_file(folder / MODEL),
        }
    except OSError as error:
        raise UsageError(
            f"{plain(folder)} is not the folder of a complete run: {error.filename} is missing. A run's folder is what "
            "train.py names at the start."
        ) from error
    except SafetensorError as error:
        raise Unreadable(folder / MODEL, plain(error)) from error
    except UsageError:
        raise
    except ValueError as error:
        raise Unreadable(folder / SUMMARY, str(error)) from error


def first_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> str | None:
    """The first step and the metrics at which two histories part; None if they are the same."""
    for line_a, line_b in zip(a, b, strict=False):
        names = sorted(name for name in line_a.keys() | line_b.keys() if not name.startswith(NOT_COMPARED))
        unequal = [name for name in names if repr(line_a.get(name)) != repr(line_b.get(name))]
        if unequal:
            values = ", ".join(f"{name} {line_a.get(name)} and {line_b.get(name)}" for name in unequal)
            return f"step {line_a['step']}: {values}"
    if len(a) != len(b):
        return f"line {min(len(a), len(b)) + 1}: one history has {len(a)} lines, the other {len(b)}"
    return None


def differing_parameters(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that differ in bits, shape or dtype, or that only one model has."""

    def same(name: str) -> bool:
        if name not in a or name not in b or a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            return False
        left, right = (model[name].contiguous().view(-1).view(torch.uint8) for model in (a, b))
        return torch.equal(left, right)

    return [name for name in sorted(a.keys() | b.keys()) if not same(name)]


def differing_conditions(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Recorded differences of the two runs: versions and conditions, then lines of the configuration."""
    of_a, of_b = ({**run["summary"]["versions"], **run["summary"]["conditions"]} for run in (a, b))
    keys = dict.fromkeys([*of_a, *of_b])
    found = [f"{key}: {of_a.get(key)} and {of_b.get(key)}" for key in keys if of_a.get(key) != of_b.get(key)]
    reproducible = all("  name: reproducible" in run["config"] for run in (a, b))
    workers_a, workers_b = a["summary"]["num_workers"], b["summary"]["num_workers"]
    if not reproducible and workers_a != workers_b:
        found.append(f"workers: {workers_a} and {workers_b}, without averaging=reproducible in both")
    over_a, over_b = (run["summary"].get("averaging") for run in (a, b))
    if not reproducible and workers_a == workers_b and over_a != over_b:
        found.append(f"averaging: {over_a} and {over_b}")
    lines = [line.strip() for line in a["config"] if line not in b["config"]]
    lines += [line.strip() for line in b["config"] if line not in a["config"]]
    own = [line for line in lines if not line.startswith(("dir:", "id:", "root:"))]
    return found + [f"configuration {line}" for line in own]
