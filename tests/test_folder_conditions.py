"""Run folders that may not be written, are full, vanish, or are another run's."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from mbgd import Workers
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints import saving
from mbgd.config import Resume, Run, must_match
from mbgd.errors import UsageError
from mbgd.runs import run_folder
from mbgd.runs.resume import resume
from mbgd.runs.run_folder import open_run_folder
from mbgd.workers.group import start_workers

from processes import environment, started
from small_runs import PLAIN, prepare, train

HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; it needs root."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("cannot mount a small file system here (needs root)")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill_bytes(disk: Path) -> None:
    with suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def fill_inodes(disk: Path) -> None:
    (disk / "full").mkdir()
    with suppress(OSError):
        for number in range(100_000):
            (disk / "full" / str(number)).touch()


FULL = [(fill_bytes, "size=1m"), (fill_inodes, "size=4m,nr_inodes=120")]


@pytest.mark.parametrize(("fill", "options"), FULL)
def test_a_full_folder_is_told_at_the_start_and_at_the_end(
    tmp_path: Path, fill: Callable[[Path], None], options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = train(tmp_path / "elsewhere")
    with mounted(tmp_path / "disk", options) as disk:
        trainer, opened, config = prepare(disk / "run")
        assert resume(trainer, opened, config, PLAIN)
        opened.write_config(yaml.safe_dump(PLAIN))
        kept = saving.create(
            config.checkpoint, opened.path, opened.checkpoints_path, must_match(PLAIN), trainer.setup.workers
        )
        result = trainer.fit(checkpoints=kept)
        fill(disk)
        with pytest.raises(UsageError, match=r"cannot be written: No space left on device.*last checkpoint"):
            opened.write_results(result, trainer)
        assert not (disk / "run/summary.json").exists()
        trainer.state.step += 1
        assert not kept.at_end(9, {}, trainer.snapshot)
        assert "could not be written" in capsys.readouterr().out
        with pytest.raises(UsageError, match="cannot be written: No space left on device"):
            train(disk / "run")
        shutil.rmtree(disk / "full", ignore_errors=True)
        (disk / "full").unlink(missing_ok=True)
        assert train(disk / "run") == wanted
        assert train(disk / "run") is None  # complete


def test_a_report_that_could_not_be_written_is_not_named_at_the_end(tmp_path: Path) -> None:
    for size, is_there in (("144k", False), ("2m", True)):
        with mounted(tmp_path / size, f"size={size}") as disk:
            command = [sys.executable, "-m", "mbgd", "train", "model=linear", "steps=1", f"run.dir={disk}/run"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert (disk / "run/report.html").exists() == is_there
            assert ("\nreport  " in done.stdout) == is_there
            assert ("report.html could not be closed (OSError: [Errno 28]" in done.stdout) != is_there


def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        train(disk / "run", stop_at=5)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for folder in (disk / "run", disk / "new", disk / "new/inner"):
            with pytest.raises(UsageError, match=r"cannot be written: (lock: )?Read-only file system"):
                train(folder)
        assert train(tmp_path / "own", resume=Resume(str(disk / "run"))) == train(tmp_path / "whole")


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_folder_that_is_deleted_while_a_run_writes_there(
    tmp_path: Path, made_anew: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    trainer, opened, config = prepare(folder)
    assert resume(trainer, opened, config, PLAIN)
    opened.write_config(yaml.safe_dump(PLAIN))
    kept = saving.create(
        config.checkpoint, opened.path, opened.checkpoints_path, must_match(PLAIN), trainer.setup.workers
    )
    shutil.rmtree(folder)
    if made_anew:  # by a run in another process, which is complete by now
        code = f"from pathlib import Path; from small_runs import train; train(Path({str(folder)!r}))"
        paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    result = trainer.fit(checkpoints=kept)
    assert "was deleted, or replaced by another run's" in capsys.readouterr().out
    with pytest.raises(UsageError, match="was deleted, or replaced by another run's"):
        opened.write_results(result, trainer)
    with pytest.raises(UsageError, match="was deleted, or replaced by another run's"):
        opened.write_config("")
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before
    assert folder.exists() == made_anew
    if made_anew:
        assert checkpoint.newest(folder / "checkpoints") is not None


def open_(rank: int, num_workers: int, port: int, folder: Path, seconds: float) -> None:
    """What a worker does that waits for a folder longer than an exchange may take."""
    os.environ |= environment(rank, num_workers, port)
    run_folder.SECONDS_FOR_ANOTHER_RUN_TO_END = seconds
    with start_workers("gloo", timeout_seconds=3) as workers:
        try:
            opened = open_run_folder(Run(dir=str(folder / "run")), "", workers, may_hold_a_run=True)
            told = f"opened {opened.path.name}"
        except UsageError as error:
            told = str(error)
        (folder / f"told-{rank}").write_text(told)


@pytest.mark.parametrize("ends_after", [4.0, None])
def test_a_locked_folder_is_waited_for_longer_than_an_exchange_may_take(
    tmp_path: Path, ends_after: float | None
) -> None:
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (tmp_path / "run/lock").write_text("process 12 on \x1b[31mnode7\nand more")
        seconds = 60.0 if ends_after else 4.0
        with started(open_, 2, tmp_path, seconds) as workers:
            if ends_after:
                time.sleep(ends_after)
                other.kill()
            for worker in workers:
                worker.join(60)
                assert worker.exitcode == 0
        other.kill()
    told = {(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)}
    if ends_after:
        assert told == {"opened run"}
    else:
        [refusal] = told
        assert r"is being written to by another run (process 12 on \x1b[31mnode7\nand more)" in refusal


def test_a_lock_that_belongs_to_a_folder_of_before_is_none(tmp_path: Path) -> None:
    """The folder is deleted and made anew between opening its lock and holding it."""
    first: Any = open_run_folder(Run(dir=str(tmp_path / "run")), "", Workers(), may_hold_a_run=True)
    assert first._lock.is_there()
    shutil.rmtree(tmp_path / "run")
    assert not first._lock.is_there()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").touch()
    assert not first._lock.is_there()


COUNT = """
import sys, time
from pathlib import Path
from mbgd.files.file_lock import locked

for _ in range(20):
    with locked(Path(sys.argv[1], "lock")):
        count = int(Path(sys.argv[1], "count").read_text())
        time.sleep(0.002)
        Path(sys.argv[1], "count").write_text(str(count + 1))
"""


def test_processes_wait_for_a_lock_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    counting = [subprocess.Popen(command, cwd=Path(__file__).parent.parent) for _ in range(3)]
    assert [process.wait(60) for process in counting] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"
