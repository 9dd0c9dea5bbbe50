"""Weights & Biases, in a process of its own: see follower.py and docs/tracking.md."""

import json
import os
import secrets
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from mbgd.files.atomic import write_atomically
from mbgd.files.observed import HistogramLine, by_name
from mbgd.tracking.base import Ending, Metrics, Outcome
from mbgd.tracking.follow import say

if TYPE_CHECKING:
    import wandb

STEP = "step"
FOLDER = "wandb"
STATE = "state.json"


def remember_run_id(folder: Path, known: str | None) -> str:
    """The id of the W&B run that gets this folder's metrics; it is kept in the folder.

    known: the id in the checkpoint that this run resumes from. WANDB_RUN_ID, which W&B's own sweeps set, comes first.
    """
    state = _usable_state(folder / FOLDER / STATE)
    run_id = str(os.environ.get("WANDB_RUN_ID") or state.get("id") or known or secrets.token_hex(4))
    if run_id != state.get("id"):
        (folder / FOLDER).mkdir(exist_ok=True)
        _write_state(folder, run_id, sent_step=-1)
    return run_id


class WandbSink:
    """One W&B run. It raises if it cannot go on; the next process then goes on offline."""

    def __init__(self, run: "wandb.Run", folder: Path, sent_step: int, config: Mapping[str, Any]) -> None:
        """sent_step: the last step that is sent already; config: the whole configuration."""
        self._run, self._folder, self._config = run, folder, config
        self._sent_step = self._saved_step = sent_step
        self._newest_step = sent_step

    def log(self, step: int, metrics: Metrics) -> None:
        if step <= self._sent_step:
            return
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        self._send(step, numbers)

    def histograms(self, line: HistogramLine) -> None:
        if line.step <= self._sent_step:
            return
        import numpy as np
        import wandb

        named = {}
        for name, histogram in by_name(line):
            counts, edges = map(np.array, histogram.counts_and_edges())
            named[name] = wandb.Histogram(np_histogram=(counts, edges))
        self._send(line.step, named)

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({STEP: step, **values}, step=step)
        if step > self._newest_step:
            self._sent_step, self._newest_step = self._newest_step, step  # a step may have several lines

    def flush(self) -> None:
        if self._sent_step > self._saved_step:
            _write_state(self._folder, self._run.id, self._sent_step)
            self._saved_step = self._sent_step

    def close(self, ending: Ending) -> None:
        summary = _read_json(self._folder / "summary.json")
        self._run.summary.update(_without(summary, "metrics"))
        if self._config["tracking"]["wandb"]["log_checkpoints"]:
            kept = self._config["checkpoint"]
            self._log_artifacts(kept["best"], highest=kept["direction"] == "maximize")
        if ending.outcome is Outcome.preempted:
            self._run.alert("preempted", ending.message, level="WARN")
            self._run.mark_preempting()
        elif ending.outcome is Outcome.failed:
            self._run.alert("training failed", ending.message, level="ERROR")
        try:
            self._run.finish(exit_code=0 if ending.outcome is Outcome.finished else 1)
        except TimeoutError:
            say(f"not everything is uploaded; later: wandb sync {self._run.settings.sync_dir}")
        _write_state(self._folder, self._run.id, self._newest_step)

    def _log_artifacts(self, best: str | None, *, highest: bool) -> None:
        import wandb

        from mbgd.checkpoints import format as checkpoint

        folder = self._folder / "checkpoints"
        aliases: dict[Path, list[str]] = {path: ["last"] for path in checkpoint.complete(folder)[:1]}
        if best is not None and (found := checkpoint.best(folder, best, highest=highest)) is not None:
            aliases.setdefault(found[0], []).append("best")
        for path, names in aliases.items():
            artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="checkpoint")
            artifact.add_dir(str(path))
            self._run.log_artifact(artifact, aliases=names)


def open_sink(folder: Path, start: int) -> WandbSink:
    """Begin or continue the W&B run of a run's folder; offline if an earlier process failed (start > 1)."""
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}  # no output, and no error reports to W&B
    os.environ.pop("WANDB_SERVICE", None)  # of a program that uses W&B and started this run; it may end, or know no key
    import wandb

    config = yaml.safe_load((folder / "config.yaml").read_text())
    settings = config["tracking"]["wandb"]
    state, began = _read_json(folder / FOLDER / STATE), _read_json(folder / "run.json")
    sys.argv = [began["script"]]  # W&B records sys.argv as the command; the configuration holds the arguments
    mode: Any = "offline" if start > 1 else _mode(settings["mode"])
    run = wandb.init(
        mode=mode,
        id=state["id"],
        resume="allow",
        dir=str(folder),
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"],
        name=settings["name"] or folder.resolve().name,
        tags=settings["tags"],
        config=config | began,
        allow_val_change=True,
        settings=wandb.Settings(
            console="off",
            label_disable=True,
            init_timeout=settings["init_timeout_seconds"],
            finish_timeout=settings["finish_seconds"] / 2,
            finish_timeout_raises=True,
            program=began["script"],
            git_commit=began["code"].get("commit"),
            x_stats_pid=os.getppid(),
        ),
    )
    run.define_metric(STEP, hidden=True)
    run.define_metric("*", step_metric=STEP)
    if mode == "online":
        say(f"{run.url}")
        return WandbSink(run, folder, run.starting_step - 1, config)
    say(f"offline; to upload it: wandb sync {run.settings.sync_dir}")
    return WandbSink(run, folder, state["sent_step"], config)


def _mode(wanted: str) -> Any:
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.Error as error:  # its text could contain the key
        say(f"the key cannot be used ({type(error).__name__})")
        return "offline"


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return values


def _usable_state(path: Path) -> dict[str, Any]:
    """What `_write_state` wrote; {} if there is no such file. An invalid file is renamed, with a warning."""
    try:
        with _open_file(path) as file:
            state: dict[str, Any] = json.load(file)
        if not isinstance(state["id"], str) or not state["id"] or type(state["sent_step"]) is not int:
            raise ValueError("it does not hold an id and the last step that was sent")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        from mbgd.checkpoints import format as checkpoint  # imports torch, which W&B's process does not need

        aside = checkpoint.set_aside(path)
        print(
            f"warning: {path} cannot be used ({type(error).__name__}: {error}) and is now {aside.name}. The W&B run's "
            "id is taken from the checkpoint if there is one, and the run's whole history is sent again.",
            flush=True,
        )
        return {}
    return state


def _open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; another kind, such as a named pipe, could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a file")
    return os.fdopen(descriptor, "rb")


def _write_state(folder: Path, run_id: str, sent_step: int) -> None:
    """sent_step: every line up to this step is sent to W&B, or is in one of its offline files."""
    write_atomically(folder / FOLDER / STATE, json.dumps({"id": run_id, "sent_step": sent_step}).encode())
