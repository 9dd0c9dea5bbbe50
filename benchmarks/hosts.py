"""Steps on two hosts of two CPU workers each: `python benchmarks/hosts.py`, as root.

The hosts are network namespaces of this machine, joined by one link, whose rate and delay `tc` sets: 1 Gbit/s, and
1 ms in each direction where the kernel has netem. The hand-written loop averages by DistributedDataParallel over gloo,
between all four workers; so does the trainer with averaging=ddp. With averaging=auto it adds up within each host
first. Interleaved rounds in the same processes. Ratio > 1: faster than the hand-written loop. Bytes are those that the
first host sends, from the counters of its interface.

All four workers share this machine's cores, so computing takes longer than on two machines.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import mbgd
import mbgd.averaging as averagings
from mbgd.averaging.host_memory.memory import CannotShareError, HostMemory
from mbgd.config import AveragingName
from mbgd.data import InMemory

from machine import publish
from step import SGD, WORKS, Optimizers, by_hand, make_data, make_model

DEVICE = "link0"
ADDRESS = "10.78.0.{}"
NUM_HOSTS, WORKERS_PER_HOST = 2, 2
ROUNDS = 5
WORK = replace(WORKS[1], steps=8)
OPTIMIZERS = Optimizers("SGD", partial(SGD, fused=True), partial(SGD, fused=True))
SHAPES = {
    "1 Gbit/s, 1 ms in each direction (tc netem)": "netem delay 1ms rate 1gbit limit 100000",
    "1 Gbit/s, no delay of its own (tc tbf; this kernel has no netem)": "tbf rate 1gbit burst 256kb latency 200ms",
}
"""The first one that the kernel knows is taken."""

Loop = Callable[[], object]


def by_trainer(workers: mbgd.Workers, averaging: AveragingName, *, is_flat: bool = False) -> Loop:
    """is_flat: as if no two workers could share memory."""
    averagings.HostMemory = _refuse if is_flat else HostMemory  # type: ignore[assignment, misc, attr-defined]
    model = make_model(WORK)
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        OPTIMIZERS.by_trainer(model.parameters()),
        mbgd.Data(train=InMemory(*make_data(WORK))),
        mbgd.Settings(steps=WORK.steps, batch=mbgd.Batch(WORK.minibatch), averaging=mbgd.Averaging(averaging)),
        workers,
    )
    return trainer.fit


def _refuse(workers: mbgd.Workers) -> HostMemory:
    raise CannotShareError("this benchmark sends messages")


WAYS: dict[str, Callable[[mbgd.Workers], Loop]] = {
    "by hand, DDP": lambda workers: by_hand(WORK, workers, OPTIMIZERS),
    "ddp": partial(by_trainer, averaging=AveragingName.ddp),
    "auto": partial(by_trainer, averaging=AveragingName.auto),
    "reproducible, all over gloo": partial(by_trainer, averaging=AveragingName.reproducible, is_flat=True),
    "reproducible": partial(by_trainer, averaging=AveragingName.reproducible),
    "no exchange": lambda workers: by_hand(WORK, workers, OPTIMIZERS, exchange=False),
}


def work(file: Path) -> None:
    """One worker's part; the main worker writes, for each way, (seconds, bytes sent) of each round."""
    torch.set_num_threads(1)
    sent = Path(f"/sys/class/net/{DEVICE}/statistics/tx_bytes")
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in WAYS}
    with mbgd.start_workers("gloo") as workers:
        for _ in range(ROUNDS + 1):  # the first round warms up
            for name, way in WAYS.items():
                loop = way(workers)
                workers.barrier()
                start, before = time.perf_counter(), int(sent.read_text())
                loop()
                workers.barrier()
                results[name].append((time.perf_counter() - start, int(sent.read_text()) - before))
        if workers.is_main:
            file.write_text(json.dumps(results))


@contextmanager
def hosts() -> Iterator[tuple[list[str], str]]:
    """Network namespaces with addresses of their own, joined by one link; and the link in words."""
    names = [f"mbgdbench{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        ends = [["link", "add", DEVICE, "netns", names[0]], ["type", "veth", "peer", DEVICE, "netns", names[1]]]
        _run("ip", *ends[0], *ends[1])
        for number, name in enumerate(names, start=1):
            _run("ip", "-n", name, "addr", "add", f"{ADDRESS.format(number)}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run("ip", "-n", name, "link", "set", device, "up")
        yield names, _shape(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _shape(names: list[str]) -> str:
    for what, shape in SHAPES.items():
        commands = [["tc", "-n", name, "qdisc", "replace", "dev", DEVICE, "root", *shape.split()] for name in names]
        if not any(subprocess.run(command, capture_output=True).returncode for command in commands):
            return what
    sys.exit(f"error: tc knows neither {' nor '.join(shape.split()[0] for shape in SHAPES.values())} here")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def measure(names: list[str], file: Path) -> dict[str, list[tuple[float, int]]]:
    """Run all workers; ends those that are left when one fails, or at Ctrl-C."""
    num_workers, processes = NUM_HOSTS * WORKERS_PER_HOST, []
    try:
        for rank in range(num_workers):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % WORKERS_PER_HOST),
                "WORLD_SIZE": str(num_workers),
                "LOCAL_WORLD_SIZE": str(WORKERS_PER_HOST),
                "MASTER_ADDR": ADDRESS.format(1),
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": DEVICE,
                "OMP_NUM_THREADS": "1",
            }
            apart = ["ip", "netns", "exec", names[rank // WORKERS_PER_HOST]]
            command = [*apart, sys.executable, __file__, "--worker", str(file)]
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        if any(process.wait() for process in processes):
            sys.exit("error: a worker failed")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, list[tuple[float, int]]] = json.loads(file.read_text())
    return {name: rounds[1:] for name, rounds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker)
        return
    load = os.getloadavg()[0]
    with hosts() as (names, link), tempfile.TemporaryDirectory() as folder:
        found = measure(names, Path(folder) / "times.json")
    num_bytes = sum(p.nbytes for p in make_model(WORK).parameters())
    lines = [f"{'':<30}{'ms a step':>10}{'ratio':>8}{'(range)':>16}{'MB sent':>10}{'of the gradients':>18}"]
    of_hand = [seconds for seconds, _ in found["by hand, DDP"]]
    for name, rounds in found.items():
        seconds, sent = zip(*rounds, strict=True)
        ratios = [a / b for a, b in zip(of_hand, seconds, strict=True)]
        per_step = statistics.median(sent) / WORK.steps
        lines.append(
            f"{name:<30}{1e3 * statistics.median(seconds) / WORK.steps:>10.0f}{statistics.median(ratios):>8.2f}"
            f"{f'({min(ratios):.2f}–{max(ratios):.2f})':>16}{per_step / 1e6:>10.1f}{per_step / num_bytes:>17.2f} ×"
        )
    title = (
        f"{WORK.name}, {OPTIMIZERS.name}, on two hosts of {WORKERS_PER_HOST} workers.\nLink: {link}.\n"
        f"{ROUNDS} interleaved rounds of {WORK.steps} steps: medians, and the range of the ratios.\n"
        f"Bytes sent by the first host in a step; the gradients are {num_bytes / 1e6:.1f} MB.\n"
        f"Load average before: {load:.1f}."
    )
    publish("hosts", title + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
