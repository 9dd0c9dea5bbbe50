"""The same training on GPUs as on the CPU.

`make gpu` runs this file. Without a GPU the same bodies run on the CPU, and what needs CUDA is skipped with the reason.
With one they run there alone: its time is short, and the CPU's half runs elsewhere.
Several workers share one GPU over gloo; nccl needs one GPU for each worker.
"""

import hashlib
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mbgd
import mbgd.averaging as averagings
import mbgd.task.objective as task_objective
from mbgd.averaging.host_memory.memory import CannotShareError
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints import saving
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.checks.finite import Watch
from mbgd.checks.replicas import Replicas
from mbgd.config import AveragingName, Checkpoint, NoiseScale, ShardingName
from mbgd.data import digits
from mbgd.measuring.clock import MOST_EVENTS, PARTS, StreamStopwatch
from mbgd.models import CNN, GPT, MLP, Linear, ResNet
from mbgd.optimizers import Lamb, Lars, MuonAdamW
from mbgd.runs.conditions import conditions
from mbgd.step import two_pass
from mbgd.step.graphed import Graphed
from mbgd.step.histograms import histogram
from mbgd.task import elementwise
from mbgd.workers import cuda
from mbgd.workers.group import start_workers

from processes import environment, eventually, run_workers, started

cuda.set_up()  # what start_workers does, before CUDA starts in this process

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs 2 GPUs; torch sees {torch.cuda.device_count()}"
)
DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu", pytest.param("cuda", marks=needs_cuda)]
on_devices = pytest.mark.parametrize("device", DEVICES)
pytestmark = pytest.mark.gpu

ADAMW = partial(torch.optim.AdamW, lr=0.01, fused=True)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True)
NUM_TOKENS, NUM_WORDS = 8, 20
STEPS = 4


# What is trained


def images() -> mbgd.InMemory:
    generator = torch.Generator().manual_seed(0)
    return mbgd.InMemory(torch.randn(60, 1, 8, 8, generator=generator), torch.randint(10, (60,), generator=generator))


def texts() -> mbgd.InMemory:
    tokens = torch.randint(NUM_WORDS, (60, NUM_TOKENS + 1), generator=torch.Generator().manual_seed(0))
    return mbgd.InMemory(tokens[:, :-1].clone(), tokens[:, 1:].clone())


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], mbgd.InMemory]]] = {
    "mlp with dropout": (partial(MLP, (1, 8, 8), 10, hidden=(16,), dropout=0.1), images),
    "cnn with BatchNorm": (partial(CNN, (1, 8, 8), 10, channels=(4, 8), hidden=16, batch_norm=True), images),
    "gpt": (partial(GPT, (NUM_TOKENS,), NUM_WORDS, num_layers=1, num_heads=2, width=16, dropout=0.1), texts),
}


def make_trainer(
    workers: mbgd.Workers,
    name: str,
    averaging: str = "ddp",
    precision: str = "fp32",
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    objective: Any = None,
    **settings: Any,
) -> mbgd.Trainer:
    make_model, make_data = MODELS[name]
    torch.manual_seed(0)
    model = make_model()
    settings = {"steps": STEPS, "batch": mbgd.Batch(20, 5), "max_grad_norm": 1.0, **settings}
    return mbgd.Trainer(
        model,
        objective or mbgd.CrossEntropy(),
        optimizer(model.parameters()),
        mbgd.Data(train=make_data(), evaluation=make_data()),
        mbgd.Settings(
            averaging=mbgd.Averaging(AveragingName(averaging)), precision=mbgd.Precision(precision), **settings
        ),
        workers,
    )


def alone(device: str) -> mbgd.Workers:
    return mbgd.Workers(device=torch.device(device, 0) if device == "cuda" else torch.device(device))


def state(trainer: mbgd.Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in trainer.setup.model.state_dict().items()}


# Several workers of one device


def train_in_fp64(workers: mbgd.Workers, averagings: list[str]) -> dict[str, dict[str, Tensor]]:
    trained = {}
    for averaging in averagings:
        for name in MODELS:
            # Dropout draws other numbers on a GPU than on a CPU.
            trainer = make_trainer(workers, name, averaging, "fp64")
            for module in trainer.setup.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "dropout") and isinstance(module.dropout, float):
                    module.dropout = 0.0
            trainer.fit()
            trained[f"{name}, {averaging}"] = state(trainer)
    return trained


@on_devices
def test_any_number_of_workers_of_one_device_train_as_one_cpu_does(device: str) -> None:
    averagings = ["ddp", "reproducible"]
    wanted = train_in_fp64(mbgd.Workers(), averagings)
    for num_workers in (1, 2, 3) if device == "cuda" else (2,):  # tests/test_exactness.py has the others
        for got in run_workers(train_in_fp64, num_workers, averagings, device=device):
            for name, tensors in wanted.items():
                for key, tensor in tensors.items():
                    torch.testing.assert_close(got[name][key], tensor, rtol=1e-9, atol=1e-12, msg=f"{name} {key}")


def train_over_the_minibatch(workers: mbgd.Workers) -> dict[str, Tensor]:
    how = {"batch": mbgd.Batch(20), "batch_norm": "minibatch", "max_grad_norm": None}
    trainer = make_trainer(workers, "cnn with BatchNorm", "ddp", "fp64", SGD, **how)
    trainer.fit()
    return state(trainer)


@on_devices
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=needs_two_gpus)])
def test_batch_norm_over_the_minibatch_is_that_of_one_cpu(device: str, backend: str) -> None:
    if (device, backend) == ("cpu", "nccl"):
        pytest.skip("nccl is for GPUs")
    wanted = train_over_the_minibatch(mbgd.Workers())
    for got in run_workers(train_over_the_minibatch, 2, backend=backend, device=device):
        for key, tensor in wanted.items():
            torch.testing.assert_close(got[key], tensor, rtol=1e-9, atol=1e-12, msg=key)


def train_reproducibly(workers: mbgd.Workers, precisions: list[str]) -> dict[str, tuple[str, str]]:
    hashes = {}
    for precision in precisions:
        for name in MODELS:
            trainer = make_trainer(workers, name, "reproducible", precision, noise_scale=NoiseScale(every_steps=1))
            metrics = {k: v for k, v in trainer.fit().metrics.items() if not k.startswith("time/")}
            bits = hashlib.sha256()
            for _, tensor in sorted(state(trainer).items()):
                bits.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            hashes[f"{name}, {precision}"] = (bits.hexdigest(), repr(sorted(metrics.items())))
    return hashes


@on_devices
def test_reproducible_gives_the_same_bits_on_any_number_of_workers_of_one_device(device: str) -> None:
    precisions = ["fp32", "bf16"]
    (wanted,) = run_workers(train_reproducibly, 1, precisions, device=device)
    for num_workers in (2, 3):
        for got in run_workers(train_reproducibly, num_workers, precisions, device=device):
            assert got == wanted


def train_in_pieces(workers: mbgd.Workers, sharding: str) -> dict[str, tuple[str, str]]:
    torch.use_deterministic_algorithms(True)  # so that with ddp, too, another run on a GPU repeats its bits
    found = {}
    for name, precision in itertools.product(MODELS, ("fp32", "fp16")):
        trainer = make_trainer(workers, name, "ddp", precision, sharding=ShardingName(sharding))
        metrics = {k: v for k, v in trainer.fit().metrics.items() if not k.startswith("time/")}
        bits, snapshot = hashlib.sha256(), trainer.snapshot()
        for of_file in snapshot.tensors.values():
            for tensor in of_file.values():
                bits.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        found[f"{name}, {precision}"] = (bits.hexdigest(), repr(sorted(metrics.items())))
    return found


@on_devices
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=needs_two_gpus)])
def test_workers_that_update_their_own_pieces_get_the_same_bits(device: str, backend: str) -> None:
    if (device, backend) == ("cpu", "nccl"):
        pytest.skip("nccl is for GPUs")
    wanted = run_workers(train_in_pieces, 2, "none", backend=backend, device=device)
    assert run_workers(train_in_pieces, 2, "optimizer", backend=backend, device=device) == wanted


def train_coupled(workers: mbgd.Workers) -> list[tuple[str, float]]:
    found = []
    for precision in ("fp32", "bf16"):
        objective = mbgd.InfoNCE(augment=mbgd.RandomCrops())
        trainer = make_trainer(workers, "mlp with dropout", "reproducible", precision, objective=objective)
        loss = trainer.fit().metrics["eval/loss"]
        found.append((weights_sha256(trainer.setup.task), loss))
    return found


@on_devices
def test_coupled_losses_give_the_same_bits_on_any_number_of_workers_of_one_device(device: str) -> None:
    (wanted,) = run_workers(train_coupled, 1, device=device)
    for got in run_workers(train_coupled, 2, device=device):
        assert got == wanted


def use_every_collective(workers: mbgd.Workers) -> dict[str, Any]:
    rank, device = workers.rank, workers.device
    tensors = [torch.full((rank + 1, 2), rank, dtype=dtype, device=device) for dtype in (torch.int16, torch.bfloat16)]
    shared = torch.full((3,), float(rank), device=device)
    workers.broadcast_(shared)
    state = {"weight": torch.arange(5, device=device), "step": torch.tensor(3.0)}  # which torch keeps on the host
    Replicas(workers).compare(1, state, {"lr": 0.1})
    return {
        "device": device.type,
        "sum": workers.sum_(torch.tensor([1.0, rank], dtype=torch.float64, device=device)).tolist(),
        "max": workers.max_(torch.tensor([rank, -rank], device=device)).tolist(),
        "broadcast": workers.broadcast(["from", rank]),
        "broadcast_": shared.tolist(),
        "gather": workers.gather_values({"rank": rank, "more": "x" * rank}),
        "collect": [(str(tensor.dtype), tensor.tolist()) for tensor in workers.collect([t.cpu() for t in tensors])],
    }


@on_devices
def test_every_collective_of_workers_that_share_a_device(device: str) -> None:
    results = run_workers(use_every_collective, 3, device=device)
    for rank, result in enumerate(results):
        assert result["device"] == device
        assert result["sum"] == [3.0, 3.0]
        assert result["max"] == [2, 0]
        assert result["broadcast"] == ["from", 0]
        assert result["broadcast_"] == [0.0] * 3
        assert result["gather"] == [{"rank": r, "more": "x" * r} for r in range(3)]
        kinds = ["torch.int16", "torch.bfloat16"]
        collected = [(kind, [[r, r]] * (r + 1)) for r in range(3) for kind in kinds]
        assert result["collect"] == (collected if rank == 0 else [])


# Nothing waits for the device in a step that is not logged


class NoWaiting(TorchDispatchMode):
    """On a CPU, refuses the operations that would wait for a GPU: values read, or copied from Python's numbers."""

    WAITS = (
        *("_local_scalar_dense", "is_nonzero", "equal", "lift_fresh", "_linalg_check_errors"),
        *("nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2", "repeat_interleave", "bincount"),
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(t is not None and t.dtype is torch.bool for t in _indices(args))
        if name in self.WAITS or by_mask:
            raise AssertionError(f"{func} would wait for a GPU")
        return func(*args, **(kwargs or {}))


def _indices(args: tuple[Any, ...]) -> list[Tensor | None]:
    return next((list(arg) for arg in args if isinstance(arg, list | tuple)), [])


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    if device == "cpu":
        with NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def as_on_a_gpu(trainer: mbgd.Trainer) -> None:
    """Let a trainer on the CPU do what one on a GPU does: keep on the device what is wrong, and not look."""
    trainer.train_step._on_gpu = True
    for watch in (trainer.train_step.alarm.everywhere, trainer.train_step.alarm.here):
        Watch.__init__(watch, trainer.setup.workers.device, waits=False)


class Weighted(mbgd.CrossEntropy):
    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        terms = super().__call__(model, batch)
        return mbgd.PerExample(terms.losses, torch.ones_like(terms.losses), terms.metrics)


@on_devices
@pytest.mark.parametrize(
    ("name", "precision", "averaging", "weighted", "more"),
    [
        ("mlp with dropout", "fp32", "ddp", False, {"max_grad_norm": None}),
        ("cnn with BatchNorm", "fp32", "ddp", True, {"noise_scale": NoiseScale(every_steps=1)}),
        ("cnn with BatchNorm", "bf16", "reproducible", False, {}),
        ("gpt", "bf16", "ddp", True, {}),
        ("gpt", "fp16", "ddp", False, {"noise_scale": NoiseScale(every_steps=1)}),
    ],
)
def test_steps_that_are_not_logged_do_not_wait_for_the_device(
    device: str, name: str, precision: str, averaging: str, weighted: bool, more: dict[str, Any]
) -> None:
    objective = Weighted() if weighted else None
    steps = {"steps": 12, "log_every_steps": 1000}
    train_without_waiting(make_trainer(alone(device), name, averaging, precision, SGD, objective, **steps, **more))


def train_without_waiting(trainer: mbgd.Trainer) -> None:
    device = trainer.setup.workers.device.type
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            as_on_a_gpu(trainer)
            for module in (task_objective, elementwise):
                patch.setattr(module, "reads_at_once", lambda device: False)
            patch.setattr(two_pass, "check_repeated", lambda *_: None)  # on a GPU, in every hundredth step alone
        shards = trainer.setup.loader.shards(0, 11)
        if device == "cpu":  # where reading the examples has nothing to wait for
            shards = iter(list(shards))
        trainer.train_step.begin(0)
        for _ in range(3):  # what is allocated, compiled and remembered once
            trainer.train_step(next(shards))
        before = weights_sha256(trainer.setup.model)
        with no_waiting(device):
            for shard in shards:
                trainer.train_step(shard)
    trainer.check()
    assert weights_sha256(trainer.setup.model) != before
    torch.use_deterministic_algorithms(False)


def numbers() -> mbgd.InMemory:
    inputs, generator = images().inputs, torch.Generator().manual_seed(0)
    return mbgd.InMemory(inputs, torch.randint(-1, 2, (60, 3), generator=generator).float())


def teacher() -> nn.Module:
    torch.manual_seed(1)
    return MLP((1, 8, 8), 10)


IMAGE = (1, 8, 8)
OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], mbgd.InMemory], Callable[[], Any]]] = {
    "resnet": (partial(ResNet, IMAGE, 10, depth=8, width=4), images, partial(mbgd.CrossEntropy, label_smoothing=0.1)),
    "squared error": (partial(Linear, IMAGE, 3), numbers, mbgd.MeanSquaredError),
    "huber": (partial(MLP, IMAGE, 3), numbers, mbgd.Huber),
    "labels": (
        partial(MLP, IMAGE, 3),
        numbers,
        partial(mbgd.BinaryCrossEntropy, pos_weight=[1.0, 2.0, 3.0], ignore_index=-1),
    ),
    "weighted classes": (
        partial(MLP, IMAGE, 10),
        images,
        partial(mbgd.CrossEntropy, class_weights=[1.0] * 5 + [2.0] * 5, ignore_index=3, label_smoothing=0.1),
    ),
    "distillation": (partial(MLP, IMAGE, 10), images, lambda: mbgd.Distillation(teacher())),
    "pairs": (partial(CNN, IMAGE, 10, channels=(4,)), images, partial(mbgd.InfoNCE, augment=mbgd.RandomCrops())),
    "other side": (
        partial(MLP, IMAGE, 10),
        images,
        partial(mbgd.InfoNCE, augment=mbgd.RandomCrops(), negatives="other"),
    ),
}


@on_devices
@pytest.mark.parametrize(
    ("name", "precision"), list(zip(OTHERS, itertools.cycle(["fp32", "bf16", "fp16"]), strict=False))
)
def test_no_shipped_model_or_objective_waits_for_the_device(device: str, name: str, precision: str) -> None:
    make_model, make_data, make_objective = OTHERS[name]
    torch.manual_seed(0)
    model = make_model()
    trainer = mbgd.Trainer(
        model,
        make_objective(),
        SGD(model.parameters()),
        mbgd.Data(train=make_data()),
        mbgd.Settings(
            steps=12,
            batch=mbgd.Batch(20, 5),
            log_every_steps=1000,
            max_grad_norm=1.0,
            noise_scale=NoiseScale(every_steps=1),
            precision=mbgd.Precision(precision),
        ),
        alone(device),
    )
    ema = mbgd.EMA(0.9)
    ema.before_training(trainer)
    ema.at_start(0)
    trainer.train_step.observers.append(ema)
    train_without_waiting(trainer)


def train_together_without_waiting(workers: mbgd.Workers, averaging: str, sharding: str) -> list[str]:
    def refuse(workers: mbgd.Workers) -> None:
        raise CannotShareError("as GPUs, these workers send messages")

    averagings.HostMemory = refuse  # type: ignore[assignment,misc]
    described = []
    for name, precision in zip(MODELS, ("fp16", "fp32", "bf16"), strict=True):
        how = {"steps": 12, "log_every_steps": 1000, "sharding": ShardingName(sharding)}
        trainer = make_trainer(workers, name, averaging, precision, SGD, **how, noise_scale=NoiseScale(every_steps=1))
        train_without_waiting(trainer)
        described.append(trainer.train_step.averaging.describe())
        assert (trainer.train_step.sharded is None) == (sharding == "none")
    return described


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=needs_two_gpus)])
@pytest.mark.parametrize("sharding", ["none", "optimizer"])
@pytest.mark.parametrize("averaging", ["ddp", "reproducible"])
def test_steps_of_several_workers_do_not_wait_for_the_device(
    averaging: str, sharding: str, device: str, backend: str
) -> None:
    found = run_workers(train_together_without_waiting, 2, averaging, sharding, backend=backend, device=device)
    assert all(text.startswith(f"{averaging} over {backend}") for described in found for text in described)


def muon(parameters: Any) -> torch.optim.Optimizer:
    return MuonAdamW([(str(number), one) for number, one in enumerate(parameters)], lr=0.01, fused=True)


@on_devices
@pytest.mark.parametrize(
    "optimizer", [partial(Lamb, lr=0.01), partial(Lars, lr=1.0), muon], ids=["lamb", "lars", "muon"]
)
def test_our_optimizers_and_clipping_do_not_wait_for_the_device(device: str, optimizer: Any) -> None:
    steps = {"steps": 12, "log_every_steps": 1000, "max_grad_value": 0.01}
    train_without_waiting(make_trainer(alone(device), "gpt", "ddp", "fp32", optimizer, **steps))


@on_devices
def test_histograms_wait_for_the_device_in_their_own_steps_alone(device: str) -> None:
    trainer = make_trainer(alone(device), "gpt", "ddp", "fp16", SGD, steps=12, log_every_steps=1000)
    histograms = mbgd.Histograms(2)  # the first and the last step, which is not made here
    histograms.before_training(trainer)
    written: list[int] = []
    histograms.with_writer(lambda step, values: written.append(step))
    trainer.train_step.observers.append(histograms)
    train_without_waiting(trainer)
    assert written == [1]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_histograms_are_counted_alike_on_any_device(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(10**6).exp() * torch.randn(10**6), torch.tensor([0.0, -0.0, 1e30, math.nan])])
    values = values.to(dtype)
    assert histogram([values.to(device)]) == histogram([values])
    assert histogram([values.to(device)], divisor=torch.tensor(8, device=device)) == histogram([values / 8])


@on_devices
def test_what_waits_for_the_device_is_noticed(device: str) -> None:
    values = torch.arange(3.0, device=device)
    for waits in (
        lambda: values.sum().item(),
        lambda: bool(values[0] > 0),
        lambda: values[values > 0],
        lambda: values.new_tensor(3.0),
        lambda: torch.tensor(3.0, device=device),
    ):
        with pytest.raises((AssertionError, RuntimeError), match=r"wait for a GPU|synchronizing"), no_waiting(device):
            waits()


@on_devices
def test_what_is_wrong_is_told_at_the_next_logged_step(device: str) -> None:
    trainer = make_trainer(alone(device), "mlp with dropout", steps=12, log_every_steps=8)
    if device == "cpu":
        as_on_a_gpu(trainer)

    class Spoils:
        """Makes the weights not finite after the third step, which only the fourth can notice."""

        def agreed(self, step: int) -> bool:
            if step == 3:
                with torch.no_grad():
                    next(trainer.setup.model.parameters()).fill_(float("nan"))
            return False

    with pytest.raises(mbgd.UsageError, match="step 4"):
        trainer.fit(stop=Spoils())


# Micro-batches that are replayed as CUDA graphs


def graph_bits(trainer: mbgd.Trainer) -> tuple[str, str]:
    """Of the metrics and the state after training."""
    metrics = {k: v for k, v in trainer.fit().metrics.items() if not k.startswith("time/")}
    found, snapshot = hashlib.sha256(), trainer.snapshot()
    for of_file in snapshot.tensors.values():
        for _, tensor in sorted(of_file.items()):
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    torch.use_deterministic_algorithms(False)
    return found.hexdigest(), repr(sorted(metrics.items()))


@needs_cuda
@pytest.mark.parametrize(
    ("name", "precision", "averaging"),
    [
        *((name, "fp32", "ddp") for name in MODELS),
        *((name, "bf16", "reproducible") for name in MODELS),
        ("gpt", "fp32", "reproducible"),
        ("cnn with BatchNorm", "bf16", "ddp"),
        ("gpt", "bf16", "ddp"),
        ("gpt", "bf16-true", "ddp"),
        ("mlp with dropout", "fp16", "ddp"),
    ],
)
def test_graphs_train_to_the_bits_of_eager_micro_batches(name: str, precision: str, averaging: str) -> None:
    """With micro-batches of 4 and 5 examples, and steps that are logged or measure their noise, which are eager."""
    cut = {"batch": mbgd.Batch(14, 5), "steps": 24, "log_every_steps": 10, "noise_scale": NoiseScale(every_steps=7)}
    objective = Weighted() if name.startswith("cnn") else None
    found = {}
    for graphs in ("off", "auto"):
        torch.use_deterministic_algorithms(True)  # so that with ddp, too, eager micro-batches repeat their bits
        trainer = make_trainer(
            alone("cuda"), name, averaging, precision, objective=objective, cuda_graphs=graphs, **cut
        )
        found[graphs] = graph_bits(trainer)
    passes = trainer.train_step.passes
    assert isinstance(passes, Graphed)
    assert passes.reason == ""
    assert passes.num_replayed > 24
    assert found["auto"] == found["off"]


class Around(nn.Module):
    """A model with dropout, and something that its forward does."""

    def __init__(self, also: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.also = MLP((1, 8, 8), 10, hidden=(16,), dropout=0.1), also

    def forward(self, inputs: Tensor) -> Tensor:
        return self.also(self.inner(inputs))


def read(outputs: Tensor) -> Tensor:
    return outputs * (1.0 if outputs.sum().item() < 1e9 else 2.0)


def draw_on_the_host(outputs: Tensor) -> Tensor:
    return outputs * float(np.random.random())


def synchronize(outputs: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return outputs


def draw_on_the_device(outputs: Tensor) -> Tensor:
    return outputs * torch.rand_like(outputs)


@needs_cuda
@pytest.mark.parametrize(
    ("also", "reason"),
    [
        (read, "waits for the GPU"),
        (draw_on_the_host, "draws random numbers on the host|two eager computations"),
        (synchronize, "waits for the GPU|the capture failed"),
        (draw_on_the_device, ""),
    ],
)
def test_what_no_graph_can_do_is_named_and_training_goes_on(also: Callable[[Tensor], Tensor], reason: str) -> None:
    found = {}
    for graphs in ("off", "auto"):
        model = Around(also)
        np.random.seed(0)
        trainer = mbgd.Trainer(
            model,
            mbgd.CrossEntropy(),
            ADAMW(model.parameters()),
            mbgd.Data(train=images()),
            mbgd.Settings(batch=mbgd.Batch(20, 10), steps=10, cuda_graphs=graphs),  # type: ignore[arg-type]
            alone("cuda"),
        )
        found[graphs] = graph_bits(trainer)
    passes = trainer.train_step.passes
    assert isinstance(passes, Graphed)
    assert re.search(reason, passes.reason) if reason else passes.reason == ""
    assert (passes.num_replayed > 0) == (not reason)
    assert found["auto"] == found["off"]
    # Nothing is left of a broken capture, in which memory that two streams have used would not be freed.
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    values = torch.zeros(2**20, device="cuda")
    values.record_stream(torch.cuda.Stream())
    del values
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")  # an allocation first frees what was waited for
    assert torch.cuda.memory_stats()["active_bytes.all.current"] <= before


# Snapshots, precisions, going on


@on_devices
@pytest.mark.parametrize("fused", [True, False])
def test_snapshots_do_not_tear_while_training_goes_on(device: str, fused: bool) -> None:
    torch.use_deterministic_algorithms(True)  # so that another run on a GPU repeats its bits
    optimizer = partial(torch.optim.AdamW, lr=0.01, fused=fused)  # not fused: it counts steps on the host
    trainer = make_trainer(alone(device), "cnn with BatchNorm", optimizer=optimizer, steps=30, log_every_steps=100)
    shards = trainer.setup.loader.shards(0, 29)
    kept = []
    for shard in shards:
        trainer.train_step(shard)
        trainer.state.step = shard.step + 1
        if shard.step % 5 == 4:
            kept.append((state(trainer), trainer.snapshot()))
    for wanted, snapshot in kept:
        for name, tensor in wanted.items():
            assert torch.equal(snapshot.tensors["model"][name], tensor), name
    assert not torch.equal(kept[0][0]["classifier.1.weight"], kept[1][0]["classifier.1.weight"])
    again = make_trainer(alone(device), "cnn with BatchNorm", optimizer=optimizer, steps=30, log_every_steps=100)
    again.restore(kept[2][1])
    for shard in again.setup.loader.shards(15, 20):
        again.train_step(shard)
    assert all(torch.equal(tensor, kept[3][0][name]) for name, tensor in state(again).items())
    torch.use_deterministic_algorithms(False)


@on_devices
def test_fp16_skips_steps_that_overflow_and_unscales_the_others(device: str) -> None:
    def train(precision: str, factor: float) -> tuple[mbgd.Trainer, mbgd.Result, dict[str, Tensor]]:
        optimizer = partial(torch.optim.SGD, lr=0.1, fused=True)
        trainer = make_trainer(
            alone(device), "cnn with BatchNorm", "ddp", precision, optimizer, steps=1, max_grad_norm=None
        )
        with torch.no_grad():
            trainer.setup.model.classifier[1].weight.mul_(factor)
        before = state(trainer)
        return trainer, trainer.fit(), before

    trainer, result, before = train("fp16", 3e4)
    assert result.num_skipped_steps == 1
    parameters = dict(trainer.setup.model.named_parameters())
    assert all(torch.equal(parameters[name].detach().cpu(), before[name]) for name in parameters)
    (trainer, result, before), (wanted, _, _) = train("fp16", 1.0), train("fp32", 1.0)
    assert result.num_skipped_steps == 0
    got, wanted_state = state(trainer), state(wanted)
    for name in parameters:
        change, wanted_change = got[name] - before[name], wanted_state[name] - before[name]
        # fp16 rounds; a loss scale that was left in, or taken out twice, would be a factor of 2 at least.
        assert float((change - wanted_change).norm()) <= 0.1 * float(wanted_change.norm()) + 1e-6, name


@on_devices
def test_a_first_step_that_fp16_skips_leaves_no_momentum(device: str) -> None:
    """torch's fused SGD begins with a momentum in memory as it is found."""
    found = []
    for fused in (True, False):
        trainer = make_trainer(alone(device), "mlp with dropout", "ddp", "fp16", partial(SGD, fused=fused), steps=3)
        weight = trainer.setup.model.layers[0].weight
        with torch.no_grad():
            weight.mul_(1e4)
        used = [torch.full(p.shape, math.nan, device=device) for p in trainer.setup.model.parameters()]
        del used  # memory that the momentum may get
        shards = trainer.setup.loader.shards(0, 3)
        trainer.train_step(next(shards))
        with torch.no_grad():
            weight.mul_(1e-4)
        for shard in shards:
            trainer.train_step(shard)
        assert trainer.train_step.update.num_skipped == 1
        found.append(state(trainer))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-5, msg=name)


@on_devices
def test_fused_sgd_takes_parameters_that_are_trained_later(device: str) -> None:
    torch.manual_seed(0)
    model = MLP((1, 8, 8), 10, hidden=(16,))
    before = model.layers[0].weight.detach().clone()
    mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        SGD(model.parameters()),
        mbgd.Data(train=images()),
        mbgd.Settings(batch=mbgd.Batch(20), steps=6),
        alone(device),
        observers=[mbgd.Freeze(["layers.0.*"], until=3)],
    ).fit()
    assert not torch.equal(model.layers[0].weight.detach().cpu(), before)


@on_devices
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns(device: str, precision: str) -> None:
    torch.manual_seed(0)
    model = MLP((1, 8, 8), 10)
    result = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
        mbgd.Data(train=digits("train"), evaluation=digits("test")),
        mbgd.Settings(epochs=1, batch=mbgd.Batch(100), precision=mbgd.Precision(precision)),
        alone(device),
    ).fit()
    assert result.metrics["eval/accuracy"] > 0.8


class Slowly:
    """A test's Stop that never stops, so that a kill comes in the middle."""

    def agreed(self, step: int) -> bool:
        time.sleep(0.01)
        return False


def train_or_go_on(rank: int, num_workers: int, port: int, device: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, num_workers, port)
    with start_workers("gloo", 60, device=device) as workers:
        trainer = make_trainer(workers, "cnn with BatchNorm", "reproducible", steps=100)
        kept = folder / "checkpoints"
        newest = workers.broadcast(str(checkpoint.newest(kept) or "") if workers.is_main else "")
        if newest:
            trainer.restore(checkpoint.read(Path(newest))[0])
        if workers.is_main:
            (folder / f"from-{trainer.state.step}").touch()
        keep = Checkpoint(every_steps=10, every_seconds=None)
        trainer.fit(checkpoints=saving.create(keep, folder, kept, {}, workers), stop=Slowly())
        if workers.is_main:
            (folder / "bits").write_text(trainer.weights_sha256())


@on_devices
def test_killed_workers_go_on_to_the_same_bits_on_another_number_of_workers(device: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        (folder / "checkpoints").mkdir(parents=True)
    with started(train_or_go_on, 2, device, broken) as processes:
        eventually(lambda: len(checkpoint.complete(broken / "checkpoints")) >= 2, 60)
        for process in processes:
            process.kill()
    assert not (broken / "bits").exists()
    for folder in (whole, broken):
        with started(train_or_go_on, 1, device, folder) as (process,):
            process.join(120)
            assert process.exitcode == 0
    steps = sorted(int(path.name.removeprefix("from-")) for path in broken.glob("from-*"))
    assert steps[0] == 0
    assert steps[1] >= 10
    assert (whole / "bits").read_text() == (broken / "bits").read_text()


# Of CUDA alone


@needs_cuda
def test_where_the_time_of_a_step_goes() -> None:
    metrics = make_trainer(alone("cuda"), "mlp with dropout", steps=50).fit().metrics
    seconds = {part: metrics[f"time/{part}_seconds"] for part in PARTS}
    assert min(seconds.values()) >= 0
    assert seconds["forward_backward"] > 0
    assert metrics["time/peak_memory_bytes"] > 0


@needs_cuda
def test_more_laps_than_events_are_kept() -> None:
    stopwatch = StreamStopwatch()
    for _ in range(5 * MOST_EVENTS):
        torch.cuda._sleep(20_000)  # cycles: several times as long as the host takes for a lap
        stopwatch.lap("optimizer")
        stopwatch.lap("rest")
    seconds = stopwatch.seconds()
    assert seconds["optimizer"] > seconds["rest"] > 0
    assert stopwatch.seconds() == {}


@needs_cuda
def test_conditions_name_what_bits_depend_on() -> None:
    trainer = make_trainer(alone("cuda"), "gpt", "reproducible")
    found = conditions(trainer.setup)
    assert found["processor"] == torch.cuda.get_device_name(0)
    assert found["fp32_matmul"] != "tf32"
    assert found["fp32_convolution"] != "tf32"
    assert found["cublas_workspace"] in cuda.DETERMINISTIC_WORKSPACES
    torch.use_deterministic_algorithms(False)


@needs_cuda
def test_nccl_takes_what_the_program_sends() -> None:
    """On one worker: that each call and dtype is accepted, and that the group connects at once."""
    device = torch.device("cuda", 0)
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        for dtype in (torch.float64, torch.float32, torch.int64, torch.uint8):
            values = torch.arange(4, device=device).to(dtype)
            dist.all_reduce(values)
            dist.all_reduce(values, dist.ReduceOp.MAX)
            dist.broadcast(values, src=0)
            gathered = [torch.empty_like(values)]
            dist.all_gather(gathered, values)
            assert gathered[0].tolist() == [0, 1, 2, 3]
        dist.barrier()
    finally:
        dist.destroy_process_group()


@needs_two_gpus
def test_nccl_on_all_gpus_gives_the_bits_of_one() -> None:
    num_gpus = min(torch.cuda.device_count(), 4)
    (wanted,) = run_workers(train_reproducibly, 1, ["fp32", "bf16"], device="cuda")
    for got in run_workers(train_reproducibly, num_gpus, ["fp32", "bf16"], device="cuda", backend="nccl"):
        assert got == wanted
    results = run_workers(use_every_collective, num_gpus, device="cuda", backend="nccl")
    assert [result["broadcast"] for result in results] == [["from", 0]] * num_gpus
