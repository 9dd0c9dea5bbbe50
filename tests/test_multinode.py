"""launch/multinode.sh on hosts with addresses of their own, of which some are cut off, are lost, come back or join."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from mbgd.errors import WorkersLost
from mbgd.workers.store import of_this_round

from hosts import ROOT, SLOW_LOADING, Cluster, ip, network, weights_sha256
from own_processes import MARK, listening, marked

OVERRIDES = ["averaging=reproducible", "batch.size=97", "model.dropout=0.2"]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    with network(3) as names:
        yield names


def undisturbed(folder: Path, *overrides: str) -> str:
    """The hash of the run on one worker that nothing disturbs."""
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *OVERRIDES, *overrides, f"run.dir={folder}"],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return weights_sha256(folder)


def cluster(folder: Path, hosts: list[str], seconds: float, *settings: str, **environment: str) -> Cluster:
    """seconds: how long loading the examples of a micro-batch takes, until the file `fast` is there."""
    (folder / "slow.py").write_text(SLOW_LOADING)
    data = ["data.train._target_=slow.Slow", "~data.train.split", f"+data.train.seconds={seconds}"]
    settings = (*OVERRIDES, *data, f"+data.train.fast={folder / 'fast'}", "backend.timeout_seconds=6", *settings)
    return Cluster(folder, hosts, list(settings), {MARK: str(folder), **environment})


def test_when_one_host_is_cut_off_the_other_goes_on_to_the_same_bits(tmp_path: Path, hosts: list[str]) -> None:
    length = ["steps=60", "log_every_steps=1"]
    expected = undisturbed(tmp_path / "whole", *length)
    key = "a secret of both hosts"
    (tmp_path / "key").write_text(key)
    (tmp_path / "key").chmod(0o600)
    keyed = {"HOSTS": "1:2", "KEY_FILE": str(tmp_path / "key")}
    run = cluster(tmp_path, hosts[:2], 0.02, *length, "checkpoint.every_steps=5", **keyed)
    try:
        for host in run.hosts:
            run.start(host)
        run.wait_for(lambda: any(line["step"] == 20 for line in run.metrics()), "step 20")
        ours = marked(tmp_path)
        assert listening(ours) == {"10.77.0.1", "10.77.0.2"}  # the store and gloo: on this network alone
        assert not [pid for pid in ours if key in Path(f"/proc/{pid}/cmdline").read_text()]
        ip("-n", hosts[1], "link", "set", "main0", "down")
        run.wait_for((run.run / "summary.json").exists, "the end")
        assert run.processes[hosts[0]].wait(timeout=60) == 0
    finally:
        run.end()
    log = run.log(hosts[0])
    assert "for 2 workers" in log
    assert "reproducible over gloo; not through shared memory: workers 0 and 1 are on different hosts" in log
    assert re.search("worker [01] does not answer any more", log)  # whichever rank the other host was given
    assert "for 1 worker\n" in log.split("resume      step")[1]
    assert weights_sha256(run.run) == expected


def test_hosts_of_two_workers_add_up_twice_and_one_goes_on_without_the_other(tmp_path: Path, hosts: list[str]) -> None:
    length = ["steps=40", "log_every_steps=1"]
    expected = undisturbed(tmp_path / "whole", *length)
    run = cluster(tmp_path, hosts[:2], 0.02, *length, "checkpoint.every_steps=5", HOSTS="1:2", WORKERS="2")
    try:
        for host in run.hosts:
            run.start(host)
        run.wait_for(lambda: any(line["step"] == 15 for line in run.metrics()), "step 15")
        ip("-n", hosts[1], "link", "set", "main0", "down")
        run.wait_for((run.run / "summary.json").exists, "the end")
        assert run.processes[hosts[0]].wait(timeout=60) == 0
    finally:
        run.end()
    log = run.log(hosts[0])
    assert "reproducible over shared memory on each of 2 hosts, gloo between them" in log
    lost = re.search(r"workers (\d), (\d) do not answer any more", log)
    assert lost
    assert set(map(int, lost.groups())) in ({0, 1}, {2, 3})  # whichever ranks the other host was given
    assert "reproducible over shared memory\n" in log.split("resume      step")[1]
    assert weights_sha256(run.run) == expected


LENGTH = ["steps=300", "log_every_steps=5"]


def trains_with(run: Cluster, num_workers: int) -> None:
    """Wait until a later step has been made by as many workers."""
    begun = (run.metrics() or [{"step": 0}])[-1]["step"]

    def does() -> bool:
        of_steps = [line for line in run.metrics() if "time/num_workers" in line]
        return bool(of_steps) and of_steps[-1]["step"] != begun and of_steps[-1]["time/num_workers"] == num_workers

    run.wait_for(does, f"{num_workers} workers")


def finish(run: Cluster) -> str:
    (run.folder / "fast").touch()
    run.wait_for((run.run / "summary.json").exists, "the end")
    for host, process in run.processes.items():
        assert process.wait(timeout=60) == 0, run.log(host)[-3000:]
    return weights_sha256(run.run)


def test_a_host_that_was_lost_comes_back_and_the_bits_are_the_same(tmp_path: Path, hosts: list[str]) -> None:
    expected = undisturbed(tmp_path / "whole", *LENGTH)
    run = cluster(tmp_path, hosts[:2], 0.1, *LENGTH, "checkpoint.every_steps=10", HOSTS="1:2")
    _, other = run.hosts
    try:
        for host in run.hosts:
            run.start(host)
        trains_with(run, 2)
        run.kill(other)
        trains_with(run, 1)
        run.start(other)
        trains_with(run, 2)
        assert listening(marked(tmp_path)) == {"10.77.0.1", "10.77.0.2"}  # the new round's store, too
        assert finish(run) == expected
    finally:
        run.end()


@pytest.mark.skipif("MBGD_CHAOS_RUNS" not in os.environ, reason="long: make chaos")
def test_hosts_leave_return_and_join_and_even_the_main_host_does(tmp_path: Path, hosts: list[str]) -> None:
    expected = undisturbed(tmp_path / "whole", *LENGTH)
    run = cluster(tmp_path, hosts, 0.1, *LENGTH, "checkpoint.every_steps=10", HOSTS="1:3")
    main, second, third = run.hosts
    try:
        run.start(main)
        run.start(second)
        trains_with(run, 2)
        run.start(third)
        trains_with(run, 3)
        run.kill(second)
        trains_with(run, 2)
        run.start(second)
        trains_with(run, 3)
        run.kill(main)
        run.wait_for(lambda: all("MAIN_HOST 10.77.0.1" in run.log(host) for host in (second, third)), "notice")
        run.start(main)
        trains_with(run, 3)
        assert finish(run) == expected
    finally:
        run.end()


def test_workers_of_one_round_agree_on_a_store_without_counting_rounds() -> None:
    store = HashStore()
    parts = []
    for num_workers in (3, 2, 4, 2):  # names of the rounds before stay in the store
        with ThreadPoolExecutor(num_workers) as pool:
            ranks = range(num_workers)
            of_round = list(pool.map(lambda rank, size=num_workers: of_this_round(store, rank, size, 30), ranks))
        of_round[0].set("address", str(len(parts)))
        assert {part.get("address") for part in of_round} == {str(len(parts)).encode()}
        parts.append(of_round[-1])
    assert [part.get("address") for part in parts] == [b"0", b"1", b"2", b"3"]


def test_workers_that_do_not_come_are_named() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(of_this_round, store, rank, 4, 1) for rank in (0, 2)]
    with pytest.raises(WorkersLost, match="workers 1, 3 did not come within backend"):
        waiting[0].result()
    with pytest.raises(WorkersLost, match="worker 0 did not come"):
        of_this_round(HashStore(), 1, 2, 0.2)
