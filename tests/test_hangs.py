"""A worker that stops answering ends the others in time, with an error that names it."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

import mbgd
from mbgd.data import digits
from mbgd.errors import WorkersLost
from mbgd.workers.group import start_workers
from mbgd.workers.roll_call import RollCall

from processes import environment, eventually, started

TIMEOUT_SECONDS = 5.0


def train_until_lost(rank: int, num_workers: int, port: int, averaging: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, num_workers, port)
    try:
        with start_workers("gloo", TIMEOUT_SECONDS) as workers:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
            settings = mbgd.Settings(
                steps=10**9,
                averaging=mbgd.Averaging(mbgd.AveragingName(averaging)),
                log_every_steps=10**9,
                evaluation=mbgd.Evaluation(every_steps=10**9),
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            trainer = mbgd.Trainer(
                model, mbgd.CrossEntropy(), optimizer, mbgd.Data(train=digits("test")), settings, workers
            )
            (folder / f"ready-{rank}").touch()
            trainer.fit()
    except WorkersLost as error:
        (folder / f"error-{rank}").write_text(str(error))
        os._exit(1)  # as torchrun would end them, without waiting for the rest


@pytest.mark.parametrize(
    ("how", "averaging", "lost"),
    [
        (signal.SIGSTOP, "reproducible", 2),
        (signal.SIGSTOP, "ddp", 0),  # which keeps the store, where torchrun does not
        (signal.SIGKILL, "ddp", 2),
        (signal.SIGSTOP, "shared_memory", 1),
        (signal.SIGKILL, "shared_memory", 2),
    ],
)
def test_the_missing_worker_is_named_in_time(tmp_path: Path, how: signal.Signals, averaging: str, lost: int) -> None:
    num_workers = 3
    with started(train_until_lost, num_workers, averaging, tmp_path) as processes:
        eventually(lambda: len(list(tmp_path.glob("ready-*"))) == num_workers, 60)
        time.sleep(0.3)
        pid = processes[lost].pid
        assert pid is not None
        os.kill(pid, how)
        begin = time.monotonic()
        survivors = [rank for rank in range(num_workers) if rank != lost]
        for rank in survivors:
            processes[rank].join(timeout=TIMEOUT_SECONDS + 10)
            assert processes[rank].exitcode == 1
        # A little more than the timeout is allowed for ending the processes on a loaded machine.
        assert time.monotonic() - begin <= TIMEOUT_SECONDS + 2
        for rank in survivors:
            assert f"worker {lost} does not answer" in (tmp_path / f"error-{rank}").read_text()


def wait_in_a_row(rank: int, num_workers: int, port: int, last_is_dead: bool, folder: Path) -> None:
    """Each worker waits for the next one, so that most see nothing of what the last one does."""
    os.environ |= environment(rank, num_workers, port)
    try:
        with start_workers("gloo", TIMEOUT_SECONDS):
            torch.distributed.barrier()
            if rank < num_workers - 1:
                torch.distributed.recv(torch.zeros(1), src=rank + 1)
            elif last_is_dead:
                os._exit(1)
            time.sleep(TIMEOUT_SECONDS + 5)
    except WorkersLost as error:
        (folder / f"error-{rank}").write_text(str(error))
    os._exit(1)


@pytest.mark.parametrize(
    ("last_is_dead", "wanted"),
    [(True, "worker 2 does not answer any more"), (False, "worker 2 does not come to an exchange, though still runn")],
)
def test_a_worker_that_waits_is_not_taken_for_a_lost_one(tmp_path: Path, last_is_dead: bool, wanted: str) -> None:
    num_workers = 3
    with started(wait_in_a_row, num_workers, last_is_dead, tmp_path) as processes:
        for process in processes[:-1]:
            process.join(timeout=60)
    for rank in range(num_workers - 1):
        assert wanted in (tmp_path / f"error-{rank}").read_text()


def part_ways(rank: int, num_workers: int, port: int, folder: Path) -> None:
    """Worker 0 runs code that the others do not."""
    os.environ |= environment(rank, num_workers, port)
    try:
        with start_workers("gloo", TIMEOUT_SECONDS):
            if rank == 0:
                torch.distributed.all_reduce(torch.ones(1000))
            torch.distributed.barrier()
    except WorkersLost as error:
        (folder / f"error-{rank}").write_text(str(error))
    os._exit(1)


def test_code_that_only_one_worker_runs_is_found(tmp_path: Path) -> None:
    with started(part_ways, 2, tmp_path) as processes:
        for process in processes:
            process.join(timeout=60)
    for rank in (0, 1):
        error = (tmp_path / f"error-{rank}").read_text()
        assert "the workers are not in the same exchange" in error
        assert "(all_reduce of Float [1000]) on worker 0" in error
        assert "(barrier) on worker 1" in error


def test_the_roll_call_leaves_no_thread() -> None:
    """One that asks for a lost worker until the end is in C++ when Python ends, which aborts the process."""
    before = set(threading.enumerate())
    call = RollCall(HashStore(), 0, 2, 10.0, exchanges=lambda *, named: None, ends_unheard=False)
    assert call.missing().lost == [1]
    call.end()
    assert set(threading.enumerate()) == before
