"""The barrier of shared memory: right for any number of workers on any number of cores, and who is missing is named."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mbgd
from mbgd.averaging.host_memory import barrier
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.errors import WorkersLost
from mbgd.workers.group import start_workers

from processes import environment, eventually, run_workers, started

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 3.0
MANY, FEW = set(range(64)), {0}
"""Cores: for meeting in rounds, and for being counted."""


def pretend_cores(cores: set[int]) -> None:
    os.sched_getaffinity = lambda _: cores  # type: ignore[assignment]


def read_what_others_wrote(workers: mbgd.Workers, cores: set[int]) -> bool:
    """Everybody writes a number and reads everybody's, again and again."""
    pretend_cores(cores)
    memory = HostMemory(workers)
    cells = [piece.view(torch.int64).numpy() for piece in memory.allocate(8)]
    for number in range(1, 301):
        cells[workers.rank][0] = number
        memory.barrier()
        if [int(cell[0]) for cell in cells] != [number] * workers.num_workers:
            return False
        memory.barrier()
    return True


@pytest.mark.parametrize("cores", [MANY, FEW], ids=["rounds", "counted"])
@pytest.mark.parametrize("num_workers", [2, 3, 5, 8])
def test_what_was_written_before_is_read_behind(num_workers: int, cores: set[int]) -> None:
    assert run_workers(read_what_others_wrote, num_workers, cores) == [True] * num_workers


def meet_for_ever(rank: int, num_workers: int, port: int, cores: set[int], folder: Path) -> None:
    torch.set_num_threads(1)
    pretend_cores(cores)
    os.environ |= environment(rank, num_workers, port)
    try:
        with start_workers("gloo", TIMEOUT_SECONDS) as workers:
            memory = HostMemory(workers)
            (folder / f"ready-{rank}").touch()
            while True:
                memory.barrier()
    except WorkersLost as error:
        (folder / f"error-{rank}").write_text(str(error))
        os._exit(1)


@pytest.mark.parametrize("cores", [MANY, FEW], ids=["rounds", "counted"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 3])
def test_who_is_lost_is_named_by_all_and_nobody_else_is(
    tmp_path: Path, victim: int, how: signal.Signals, cores: set[int]
) -> None:
    num_workers = 5
    with started(meet_for_ever, num_workers, cores, tmp_path) as processes:
        eventually(lambda: len(list(tmp_path.glob("ready-*"))) == num_workers, 60)
        time.sleep(0.2)
        pid = processes[victim].pid
        assert pid is not None
        os.kill(pid, how)
        for rank in set(range(num_workers)) - {victim}:
            processes[rank].join(TIMEOUT_SECONDS + 30)
            message = (tmp_path / f"error-{rank}").read_text()
            assert message.startswith(f"worker {victim} does not answer any more: process {pid} "), message
            assert message.count("does not answer") == 1, message


SET_THE_CLOCK_FORWARD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

/* As this process sees it, the time of day is 25 s ahead of the kernel's. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += 25;
    return result;
}
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler, on Linux")
def test_the_time_of_day_does_not_matter(tmp_path: Path) -> None:
    library = tmp_path / "clock.so"
    (tmp_path / "clock.c").write_text(SET_THE_CLOCK_FORWARD)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    code = (
        "import ctypes, time; from mbgd.averaging.host_memory.barrier import *\n"
        "from mbgd.averaging.host_memory import barrier; import torch\n"
        "inbox = torch.zeros(bytes_of_inbox(2), dtype=torch.uint8); make_inbox(inbox, num_workers=2, num_cores=2)\n"
        "start = time.monotonic(); came = barrier._came(barrier._semaphore(inbox, 0), 0.2)\n"
        "print(time.time() - wall(), came, time.monotonic() - start)"
    )
    code = "import os\ndef wall(): return float(os.popen('env -u LD_PRELOAD date +%s.%N').read())\n" + code
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    ahead, came, seconds = ran.stdout.split()
    assert 20 < float(ahead) < 26  # the control: this process' time of day is wrong
    assert came == "False"
    assert 0.2 <= float(seconds) < 10


def test_without_a_wait_by_the_monotonic_clock_it_is_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "_clockwait", None)
    inbox = torch.zeros(barrier.bytes_of_inbox(2), dtype=torch.uint8)
    barrier.make_inbox(inbox, num_workers=2, num_cores=2)
    semaphore = barrier._semaphore(inbox, 0)
    start = time.monotonic()
    assert not barrier._came(semaphore, 0.1)
    assert time.monotonic() - start >= 0.1
    barrier._quick.sem_post(semaphore)
    assert barrier._came(semaphore, 0.1)


def test_no_interval_is_measured_by_the_time_of_day() -> None:
    """Where the time of day is meant: when something was logged or failed, and how far hosts' clocks are apart."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("mbgd", "hydra_plugins")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "time.time(" in path.read_text() or "time_ns(" in path.read_text().replace("monotonic_ns(", "")
    ]
    assert found == ["mbgd/cli/telling.py", "mbgd/tracking/tensorboard_sink.py", "mbgd/verify/cluster.py"]
