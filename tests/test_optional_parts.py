"""W&B, TensorBoard, the report and the like are optional: whatever is wrong with them, training goes on."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from mbgd.cli.run import run as run_composed
from mbgd.measuring import profiling
from mbgd.tracking import Ending, NoTracker, Outcome, Trackers
from mbgd.workers.group import Workers

import wandb_files
from processes import environment, eventually, started
from runs import CONF, metrics, run

LOGGED_STEPS = [1, *range(5, 46, 5), 46]
EVALUATED_STEPS = [23, 46]

needs_wandb = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("wandb"), reason="wandb is not installed: pip install 'mbgd[wandb]'"
)


def steps_in(path: Path) -> list[int]:
    """The steps that a .wandb file has rows for."""
    return [row["step"] for row in wandb_files.read(path)["history"]]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no settings and no run of whoever starts the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))


# The folder that W&B's state lies in


def empty(path: Path) -> None:
    path.touch()


def cut_off(path: Path) -> None:
    path.write_text('{"id": "abc')


def a_list(path: Path) -> None:
    path.write_text("[]")


def another_type(path: Path) -> None:
    path.write_text('{"id": 5, "sent_step": "x"}')


def without_the_step(path: Path) -> None:
    path.write_text('{"id": "abc"}')


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def binary(path: Path) -> None:
    path.write_bytes(os.urandom(4096))


def a_folder(path: Path) -> None:
    path.mkdir()


def a_named_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def unreadable(path: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root reads every file")
    path.write_text('{"id": "abc", "sent_step": 1}')
    path.chmod(0)


STATES = [unreadable, empty, cut_off, a_list, another_type, without_the_step, deep, binary, a_folder, a_named_pipe]


@needs_wandb
@pytest.mark.parametrize("make", [*STATES, a_link_to_itself])
def test_a_state_that_cannot_be_read_counts_as_none_and_is_kept(
    tmp_path: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    from mbgd.tracking.wandb_sink import remember_run_id

    state = tmp_path / "wandb/state.json"
    state.parent.mkdir()
    make(state)
    assert remember_run_id(tmp_path, "known") == "known"
    assert json.loads(state.read_text()) == {"id": "known", "sent_step": -1}
    assert os.path.lexists(f"{state}.broken-0")
    said = capsys.readouterr().out
    assert said.count("warning: ") == said.count("state.json cannot be used (") == 1
    assert remember_run_id(tmp_path, None) == "known"
    assert not capsys.readouterr().out
    assert sorted(path.name for path in state.parent.iterdir()) == ["state.json", "state.json.broken-0"]


@needs_wandb
def test_a_run_with_an_empty_state_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    (folder / "wandb").mkdir(parents=True)
    empty(folder / "wandb/state.json")
    run(folder, "tracking=wandb", "tracking.report=false")
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    assert steps_in(path) == sorted({*LOGGED_STEPS, *EVALUATED_STEPS})
    assert capsys.readouterr().out.count("warning: ") == 1


# What cannot be opened


def in_a_file(folder: Path, sink: str) -> None:
    (folder / sink).write_text("not a folder")


def with_a_pipe_for_output(folder: Path, sink: str) -> None:
    (folder / sink).mkdir()
    os.mkfifo(folder / sink / "output.log")


def with_a_folder_for_output(folder: Path, sink: str) -> None:
    (folder / sink / "output.log").mkdir(parents=True)


@needs_wandb
@pytest.mark.parametrize("spoil", [in_a_file, with_a_pipe_for_output, with_a_folder_for_output])
def test_what_cannot_be_opened_is_left_out_with_one_warning_each(
    tmp_path: Path, spoil: Callable[[Path, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for sink in ("wandb", "tensorboard"):
        spoil(folder, sink)
    (folder / "run.json").mkdir()
    run(folder, "tracking=wandb", "tracking.tensorboard=true")
    said = capsys.readouterr().out
    assert said.count("warning: ") == 2
    for name in ("wandb", "tensorboard"):
        assert f"warning: {name} could not be opened (" in said
    assert json.loads((folder / "run.json").read_text())["ending"]["outcome"] == "finished"  # the folder is aside
    assert json.loads((folder / "summary.json").read_text())["steps"] == 46
    assert [line["step"] for line in metrics(folder) if "train/loss" in line] == LOGGED_STEPS


def train_where_nothing_forks(folder: str) -> None:
    most, unlimited = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, unlimited))
    overrides = ["tracking=wandb", "tracking.tensorboard=true", "tracking.report=false"]
    try:
        subprocess.run(["true"], check=False)
    except BlockingIOError:  # checkpoints are written by a thread, which counts too
        run(Path(folder), *overrides, after_step=lambda _: resource.setrlimit(resource.RLIMIT_NPROC, (most, unlimited)))


@needs_wandb
def test_where_no_process_can_be_started_training_goes_on(tmp_path: Path) -> None:
    """RLIMIT_NPROC does not bind root; as root, the real user is another, who may still read what root may."""
    user: list[str] = []
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is not installed, and RLIMIT_NPROC does not bind root")
        user = ["setpriv", "--ruid", "65534", "--bounding-set=-sys_resource,-sys_admin"]
    code = f"from test_optional_parts import *; torch.set_num_threads(1); train_where_nothing_forks({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [*user, sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if not (tmp_path / "summary.json").exists():
        pytest.skip("here processes start in spite of RLIMIT_NPROC")
    assert done.stdout.count("warning: ") == 2
    for name in ("wandb", "tensorboard"):
        assert f"warning: {name} could not be opened (BlockingIOError: " in done.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 46


# What raises


class Raises(NoTracker):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def progress(self, step: int) -> None:
        raise self.error


class RaisesAtTheEnd(NoTracker):
    def close(self, ending: Ending) -> None:
        raise MemoryError


@pytest.mark.parametrize("error", [OSError(11, "EAGAIN"), MemoryError(), SystemExit(3), RecursionError("deep")])
def test_whatever_is_raised_training_goes_on(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    trackers = Trackers()

    def fail() -> NoTracker:
        raise error

    trackers.open("one", fail)
    trackers.open("two", lambda: Raises(error))
    trackers.open("three", RaisesAtTheEnd)
    trackers.progress(1)
    trackers.progress(2)
    trackers.close(Ending(Outcome.finished))
    one, two, three = capsys.readouterr().out.splitlines()
    assert one.startswith(f"warning: one could not be opened ({type(error).__name__}: {error})")
    assert two.startswith(f"warning: two failed ({type(error).__name__}: {error})")
    assert three.startswith("warning: three could not be closed (MemoryError: )")


def test_ctrl_c_is_not_swallowed() -> None:
    trackers = Trackers([Raises(KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        trackers.progress(1)


def test_a_warning_that_cannot_be_printed_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    broken = os.fdopen(writing, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        Trackers([Raises(MemoryError())]).progress(1)
    with suppress(BrokenPipeError):
        broken.close()


def test_a_profiler_that_cannot_start_does_not_end_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.autograd.profiler.emit_itt():  # torch has one profiler of a thread
        profiler = profiling.create("steps:1-2", tmp_path, Workers(), quiet=True)
        assert list(profiler.steps(range(5), 0)) == [0, 1, 2, 3, 4]
    assert "warning: the profiler could not be started (RuntimeError: " in capsys.readouterr().out


# What does not answer


def train_and_stop_the_follower(rank: int, num_workers: int, port: int, folder: Path, timeout_seconds: int) -> None:
    """Stops the process that tracks as soon as it is there, so that it never reads how the run ended."""
    torch.set_num_threads(1)
    os.environ |= environment(rank, num_workers, port)
    overrides = [f"run.dir={folder}", "epochs=2", "log_every_steps=5", "tracking=wandb", "tracking.report=false"]
    limits = [f"backend.timeout_seconds={timeout_seconds}", f"tracking.wandb.finish_seconds={timeout_seconds + 5}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", [*overrides, *limits])
    if rank == 0:
        threading.Thread(target=_stop_children, args=(folder.parent,), daemon=True).start()
    start = time.monotonic()
    run_composed(composed, {})
    (folder / f"seconds-{rank}").write_text(str(time.monotonic() - start))


def _stop_children(folder: Path) -> None:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    tracking = eventually(lambda: [pid for pid in children.read_text().split() if _tracks(pid)], seconds=60)
    for pid in tracking:
        os.kill(int(pid), signal.SIGSTOP)
    (folder / "stopped").write_text(" ".join(tracking))


def _tracks(pid: str) -> bool:
    try:
        return b"mbgd.tracking.follow" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@needs_wandb
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_follower_that_is_stopped_keeps_no_worker_waiting(tmp_path: Path) -> None:
    """Its patience is longer than the workers' with each other: it is waited for when they have parted."""
    folder, timeout_seconds = tmp_path / "run", 8
    with started(train_and_stop_the_follower, 2, folder, timeout_seconds) as processes:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 46
    assert (folder / "model.safetensors").exists()
    seconds = [float((folder / f"seconds-{rank}").read_text()) for rank in range(2)]
    assert seconds[0] >= timeout_seconds + 5 > timeout_seconds  # the main worker did wait so long
    [stopped] = (tmp_path / "stopped").read_text().split()
    assert not Path(f"/proc/{stopped}").exists()
    [path] = folder.glob("wandb/offline-run-*/*.wandb")  # by another process of its kind
    assert steps_in(path) == sorted({*LOGGED_STEPS, *EVALUATED_STEPS})
