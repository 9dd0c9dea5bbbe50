"""The state of a run, from its folder alone: its step, speed, hosts, last checkpoint and last error."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from mbgd.checkpoints import format as checkpoint
from mbgd.files import folder_lock, run_files
from mbgd.files.reading import Unreadable, open_regular
from mbgd.text.escaping import plain
from mbgd.tracking.json_lines import Line, describe_bad, read_history

MOST_LOG_BYTES = 2**18
"""Bytes at the end of each log that are looked at."""
START = re.compile(r"^--- (\S+ \S+) worker (\d+) of (\d+), process \d+ on (\S+)$", re.MULTILINE)
"""The line that a worker's log begins with at each start; see workers/log.py."""
ERROR = re.compile(
    r"^(?:error(?: on workers? [\d, ]+)?: .*|[\w.]*(?:Error|Exception|WorkersLost|Interrupt)\b.*)$", re.MULTILINE
)
CONSEQUENCE = "WorkersLost|DistNetworkError|DistBackendError|not answer any more"


@dataclass(frozen=True)
class Started:
    """The last start of a worker, from its log."""

    when: str
    rank: int
    num_workers: int
    host: str
    error: str
    """The last error since the start before this one; empty if there is none."""


def describe(folder: Path) -> dict[str, str]:
    """Lines by name; UsageError if the folder is not a run's. Nothing in the folder changes."""
    lines, bad = read_history(folder)
    problems = [f"metrics.jsonl: {describe_bad(bad)}"] if bad else []
    read = partial(run_files.read_or_tell, folder=folder, problems=problems)
    record, summary = read(run_files.read_run), read(run_files.read_summary)
    logs = _starts(folder)
    last_step = max((line.step for line in lines), default=0)
    num_steps = _num_steps(record)
    speed = _steps_per_second(lines, record)
    state = _state(folder, record, summary)
    found = {
        "folder": plain(folder),
        "state": state,
        "step": f"{last_step:,}" + (f" of {num_steps:,} ({last_step / num_steps:.0%})" if num_steps else ""),
        "rate": f"{speed:.4g} steps/s" + _examples(lines) if speed else "",
        "left": _time_left(num_steps - last_step, speed) if state.startswith("running") and num_steps and speed else "",
        "workers": _workers(logs, lines),
        "slowest": _slowest(lines),
        "metrics": _last_metrics(lines),
        "checkpoint": _checkpoint(folder),
        "last error": _last_error(record, logs),
        "unreadable": plain("; ".join(problems)),
    }
    return {name: value for name, value in found.items() if value}


def _state(folder: Path, record: dict[str, Any], summary: dict[str, Any]) -> str:
    holder = folder_lock.holder(folder)
    if holder is not None:
        return f"running: {holder}"
    ending = record.get("ending")
    if summary.get("steps") is not None:
        return "finished"
    if ending is None:
        return "ended without a word (killed, or its host was lost); the same command resumes it"
    return "preempted: the same command resumes it" if ending["outcome"] == "preempted" else plain(ending["outcome"])


def _num_steps(record: dict[str, Any]) -> int:
    """Number of steps of the whole run, from its plan; 0 if unknown."""
    begins = str(record.get("plan", {}).get("steps", "")).split(", ")[0]
    return int(begins.replace(",", "")) if re.fullmatch(r"[\d,]+", begins) else 0


def _steps_per_second(lines: list[Line], record: dict[str, Any]) -> float:
    """Of the last logged steps, from their examples per second and the minibatch's size; 0 if unknown."""
    size = re.match(r"\d+", str(record.get("plan", {}).get("minibatch", "")))
    speed = _last(lines, "time/examples_per_second")
    return speed / int(size[0]) if size and isinstance(speed, float | int) and int(size[0]) else 0.0


def _examples(lines: list[Line]) -> str:
    return f", {_last(lines, 'time/examples_per_second'):,.0f} examples/s"


def _last(lines: list[Line], name: str) -> float | str | None:
    return next((line.metrics[name] for line in reversed(lines) if name in line.metrics), None)


def _time_left(num_steps: int, speed: float) -> str:
    seconds = int(num_steps / speed)
    then = (datetime.now() + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M")
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes:02} min, at about {then}" if hours else f"{minutes} min {seconds % 60:02} s"


def _workers(logs: list[Started], lines: list[Line]) -> str:
    number = _last(lines, "time/num_workers") or (logs[0].num_workers if logs else None)
    if number is None:
        return ""
    of_hosts: dict[str, int] = {}
    for one in logs:
        if one.rank < int(number):
            of_hosts[one.host] = of_hosts.get(one.host, 0) + 1
    return f"{int(number)}" + (" on " + ", ".join(f"{plain(h)} ({n})" for h, n in of_hosts.items()) if of_hosts else "")


def _slowest(lines: list[Line]) -> str:
    ratio, rank = _last(lines, "time/slowest_worker"), _last(lines, "time/slowest_worker_rank")
    if (
        not isinstance(ratio, float | int)
        or not isinstance(rank, float | int)
        or not int(_last(lines, "time/num_workers") or 0) > 1
    ):
        return ""
    return (
        f"worker {int(rank)} on {plain(_last(lines, 'time/slowest_worker_host'))}: {ratio:.2f} times the median's time"
    )


def _last_metrics(lines: list[Line]) -> str:
    found = {name: _last(lines, name) for name in ("train/loss", "eval/loss", "eval/accuracy")}
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float | int))


def _checkpoint(folder: Path) -> str:
    found = checkpoint.complete(folder / "checkpoints")
    if not found:
        return "none"
    try:
        seconds = datetime.now().timestamp() - found[0].lstat().st_mtime
    except OSError:  # replaced by a newer one just now
        return f"step {checkpoint.step_of(found[0]):,}"
    return f"step {checkpoint.step_of(found[0]):,}, {_ago(seconds)}"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} seconds ago"


def _starts(folder: Path) -> list[Started]:
    """The last start of each worker, by rank."""
    found = []
    for path in (folder / "logs").glob("worker-*.log"):
        try:
            with open_regular(path) as file:
                file.seek(max(0, path.stat().st_size - MOST_LOG_BYTES))
                text = file.read(MOST_LOG_BYTES).decode(errors="backslashreplace")
        except (OSError, Unreadable):
            continue
        starts = list(START.finditer(text))
        if starts:
            when, rank, size, host = starts[-1].groups()
            errors = ERROR.findall(text, starts[-2].start() if len(starts) > 1 else 0)
            found.append(Started(when, int(rank), int(size), host, errors[-1] if errors else ""))
    return sorted(found, key=lambda one: one.rank)


def _last_error(record: dict[str, Any], logs: list[Started]) -> str:
    """The cause where it is known: that other workers were lost is a consequence."""
    causes = [one for one in logs if one.error and not re.search(CONSEQUENCE, one.error)]
    for one in causes:
        return f"worker {one.rank} on {plain(one.host)}, started {one.when}: {plain(one.error)}"
    ending = record.get("ending") or {}
    if ending.get("outcome") == "failed":
        return plain(ending["message"])
    return next((f"worker {one.rank}, started {one.when}: {plain(one.error)}" for one in logs if one.error), "")
