"""Trackers: one that fails does not stop training; the terminal; TensorBoard; what the folder says of a run."""

import fcntl
import io
import json
import math
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
from mbgd.tracking.progress_bar import SMOOTHING, Smoothed
from mbgd.tracking.wording import Lines, describe

from runs import metrics, run

ROOT = Path(__file__).parent.parent


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
    assert text[0] == "step 100/1000000     · loss 0.5"
    assert text[1] == "step 102/1000000     · loss 0.5 · 11 days, 13:44:58 left"
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
    lines = shown(tmp_path / "run", "epochs=60", "evaluation.every_steps=600", "ema.decay=0.9")
    path = [line for line in lines if str(tmp_path) in line]
    assert path == [f"folder      {tmp_path / 'run'}"]  # once, and as long as it is
    assert max(len(line) for line in lines if line not in path) <= 80
    evaluations = [(line, lines[number + 1]) for number, line in enumerate(lines) if " · eval loss " in line]
    assert [line[:15] for line, _ in evaluations] == ["step 600/1380  ", "step 1200/1380 ", "step 1380/1380 "]
    ends = {(line.index("accuracy"), more.index("ema/loss"), more.index("ema/accuracy")) for line, more in evaluations}
    assert len(ends) == 1  # they stand under each other
    bar = re.compile(r"[━╸╺]+ +(\d+)/1380 ETA \d\d:\d\d loss [\d.e-]+ · [\d,]+ examples/s · [\d.]+ [MG]iB")
    bars = [found for line in lines if (found := bar.fullmatch(line.strip()))]
    assert bars
    steps = [int(found[1]) for found in bars]
    assert steps == sorted(steps)


def test_without_a_terminal_there_are_no_control_characters(tmp_path: Path) -> None:
    file = tmp_path / "log"
    code = f"import runs; from pathlib import Path; runs.run(Path({str(tmp_path / 'run')!r}), 'ema.decay=0.9')"
    with file.open("wb") as output:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        subprocess.run([sys.executable, "-c", code], stdout=output, check=True, env=environment)
    text = file.read_text()
    assert "step 46/46" in text
    assert not [character for character in text if not character.isprintable() and character != "\n"]


def test_a_line_is_cut_into_rows_by_evaluations_where_it_is_too_wide() -> None:
    metrics = {"eval/loss": 0.25, "eval/accuracy": 0.875, "eval/ema/loss": 0.5, "eval/ema/accuracy": 1.0}
    rows = ["result eval loss 0.25 · accuracy 0.875", "       ema/loss 0.5 · ema/accuracy 1"]
    assert describe(metrics, "result ", 60).split("\n") == rows
    assert describe(metrics, "result ") == " · ".join(row.strip() for row in rows)
    lines = Lines(20)
    assert lines.line(5, metrics, 70).split("\n")[0] == "step 5/20  · eval loss 0.25 · accuracy 0.875"
    assert lines.line(10, {"eval/loss": 0.125, "eval/accuracy": 0.5}) == "step 10/20 · eval loss 0.125 · accuracy 0.5"


def test_the_loss_of_the_bar_is_the_mean_that_forgets() -> None:
    values = [3.0, 1.0, 2.0, 5.0]
    smoothed = Smoothed()
    found = [smoothed(value) for value in values]
    for number in range(len(values)):
        weights = [SMOOTHING ** (number - earlier) for earlier in range(number + 1)]
        mean = sum(weight * value for weight, value in zip(weights, values, strict=False)) / sum(weights)
        assert found[number] == pytest.approx(mean)
    assert math.isnan(smoothed(math.nan))
    assert math.isfinite(smoothed(1.0))
