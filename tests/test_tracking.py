"""Trackers: one that fails does not stop training; the terminal; TensorBoard; what the folder says of a run."""

import fcntl
import io
import json
import multiprocessing
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

import mbgd
from mbgd.config import Precision
from mbgd.errors import Preempted
from mbgd.runs.wording import describe_precision
from mbgd.tracking import Ending, Outcome, Trackers, told_of_its_end
from mbgd.tracking.code_version import code_version
from mbgd.tracking.console import PlainLines
from mbgd.tracking.json_lines import JsonLines
from mbgd.tracking.wording import describe

from runs import metrics, run


class Keeps:
    """Keeps the steps that it is told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ending: Ending | None = None

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: object) -> None:
        self.steps.append(step)

    def close(self, ending: Ending) -> None:
        self.ending = ending


class FailsAtStep2(Keeps):
    def log(self, step: int, metrics: object) -> None:
        super().log(step, metrics)
        if step == 2:
            raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    fails, keeps = FailsAtStep2(), Keeps()
    trackers = Trackers([fails, keeps])
    for step in (1, 2, 3):
        trackers.log(step, {"train/loss": 1.0})
    trackers.close(Ending(Outcome.finished))
    assert (fails.steps, keeps.steps) == ([1, 2], [1, 2, 3])
    assert (fails.ending, keeps.ending) == (None, Ending(Outcome.finished))
    assert capsys.readouterr().out.count("warning: FailsAtStep2 failed (OSError: [Errno 28]") == 1


@pytest.mark.parametrize(
    ("raised", "ending"),
    [
        (None, Ending(Outcome.finished)),
        (Preempted(7), Ending(Outcome.preempted, "stopped by a signal after step 7")),
        (mbgd.UsageError("the loss is nan"), Ending(Outcome.failed, "UsageError: the loss is nan")),
        (KeyboardInterrupt(), Ending(Outcome.failed, "KeyboardInterrupt: ")),
    ],
)
def test_trackers_are_told_how_it_ended(raised: BaseException | None, ending: Ending) -> None:
    keeps = Keeps()
    with pytest.raises(type(raised)) if raised else nullcontext(), told_of_its_end(keeps):
        if raised is not None:
            raise raised
    assert keeps.ending == ending


def test_the_folder_says_what_the_run_was_and_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        run(tmp_path / "run", stop_at=7)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["ending"] == {"outcome": "preempted", "message": "stopped by a signal after step 7"}
    assert "preempted: stopped by a signal after step 7" in (tmp_path / "run/report.html").read_text()
    run(tmp_path / "run", "tracking.report=false")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["ending"] == {"outcome": "finished", "message": ""}
    assert record["first_step"] == 7
    assert record["plan"]["minibatch"] == "64 = 1 worker × 1 micro-batch × 64"
    assert re.fullmatch(r"[\d,]+ in fp32", record["plan"]["parameters"])
    assert record["environment"]["torch"].startswith("2.")
    assert "preempted" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize(
    ("precision", "words"),
    [("fp64", "fp64"), ("fp32", "fp32"), ("bf16", "fp32, forward in bf16"), ("fp16", "fp32, forward in fp16")],
)
def test_the_plan_tells_the_parameters_precision_from_the_forwards(precision: str, words: str) -> None:
    assert describe_precision(Precision(precision)) == words


def test_the_version_of_the_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    script = tmp_path / "train.py"
    assert code_version(str(script)) == {}
    git("init", "-q")
    script.write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    (tmp_path / "untracked").touch()
    assert code_version(str(script)) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    script.write_text("2")
    assert code_version(str(script)) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_tensorboard_has_one_history_without_repeats_or_gaps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'mbgd[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        run(folder, "tracking=tensorboard", stop_at=17)
    run(folder, "tracking=tensorboard")
    assert len(list(folder.glob("tensorboard/events.*"))) == 2
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    lines = metrics(folder)
    assert set(events.Tags()["scalars"]) == {name for line in lines for name in line} - {"step"}
    for name in events.Tags()["scalars"]:
        wanted = [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
        assert [(event.step, event.value) for event in events.Scalars(name)] == wanted


def test_tensorboard_reads_a_runs_files_in_their_order(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'mbgd[tensorboard]'")
    from mbgd.tracking.tensorboard_sink import TensorboardSink

    for _ in range(2):
        TensorboardSink(tmp_path).close(Ending(Outcome.finished))
    seconds = {path.name.split(".")[3] for path in tmp_path.glob("tensorboard/events.*")}
    assert len(seconds) == 2


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log(1, {"train/loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 0.5}\n'


# The terminal

TRAIN = {
    "train/loss": 0.123456,
    "train/accuracy": 0.5,
    "train/learning_rate": 0.01,
    "train/gradient_norm": 1.5,
    "train/noise_scale": 1234.5,
    "train/epoch": 1.5,
    "train/examples_sha256": "abc",
    "time/data_wait_seconds": 0.1,
    "time/examples_per_second": 123456.7,
    "time/tokens_per_second": 9876543.2,
}


def test_a_line_has_what_matters_first() -> None:
    assert describe(TRAIN) == (
        "loss 0.1235 · accuracy 0.5 · learning rate 0.01 · gradient norm 1.5 · 123,457 examples/s · 9,876,543 tokens/s"
    )
    assert describe({"eval/loss": 0.25, "eval/accuracy": 0.875}) == "eval loss 0.25 · accuracy 0.875"


def test_plain_lines_come_at_a_sensible_rate_and_evaluations_always(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("mbgd.tracking.console.time.monotonic", lambda: now)
    file = io.StringIO()
    lines = PlainLines(1_000_000, 100, file)
    hours = {}
    for step in range(100, 100 + 4 * 3600):  # a step a second
        if step % 1800 == 0:
            lines.log(step, {"eval/loss": 0.5})
        lines.log(step, {"train/loss": 0.5})
        now += 1.0
        hours[(step - 100) // 3600] = file.getvalue().count("\n")
    text = file.getvalue().splitlines()
    assert text[0] == "step 100/1000000 · loss 0.5"
    assert text[1] == "step 102/1000000 · loss 0.5 · 11 days, 13:44:58 left"
    assert sum("eval loss" in line for line in text) == 8
    assert hours[0] < 400  # every two seconds at first
    assert hours[3] - hours[2] < 100  # then every minute


def in_a_terminal(folder: Path, terminal: str, *overrides: str) -> None:
    """A run whose standard output is this terminal."""
    os.dup2(os.open(terminal, os.O_RDWR | os.O_NOCTTY), 1)
    sys.stdout = os.fdopen(1, "w")
    os.environ["TERM"] = "xterm-256color"
    run(folder, *overrides)
    sys.stdout.flush()


def shown(folder: Path, *overrides: str) -> list[str]:
    """The lines that a terminal of 80 columns is sent, those that are overwritten too, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    arguments = (folder, os.ttyname(theirs), *overrides)
    process = multiprocessing.get_context("forkserver").Process(target=in_a_terminal, args=arguments)
    process.start()
    os.set_blocking(ours, False)
    content = b""
    while process.is_alive() or select.select([ours], [], [], 0.2)[0]:
        with suppress(BlockingIOError):
            content += os.read(ours, 65536)
        time.sleep(0.01)
    assert process.exitcode == 0
    os.close(ours)
    os.close(theirs)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", content.decode()))


def test_a_terminal_of_80_columns(tmp_path: Path) -> None:
    lines = shown(tmp_path / "run", "epochs=60", "evaluation.every_steps=1000")
    paths = [line for line in lines if line.startswith("folder ") or str(tmp_path) in line]  # as long as they are
    assert max(len(line) for line in lines if line not in paths) <= 80
    assert any(line.startswith("step 1000/1380 · eval loss ") and "accuracy" in line for line in lines)
    bars = [
        line for line in lines if re.search(r"━ +\d+/1380 \d\d:\d\d loss [\d.e-]+ · [\d,]+ examples/s$", line.strip())
    ]
    assert bars
    steps = [int(re.search(r"(\d+)/1380", line)[1]) for line in bars]
    assert steps == sorted(steps)
