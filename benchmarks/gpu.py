"""Steps on GPUs: `python benchmarks/gpu.py`, under 4 minutes on one card.

A step of mbgd against a hand-written loop on the same work, in interleaved rounds in the same processes (DDP over nccl
on every GPU of this host, if there are several); reproducible against ddp; how long a snapshot blocks training; the
share of a step spent waiting for examples; and, on one GPU, steps replayed as CUDA graphs against eager ones. With a
ratio > 1 the second column is faster.

Without a GPU the same code runs at toy sizes on the CPU, to show that it runs; the numbers are not written.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any

import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mbgd
from mbgd.config import AveragingName, NoiseScale
from mbgd.models import CNN, GPT, MLP, ResNet
from mbgd.step.graphed import Graphed
from mbgd.workers import cuda

from machine import publish

ON_GPU = torch.cuda.is_available()
NUM_WORKERS = max(torch.cuda.device_count(), 1)
ROUNDS = 5 if ON_GPU else 1
LONG = 10**6
"""Steps of a run, of which as many are made as are measured; none of those is logged."""


@dataclass(frozen=True)
class Work:
    name: str
    make_model: Callable[[], nn.Module]
    example: tuple[int, ...] | int
    """An image's shape; or how many tokens a text has."""
    minibatch: int
    """Of one worker."""
    steps: int
    num_classes: int = 10

    def data(self) -> tuple[Tensor, Tensor]:
        num_examples, generator = 8 * self.minibatch * NUM_WORKERS, torch.Generator().manual_seed(0)
        if isinstance(self.example, int):
            tokens = torch.randint(self.num_classes, (num_examples, self.example + 1), generator=generator)
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        inputs = torch.randn(num_examples, *self.example, generator=generator)
        return inputs, torch.randint(self.num_classes, (num_examples,), generator=generator)


IMAGE = (3, 32, 32)
GPT2 = {"num_layers": 12, "num_heads": 12, "width": 768}
"""124 M parameters with GPT-2's 50,257 tokens."""
WORKS = (
    (
        Work("cnn 32 × 32, 256", partial(CNN, IMAGE, 10, batch_norm=True), IMAGE, 256, 100),
        Work("resnet 32 × 32, 256", partial(ResNet, IMAGE, 10), IMAGE, 256, 40),
        Work("gpt 124 M, 8 × 512 tokens", partial(GPT, (512,), 50257, **GPT2), 512, 8, 8, 50257),
    )
    if ON_GPU
    else (
        Work("cnn", partial(CNN, (1, 8, 8), 10, channels=(4,), hidden=8), (1, 8, 8), 8, 2),
        Work("gpt", partial(GPT, (8,), 9, num_layers=1, num_heads=1, width=8), 8, 8, 2, 9),
    )
)
PRECISIONS = ("fp32", "bf16")
SMALL_GPT = {"num_layers": 4, "num_heads": 4, "width": 128}
SMALL_WORKS = (
    (
        Work("mlp digits, 64", partial(MLP, (1, 8, 8), 10), (1, 8, 8), 64, 200),
        Work("gpt 4 layers, 16 × 64 tokens", partial(GPT, (64,), 96, **SMALL_GPT), 64, 16, 100, 96),
    )
    if ON_GPU
    else (Work("mlp", partial(MLP, (1, 8, 8), 10, hidden=(8,)), (1, 8, 8), 8, 8),)
)
"""Steps whose kernels take the host longer to launch than the GPU to compute."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(loop: Callable[[], object], workers: mbgd.Workers) -> float:
    wait(workers.device)
    workers.barrier()
    start = time.perf_counter()
    loop()
    wait(workers.device)
    workers.barrier()
    return time.perf_counter() - start


def by_hand(work: Work, workers: mbgd.Workers, precision: str) -> Callable[[], None]:
    """What a practised person writes: examples in pinned memory, autocast, a fused optimizer, DDP."""
    device = workers.device
    torch.manual_seed(0)
    model: nn.Module = work.make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if workers.num_workers > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.index is not None else None)
    inputs, targets = work.data()
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(inputs))[workers.rank :: workers.num_workers]
            for indices in order.split(work.minibatch):
                pair = inputs[indices], targets[indices]
                pinned = [part.pin_memory() if device.type == "cuda" else part for part in pair]
                yield tuple(part.to(device, non_blocking=True) for part in pinned)  # type: ignore[misc]

    source = batches()

    def loop() -> None:
        for _ in range(work.steps):
            batch_inputs, batch_targets = next(source)
            optimizer.zero_grad()
            with autocast:
                logits = model(batch_inputs)
                loss = F.cross_entropy(logits.flatten(0, -2).float(), batch_targets.flatten())
            loss.backward()
            optimizer.step()

    return loop


def make_trainer(work: Work, workers: mbgd.Workers, precision: str, **settings: Any) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = work.make_model()
    settings = {"steps": LONG, "log_every_steps": LONG, "noise_scale": NoiseScale(None), **settings}
    settings.setdefault("batch", mbgd.Batch(work.minibatch * workers.num_workers))
    return mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        mbgd.Data(train=mbgd.InMemory(*work.data())),
        mbgd.Settings(precision=mbgd.Precision(precision), **settings),
        workers,
    )


def by_trainer(work: Work, trainer: mbgd.Trainer) -> Callable[[], None]:
    shards = trainer.setup.loader.shards(1, LONG - 1)  # the first and the last step are logged

    def loop() -> None:
        for _ in range(work.steps):
            trainer.train_step(next(shards))

    return loop


def ratio_of(loops: tuple[Callable[[], None], Callable[[], None]], workers: mbgd.Workers) -> tuple[float, float, str]:
    """Median seconds of each loop over interleaved rounds, and their ratio; the first round warms up."""
    rounds = [[seconds(loop, workers) for loop in loops] for _ in range(ROUNDS + 1)][1:]
    first, second = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratios = [a / b for a, b in rounds]
    return first, second, f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def line(work: Work, precision: str, first: float, second: float, ratio: str) -> str:
    first, second = (seconds / work.steps * 1e3 for seconds in (first, second))
    return f"{work.name:<28}{precision:>6}{first:>10.2f}{second:>10.2f}  {ratio}"


def measure_steps(workers: mbgd.Workers) -> Iterator[str]:
    yield f"{'milliseconds of a step':<28}{'':>6}{'by hand':>10}{'trainer':>10}  ratio"
    for work in WORKS:
        for precision in PRECISIONS:
            loops = by_hand(work, workers, precision), by_trainer(work, make_trainer(work, workers, precision))
            hand, ours, ratio = ratio_of(loops, workers)
            yield line(work, precision, hand, ours, ratio)


def measure_reproducible(workers: mbgd.Workers) -> Iterator[str]:
    yield f"{'8 micro-batches a step, ms':<28}{'':>6}{'ddp':>10}{'reprod.':>10}  ratio"
    work = WORKS[0]
    size = work.minibatch * workers.num_workers
    batch = mbgd.Batch(size, size // 8)
    names = AveragingName.ddp, AveragingName.reproducible

    def loop_with(name: AveragingName) -> Callable[[], None]:
        loop = by_trainer(work, make_trainer(work, workers, "fp32", batch=batch, averaging=mbgd.Averaging(name)))

        def run() -> None:
            torch.use_deterministic_algorithms(name is AveragingName.reproducible)
            loop()

        return run

    ddp, reproducible, ratio = ratio_of((loop_with(names[0]), loop_with(names[1])), workers)
    torch.use_deterministic_algorithms(False)
    yield line(work, "fp32", ddp, reproducible, ratio)


def measure_graphs(workers: mbgd.Workers) -> Iterator[str]:
    """Steps that are replayed against eager ones, of the same bits; or why nothing is replayed.

    With deterministic kernels: a graph is used only where eager computations repeat their bits.
    """
    if workers.num_workers > 1:
        return
    yield f"{'CUDA graphs, ms of a step':<28}{'':>6}{'off':>10}{'auto':>10}  ratio"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # as with reproducible
    for work, precision in (*product((*SMALL_WORKS, WORKS[0]), PRECISIONS), (WORKS[-1], "bf16")):
        trainers = [make_trainer(work, workers, precision, cuda_graphs=graphs) for graphs in ("off", "auto")]
        off, auto, ratio = ratio_of((by_trainer(work, trainers[0]), by_trainer(work, trainers[1])), workers)
        passes = trainers[1].train_step.passes
        reason = passes.reason if isinstance(passes, Graphed) else trainers[1].train_step.describe_cuda_graphs
        yield line(work, precision, off, auto, f"{ratio}{f'  {reason}' if reason else ''}")
    torch.use_deterministic_algorithms(False)


def measure_snapshot(workers: mbgd.Workers) -> str:
    work = WORKS[-1]
    trainer = make_trainer(work, workers, "bf16")
    by_trainer(work, trainer)()
    stalls = [seconds(trainer.snapshot, workers) for _ in range(ROUNDS + 1)][1:]
    num_bytes = sum(t.nbytes for of_file in trainer.snapshot().tensors.values() for t in of_file.values())
    return (
        f"a snapshot of {num_bytes / 1e6:,.0f} MB ({work.name}) holds training up for "
        f"{statistics.median(stalls) * 1e3:.0f} ms, {num_bytes / statistics.median(stalls) / 1e9:.1f} GB/s"
    )


def measure_loader(workers: mbgd.Workers) -> str:
    work = WORKS[0]
    steps = 20 * work.steps
    metrics = make_trainer(work, workers, "bf16", steps=steps, log_every_steps=steps // 2).fit().metrics
    parts = {part: metrics[f"time/{part}_seconds"] * 1e3 for part in ("data_wait", "forward_backward", "optimizer")}
    return f"{work.name}, bf16, ms of a step: " + ", ".join(f"{part} {value:.3f}" for part, value in parts.items())


def measure_the_rest(workers: mbgd.Workers) -> Iterator[str]:
    yield measure_snapshot(workers)
    yield measure_loader(workers)


MEASURED = (measure_steps, measure_reproducible, measure_the_rest, measure_graphs)


def measure(rank: int, num_workers: int, port: int) -> None:
    torch.set_num_threads(max((os.cpu_count() or 1) // num_workers, 1))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with mbgd.start_workers() as workers:
        lines = []
        for found in chain(*(measured(workers) for measured in MEASURED)):
            lines.append(found)
            if workers.is_main:
                print(found, file=sys.stderr, flush=True)  # there even if time runs out
        if not workers.is_main:
            return
        text = f"{workers.num_workers} workers, {workers.device.type}\n\n" + "\n".join(lines)
        if not ON_GPU:
            print(f"no CUDA device: toy sizes on the CPU, nothing is kept\n\n{text}")
            return
        card = f"{torch.cuda.get_device_name()}, {torch.cuda.device_count()} of them; {cuda.conditions(workers.device)}"
        publish("gpu", f"{card}\n{text}")


if __name__ == "__main__":
    arguments = NUM_WORKERS, 20000 + os.getpid() % 20000
    if NUM_WORKERS == 1:
        measure(0, *arguments)
    else:
        torch.multiprocessing.spawn(measure, arguments, NUM_WORKERS)
