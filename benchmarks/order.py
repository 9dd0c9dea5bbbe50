"""Time and memory to the first index of a shuffled epoch: `python benchmarks/order.py`.

`mbgd.batches.order.Order` against `torch.utils.data.DistributedSampler`, which shuffles the whole epoch before
its first index, in every worker. The sampler runs in a separate process, so that the memory peak is its own.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
import tracemalloc

from torch.utils.data import Dataset, DistributedSampler

from mbgd.batches.order import Order

from machine import publish

MIB = 2**20
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


class Sized(Dataset[None]):
    """A dataset of which only the length is asked."""

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples

    def __len__(self) -> int:
        return self.num_examples


def order(num_examples: int, count: int, rounds: int) -> tuple[float, float]:
    """Median milliseconds and peak MiB of the first `count` indices; each round is another epoch."""

    def first(epoch: int) -> None:
        Order(num_examples, seed=0).indices(epoch, 0, count)

    first(0)  # what numpy sets up once is not part of an epoch's start
    milliseconds = []
    for epoch in range(rounds):
        start = time.perf_counter()
        first(epoch)
        milliseconds.append(1000 * (time.perf_counter() - start))
    tracemalloc.start()
    for epoch in range(rounds):
        first(epoch)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return statistics.median(milliseconds), peak_bytes / MIB


def sampler(num_examples: int) -> tuple[float, float]:
    """Milliseconds to the sampler's first index, and MiB by which the process's peak memory grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # One of two workers: each shuffles the whole and keeps a half.
    distributed: DistributedSampler[None] = DistributedSampler(Sized(num_examples), num_replicas=2, rank=0)
    start = time.perf_counter()
    next(iter(distributed))
    milliseconds = 1000 * (time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return milliseconds, (after - before) * MAXRSS_BYTES / MIB


def row(name: str, num_examples: int, rounds: int, milliseconds: float, mebibytes: float) -> str:
    return f"{name:<36}{num_examples:>15,}{rounds:>8,}{milliseconds:>14,.3f}{mebibytes:>12,.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10**9)
    parser.add_argument("--sampler-examples", type=int, default=10**7)
    parser.add_argument("--rounds", type=int, default=1000)
    arguments = parser.parse_args()

    lines = [f"{'':<36}{'examples':>15}{'rounds':>8}{'milliseconds':>14}{'peak MiB':>12}"]
    for name, count in (("Order, first index", 1), ("Order, first 4,096 indices", 4096)):
        measured = order(arguments.examples, count, arguments.rounds)
        lines.append(row(name, arguments.examples, arguments.rounds, *measured))
    with multiprocessing.get_context("spawn").Pool(1) as process:
        measured = process.apply(sampler, (arguments.sampler_examples,))
    lines.append(row("DistributedSampler, first index", arguments.sampler_examples, 1, *measured))

    heading = (
        "Start of a shuffled epoch: median time; peak of the memory allocated for it\n"
        "(Order: traced allocations; DistributedSampler: growth of its process's peak resident memory)."
    )
    publish("order", heading + "\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
