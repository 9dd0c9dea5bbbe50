"""Steps on two hosts of two and of four CPU workers: `python benchmarks/hosts.py`, as root.

The hosts are network namespaces of this machine, joined by one link, whose rate and delay `tc` sets: 1 Gbit/s, and
1 ms in each direction where the kernel has netem. The hand-written loop averages by DistributedDataParallel over gloo,
between all workers; so does the trainer with averaging=ddp. With averaging=auto it adds up within each host first.
The last rows are the sum of the gradients alone, without a step. Interleaved rounds in the same processes; the
trainer's first two steps, after which it compares the replicas once, do not count. Ratio > 1: faster than the first
row, or than gloo's all-reduce. Bytes are those that the first host sends, from the counters of its interface.

All workers share this machine's cores, so computing takes longer than on two machines.
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
import torch.distributed as dist
from torch import nn

import mbgd
import mbgd.averaging as averagings
from mbgd.averaging.host_memory.between_hosts import BetweenHosts
from mbgd.averaging.host_memory.hosts_exchange import HostsExchange, TwoFolds
from mbgd.averaging.host_memory.memory import CannotShareError, HostMemory
from mbgd.averaging.shared_memory import in_order
from mbgd.config import AveragingName
from mbgd.data import InMemory

from machine import publish
from step import SGD, WORKS, Optimizers, by_hand, make_data, make_model

DEVICE = "link0"
ADDRESS = "10.78.0.{}"
NUM_HOSTS = 2
WORKERS_PER_HOST = (2, 4)
ROUNDS = 4
WORK = replace(WORKS[1], steps=8)
OPTIMIZERS = Optimizers("SGD", partial(SGD, fused=True), partial(SGD, fused=True))
SHAPES = {
    "1 Gbit/s, 1 ms in each direction (tc netem)": "netem delay 1ms rate 1gbit limit 100000",
    "1 Gbit/s, no delay of its own (tc tbf; this kernel has no netem)": "tbf rate 1gbit burst 256kb latency 200ms",
}
"""The first one that the kernel knows is taken."""

Loop = Callable[[], object]
"""Makes `WORK.steps` steps; may return their seconds, if those are not the time that it takes."""


class Clock:
    """A tracker that takes the time of each step's end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def progress(self, step: int) -> None:
        self.times.append(time.perf_counter())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def close(self, *ending: object) -> None:
        pass


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

    def fit() -> float:
        clock = Clock()
        trainer.fit(clock)
        return WORK.steps * (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)

    return fit


def _refuse(workers: mbgd.Workers) -> HostMemory:
    raise CannotShareError("this benchmark sends messages")


def all_reduce(workers: mbgd.Workers) -> Loop:
    gradients = torch.zeros(_num_elements())
    return lambda: [dist.all_reduce(gradients) for _ in range(WORK.steps)]


def add_up_twice(workers: mbgd.Workers) -> Loop:
    between = BetweenHosts(HostMemory(workers))
    exchange = HostsExchange([nn.Parameter(torch.zeros(_num_elements()))], 1, between)
    folds = TwoFolds(lambda rows: [in_order(rows)], in_order, (1,) * NUM_HOSTS)
    gradients, rows_of_workers = exchange.places[0], [1] * workers.num_workers
    return lambda: [exchange([gradients], rows_of_workers, folds) for _ in range(WORK.steps)]


def _num_elements() -> int:
    return sum(p.numel() for p in make_model(WORK).parameters())


BY_HAND, ALONE = "by hand, DDP", "all_reduce alone"
WAYS: dict[str, Callable[[mbgd.Workers], Loop]] = {
    BY_HAND: lambda workers: by_hand(WORK, workers, OPTIMIZERS),
    "ddp": partial(by_trainer, averaging=AveragingName.ddp),
    "auto": partial(by_trainer, averaging=AveragingName.auto),
    "reproducible, all over gloo": partial(by_trainer, averaging=AveragingName.reproducible, is_flat=True),
    "reproducible": partial(by_trainer, averaging=AveragingName.reproducible),
    "no exchange": lambda workers: by_hand(WORK, workers, OPTIMIZERS, exchange=False),
    ALONE: all_reduce,
    "the sum of auto alone": add_up_twice,
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
                seconds = loop()
                workers.barrier()
                if not isinstance(seconds, float):
                    seconds = time.perf_counter() - start
                results[name].append((seconds, int(sent.read_text()) - before))
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


def measure(names: list[str], workers_per_host: int, file: Path) -> dict[str, list[tuple[float, int]]]:
    """Run all workers; ends those that are left when one fails, or at Ctrl-C."""
    num_workers, processes = NUM_HOSTS * workers_per_host, []
    try:
        for rank in range(num_workers):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % workers_per_host),
                "WORLD_SIZE": str(num_workers),
                "LOCAL_WORLD_SIZE": str(workers_per_host),
                "MASTER_ADDR": ADDRESS.format(1),
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": DEVICE,
                "OMP_NUM_THREADS": "1",
            }
            apart = ["ip", "netns", "exec", names[rank // workers_per_host]]
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


def table(found: dict[str, list[tuple[float, int]]], num_bytes: int) -> Iterator[str]:
    """num_bytes: of the gradients."""
    yield f"{'':<30}{'ms a step':>10}{'ratio':>8}{'(range)':>16}{'MB sent':>10}{'of the gradients':>18}"
    for name, rounds in found.items():
        seconds, sent = zip(*rounds, strict=True)
        compared = found[ALONE if "alone" in name else BY_HAND]
        ratios = [a / b for (a, _), b in zip(compared, seconds, strict=True)]
        per_step = statistics.median(sent) / WORK.steps
        yield (
            f"{name:<30}{1e3 * statistics.median(seconds) / WORK.steps:>10.0f}{statistics.median(ratios):>8.2f}"
            f"{f'({min(ratios):.2f}–{max(ratios):.2f})':>16}{per_step / 1e6:>10.1f}{per_step / num_bytes:>16.2f} ×"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker)
        sys.stdout.flush()
        os._exit(0)  # torch's process group may abort a process that ends in good order on a busy machine
    num_bytes = sum(p.nbytes for p in make_model(WORK).parameters())
    tables = []
    with hosts() as (names, link), tempfile.TemporaryDirectory() as folder:
        for workers_per_host in WORKERS_PER_HOST:
            load = os.getloadavg()[0]
            found = measure(names, workers_per_host, Path(folder) / "times.json")
            title = f"Two hosts of {workers_per_host} workers; load average before: {load:.1f}."
            tables.append("\n".join([title, "", *table(found, num_bytes)]))
    title = (
        f"{WORK.name}, {OPTIMIZERS.name}: gradients of {num_bytes / 1e6:.1f} MB.\nLink: {link}.\n{ROUNDS} interleaved "
        f"rounds of {WORK.steps} steps: medians, and the range of the ratios. Bytes sent by the first host in a step."
    )
    publish("hosts", "\n\n".join([title, *tables]))


if __name__ == "__main__":
    main()
