"""What of a command is for the launcher, how a worker tells what it died of, and how many threads it gets."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mbgd.batches.plan import Plan
from mbgd.cli import launching
from mbgd.cli.agent import _exit_code
from mbgd.cli.launching import num_workers, split, with_folder
from mbgd.config import Averaging, AveragingName
from mbgd.errors import UsageError
from mbgd.task import threads

ROOT = Path(__file__).parent.parent


def test_the_launchers_part_of_a_command_is_taken_out_and_the_rest_keeps_its_order() -> None:
    wanted, rest = split(["a=1", "workers=3", "--config-dir", "own", "--max-restarts=2", "-m", "b=x y", "~c"])
    assert rest == ["a=1", "--config-dir", "own", "-m", "b=x y", "~c"]
    assert (wanted.workers, wanted.max_restarts, wanted.options) == ("3", 2, ())
    wanted, rest = split(["--nnodes", "1:2", "data.num_workers=2", "--rdzv-conf", "a=1,b=2"])
    assert wanted.options == ("--nnodes=1:2", "--rdzv-conf=a=1,b=2")
    assert rest == ["data.num_workers=2"]
    assert wanted.starts_processes
    assert not split(["workers=1"])[0].starts_processes


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "08", "two", "2 ", "1000000"])
def test_a_number_of_workers_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="whole number >= 1"):
        split([f"workers={value}"])


def test_workers_follow_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [num_workers(one, []) for one in ("auto", "gpus", "1", "2", None)] == [2, 2, 1, 2, 2]
    with pytest.raises(UsageError, match=r"workers=3, but this host has 2 GPUs.*Use workers=2, or backend=gloo"):
        num_workers("3", [])
    assert num_workers("3", ["backend=gloo"]) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert num_workers("auto", []) == 2
    with pytest.raises(UsageError, match="sees no GPU"):
        num_workers("gpus", [])


def test_the_command_to_go_on_can_be_pasted() -> None:
    assert with_folder("mbgd train workers=2 resume=never", "runs/a") == "mbgd train workers=2 run.dir=runs/a"
    assert with_folder("mbgd train run.id=x", "runs/x") == "mbgd train run.id=x"
    [*_, last] = shlex.split(with_folder("mbgd train", "a b's"))
    assert last == r"run.dir='a b\'s'"


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [([75, 75], 75), ([1, -15], 1), ([-15, 2], 2), ([-9, -15], 1), ([75, 1], 1), ([75, -15], 75)],
)
def test_the_exit_code_is_what_the_workers_say(codes: list[int], wanted: int) -> None:
    assert _exit_code(codes) == wanted


TELLS = """
import sys, time
from mbgd.cli.telling import tell
time.sleep(float(sys.argv[2]))
tell(sys.argv[1], is_consequence=sys.argv[3:] == ["lost"])
"""


@pytest.mark.parametrize(
    ("workers", "wanted"),
    [
        ([["same at 0x7f01", "0.3"], ["same at 0x7f02", "0"], ["same at 0x7f03", "0"]], ["error: same at 0x7f01"]),
        ([["worker 1 is lost", "0", "lost"], ["mine", "0"]], ["error on worker 1: mine", "(worker 1 of 2"]),
        ([["worker 2 is lost", "0", "lost"], ["worker 2 is lost", "0.2", "lost"]], ["error: worker 2 is lost"]),
        (
            [["one", "0"], ["other", "0"], ["other", "0"]],
            ["error on worker 0: one", "(worker 0", "error on workers 1, 2"],
        ),
    ],
    ids=["shared", "cause and consequence", "two consequences", "two mistakes"],
)
def test_what_workers_die_of_is_told_once(tmp_path: Path, workers: list[list[str]], wanted: list[str]) -> None:
    processes = []
    for rank, arguments in enumerate(workers):
        (tmp_path / str(rank)).mkdir()
        given = {"RANK": rank, "WORLD_SIZE": len(workers), "LOCAL_WORLD_SIZE": len(workers)}
        environment = os.environ | {key: str(value) for key, value in given.items()}
        environment |= {"TORCHELASTIC_ERROR_FILE": str(tmp_path / str(rank) / "error.json"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", TELLS, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    told = "".join(process.communicate(timeout=60)[1] for process in processes)
    for one in wanted:
        assert told.count(one) == 1, told
    assert told.count("error") == sum(one.startswith("error") for one in wanted), told
    record = json.loads((tmp_path / "0/error.json").read_text())
    assert record["message"]["extraInfo"]["py_callstack"] == workers[0][0]  # what torchrun's table shows


def test_a_small_model_gets_one_thread_unless_a_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    small = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(8 * 64, 10))
    large = torch.nn.Linear(3000, 3000)
    with threads.work_counted(small) as of_small:
        for _ in range(2):  # the first alone counts
            small(torch.zeros(4, 1, 8, 8))
    assert of_small.per_example == 8 * 9 * 64 + 8 * 64 * 10
    with threads.work_counted(large) as of_large:
        large(torch.zeros(2, 3000))
    plan, cpu = Plan(num_examples=100, minibatch_size=64, num_workers=1), torch.device("cpu")
    before = torch.get_num_threads()

    def chosen(work: threads.Work, settings: Averaging | None = None, **variables: str) -> int:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        torch.set_num_threads(3)
        threads.choose(settings or Averaging(), cpu, plan, work)
        assert bool(threads.why) == (torch.get_num_threads() == 1)
        return torch.get_num_threads()

    try:
        assert chosen(of_small) == 1
        assert chosen(of_large) == 3
        assert chosen(of_small, Averaging(num_threads=3)) == 3
        assert chosen(of_small, Averaging(name=AveragingName.reproducible)) == 3  # which has set them before
        monkeypatch.setattr(threads, "_num_own_cores", os.cpu_count)  # as where no launcher binds workers to cores
        several = str(max(2, os.cpu_count() or 1))
        assert chosen(of_large, RANK="1", WORLD_SIZE=several) == 3  # on how many hosts is not known
        assert chosen(of_large, LOCAL_RANK="1", LOCAL_WORLD_SIZE=several) == 1  # a core each
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
        assert chosen(of_small, OMP_NUM_THREADS="3") == 3
        assert chosen(of_small, OMP_NUM_THREADS="3", MBGD_THREADS_SHARED_OUT="1") == 1
    finally:
        torch.set_num_threads(before)
        threads.why.clear()


def test_a_worker_of_another_launcher_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    launching.check_started(split(["workers=2"])[0])
    with pytest.raises(UsageError, match="workers=4 on a worker of 2"):
        launching.check_started(split(["workers=4"])[0])
