"""Plan, environment and configuration of the runs: what all share, and what differs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mbgd.report.history import History
from mbgd.text.escaping import plain
from mbgd.text.listing import shown

OWN_NAMES = ("run.dir", "run.id", "run.name", "run.root")


def tables(runs: Sequence[History]) -> list[dict[str, Any]]:
    """title; shared: text by key; differing: by key the text of each run, None where it has none."""
    columns = {
        "Plan": [run.record.get("plan", {}) for run in runs],
        "Environment": [_environment(run) for run in runs],
        "Configuration": [_configuration(run, is_one=len(runs) == 1) for run in runs],
    }
    return [{"title": title, **_split([_texts(one) for one in each])} for title, each in columns.items()]


def _split(columns: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    shared: dict[str, str] = {}
    differing: dict[str, list[str | None]] = {}
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key) for column in columns]
        if len(set(values)) == 1 and values[0] is not None:
            shared[key] = values[0]
        else:
            differing[key] = values
    return {"shared": shared, "differing": differing}


def same_weights(runs: Sequence[History]) -> list[str]:
    """A sentence for each group of runs that ended with the same bits."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        if (weights := run.summary.get("weights_sha256")) is not None:
            groups.setdefault(weights, []).append(run.name)
    return [
        f"{shown(names)}: the same weights, bit for bit (weights_sha256 {weights[:12]}…)."
        for weights, names in groups.items()
        if len(names) > 1
    ]


def _configuration(run: History, *, is_one: bool) -> dict[str, Any]:
    """Beside others without the run's own names, which always differ."""
    return run.config if is_one else {key: value for key, value in run.config.items() if key not in OWN_NAMES}


def _environment(run: History) -> dict[str, Any]:
    code = run.record.get("code") or {}
    changes = ", with changes" if code.get("dirty") else ""
    commit = {"commit": f"{code.get('commit', '')[:12]}{changes}"} if code else {}
    return {key.replace("_", " "): value for key, value in run.record.get("environment", {}).items()} | commit


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {plain(key): plain(_text(value)) for key, value in values.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
