"""What of the way to a GPU a CPU can prove: choices, dtypes, sizes, seeds of what CUDA is told, and who is missing."""

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mbgd
import mbgd.averaging as averagings
from mbgd.averaging.host_memory.memory import CannotShareError
from mbgd.batches.reading import BLOCK_BYTES, BLOCK_EXAMPLES, Batches, most_at_once
from mbgd.cli.tools.compare import differing_conditions
from mbgd.measuring.garbage import ALL_EVERY_STEPS, YOUNG_EVERY_STEPS, collected_at_steps
from mbgd.models import GPT
from mbgd.step.update import _divide
from mbgd.workers import cuda, flight_recorder
from mbgd.workers.devices import choose_backend
from mbgd.workers.flight_recorder import Exchanges
from mbgd.workers.roll_call import Begun, Missing, Stuck, describe

from processes import run_workers

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("backend", "device", "num_gpus", "local_num_workers", "chosen"),
    [
        ("auto", "auto", 0, 2, ("gloo", "cpu")),
        ("auto", "auto", 2, 2, ("nccl", "cuda")),
        ("auto", "auto", 1, 2, ("gloo", "cpu")),
        ("auto", "cpu", 2, 2, ("gloo", "cpu")),
        ("auto", "cuda", 2, 2, ("nccl", "cuda")),
        ("auto", "cuda", 1, 3, ("gloo", "cuda")),  # three workers share a GPU
        ("gloo", "auto", 2, 2, ("gloo", "cpu")),
        ("gloo", "cuda", 1, 3, ("gloo", "cuda")),
        ("nccl", "auto", 2, 2, ("nccl", "cuda")),
        ("nccl", "cuda", 2, 1, ("nccl", "cuda")),
        ("nccl", "auto", 0, 1, "backend=nccl, but torch sees no GPU"),
        ("auto", "cuda", 0, 1, "backend.device=cuda, but torch sees no GPU"),
        ("nccl", "cpu", 2, 1, "nccl is for GPUs"),
        ("nccl", "auto", 2, 3, "backend=gloo backend.device=cuda"),
    ],
)
def test_backend_and_device(
    backend: str, device: str, num_gpus: int, local_num_workers: int, chosen: tuple[str, str] | str
) -> None:
    if isinstance(chosen, tuple):
        got = choose_backend(backend, device, num_gpus=num_gpus, local_num_workers=local_num_workers)
        assert got == chosen
    else:
        with pytest.raises(mbgd.UsageError, match=chosen):
            choose_backend(backend, device, num_gpus=num_gpus, local_num_workers=local_num_workers)


# What a step computes with


class Divisors(TorchDispatchMode):
    """Collects the dtypes of what gradients are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_foreach_div_" and isinstance(args[1], Tensor):
            self.dtypes += [(gradient.dtype, args[1].dtype) for gradient in args[0]]
        return func(*args, **(kwargs or {}))


def test_gradients_are_divided_by_their_own_dtype_to_the_same_bits() -> None:
    torch.manual_seed(0)
    weight = torch.tensor(1234.567891234, dtype=torch.float64)
    gradients = [torch.randn(50), torch.randn(9, dtype=torch.float64), torch.randn(7, 3)]
    wanted = [gradient / weight for gradient in gradients]
    with Divisors() as divisors:
        _divide(gradients, weight)
    assert len(divisors.dtypes) == 3
    assert all(dtype == of_divisor for dtype, of_divisor in divisors.dtypes)
    assert all(torch.equal(got, want) and got.dtype == want.dtype for got, want in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize(("num_tokens", "scale"), [(1, 2.0**14), (64, 2.0**8)])
def test_the_first_scale_in_fp16_counts_tokens(num_tokens: int, scale: float) -> None:
    """As if torch's first scale of 2^16 met a mean loss: 4 examples of so many tokens."""
    tokens = torch.randint(9, (8, num_tokens + 1), generator=torch.Generator().manual_seed(0))
    model = GPT((num_tokens,), 9, num_layers=1, num_heads=1, width=8)
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        mbgd.Data(train=mbgd.InMemory(tokens[:, :-1].clone(), tokens[:, 1:].clone())),
        mbgd.Settings(steps=1, batch=mbgd.Batch(4), precision=mbgd.Precision.fp16),
    )
    assert trainer.train_step.update.loss_scale().item() == scale
    assert trainer.fit().num_skipped_steps == 0


# What is exchanged


class FromElsewhere(mbgd.Workers):
    """Whose exchanges are staged, as a GPU's over gloo: torch tells cpu:0 from cpu."""

    @property
    def exchange_device(self) -> torch.device:
        return torch.device("cpu", 0)


def train_by_messages(workers: mbgd.Workers, sharding: str) -> tuple[str, str, list[int]]:
    def refuse(workers: mbgd.Workers) -> None:
        raise CannotShareError("this test sends messages")

    averagings.HostMemory = refuse  # type: ignore[assignment,misc]
    staged = FromElsewhere(**vars(workers))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
    inputs = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = mbgd.Trainer(
        model,
        mbgd.MeanSquaredError(),
        optimizer,
        mbgd.Data(train=mbgd.InMemory(inputs, inputs[:, :1].sin())),
        mbgd.Settings(
            epochs=2,
            batch=mbgd.Batch(12, 2),
            averaging=mbgd.Averaging(mbgd.AveragingName.reproducible),
            sharding=sharding,  # type: ignore[arg-type]
            max_grad_norm=0.1,
        ),
        staged,
    )
    trainer.fit()
    collected = staged.collect([torch.full((2,), workers.rank, dtype=torch.int16)])
    state = repr(optimizer.state_dict()["state"])
    return trainer.weights_sha256(), state, [int(tensor[0]) for tensor in collected]


@pytest.mark.parametrize("sharding", ["none", "optimizer"])
def test_messages_that_are_staged_give_the_same_bits(sharding: str) -> None:
    ((*wanted, _),) = run_workers(train_by_messages, 1, "none")
    results = run_workers(train_by_messages, 3, sharding)
    assert [bits for *bits, _ in results] == [wanted] * 3
    assert [collected for *_, collected in results] == [[0, 1, 2], [], []]


# What is read


class Recording:
    """Gathers examples of so many values, and remembers how many at once."""

    def __init__(self, num_values: int) -> None:
        self._num_values, self.sizes = num_values, []

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> Tensor:
        raise AssertionError("gathered")

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(indices))
        return torch.zeros(len(indices), self._num_values), indices


def test_blocks_of_examples_are_bounded_by_bytes() -> None:
    images = torch.empty(8, 3, 224, 224, device="meta")
    assert most_at_once((images, torch.empty(8, dtype=torch.int64)), 8) == 55  # 33 of 1,233 MB
    assert most_at_once((torch.empty(8, 784),), 8) == BLOCK_EXAMPLES
    for num_values, most in ((10, BLOCK_EXAMPLES), (2**18, BLOCK_BYTES // (2**20 + 8))):
        dataset = Recording(num_values)
        parts = [np.arange(start, start + 4) for start in range(0, 400, 4)]
        how: dict[str, Any] = {"num_workers": 0, "device": CPU, "dtype": torch.float32}
        read = [indices for _, indices in Batches(dataset, parts, own_copies=False, **how)]
        assert [indices.tolist() for indices in read] == [part.tolist() for part in parts]
        assert dataset.sizes[0] == 4  # by which their size is known
        assert max(dataset.sizes) <= most
        assert max(dataset.sizes) > most - 4 or sum(dataset.sizes[1:]) == dataset.sizes[1]


class Processes(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, float, Any]:
        return os.getpid(), float(np.random.rand()), np.float64(index)


def test_one_loader_serves_all_evaluations() -> None:
    batches = Batches(
        Processes(),
        [np.arange(start, start + 2) for start in (0, 2, 4, 6)],
        num_workers=1,
        device=CPU,
        dtype=torch.float32,
        keep_processes=True,
    )
    first, second = ([tuple(part.tolist() for part in batch) for batch in batches] for _ in range(2))
    assert first == second
    processes = {process for of_batch, *_ in first for process in of_batch}
    assert len(processes) == 1
    assert processes != {os.getpid()}
    (batch, *_) = batches
    assert batch[2].dtype is torch.float32  # of float64: rounded where it is read, so that a pinned copy follows


# Garbage


def test_garbage_is_collected_at_chosen_steps_and_nowhere_else() -> None:
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            collected.append(info["generation"])

    class Node:
        pass

    gc.callbacks.append(note)
    try:
        for _ in collected_at_steps(range(2 * YOUNG_EVERY_STEPS), ALL_EVERY_STEPS - YOUNG_EVERY_STEPS):
            assert not gc.isenabled()
            for _ in range(1000):
                node = Node()
                node.itself = node
        assert collected == [2, 1]
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.callbacks.remove(note)
    gc.disable()
    try:
        assert list(collected_at_steps(range(3), 0)) == [0, 1, 2]
        assert not gc.isenabled()  # as the user wanted it
    finally:
        gc.enable()


# CUDA's settings


def test_a_workspace_under_which_cublas_does_not_repeat_its_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.WORKSPACE, ":4096:2")
    with pytest.raises(mbgd.UsageError, match="CUBLAS_WORKSPACE_CONFIG=:4096:2"):
        cuda.make_deterministic()
    monkeypatch.delenv(cuda.WORKSPACE)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        cuda.make_deterministic()
        assert os.environ[cuda.WORKSPACE] in cuda.DETERMINISTIC_WORKSPACES
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = True


def test_compare_names_conditions_that_only_one_run_has() -> None:
    def run(**conditions: str) -> dict[str, Any]:
        summary = {"versions": {}, "conditions": conditions, "num_workers": 1}
        return {"summary": summary, "config": []}

    on_cpu, on_gpu = run(processor="CPU"), run(processor="H100", fp32_matmul="ieee")
    for a, b in ((on_cpu, on_gpu), (on_gpu, on_cpu)):
        found = " ".join(differing_conditions(a, b))
        assert "processor" in found
        assert "fp32_matmul" in found


# Who is missing


def begun() -> Begun:
    exchanges = flight_recorder.exchanges("gloo", named=True)
    assert exchanges is not None
    return Begun(exchanges.begun, exchanges.last)  # what is done, gloo's threads record when they come to it


def begin_one_more(workers: mbgd.Workers, folder: Path) -> tuple[Begun, Begun]:
    """Worker 0 begins an exchange before the other does; what each has begun by then, and in the end."""
    values, here, there = torch.ones(2, 3), folder / str(workers.rank), folder / str(1 - workers.rank)
    workers.sum_(values)
    work = dist.all_reduce(values, async_op=True) if workers.is_main else None
    before = begun()
    here.touch()
    deadline = time.monotonic() + 60
    while not there.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    if work is None:
        dist.all_reduce(values)
    else:
        work.wait()
    return before, begun()


def test_the_flight_recorder_tells_who_is_behind(tmp_path: Path) -> None:
    (ahead, one), (behind, other) = run_workers(begin_one_more, 2, tmp_path)
    assert ahead.number == behind.number + 1
    assert one == other == Begun(ahead.number, "all_reduce of Float [2, 3]")
    text = describe(Missing(lost=[], busy=[1], begun={0: ahead, 1: behind}), 60.0, "gloo: timed out")
    assert f"number {ahead.number} (all_reduce of Float [2, 3]) on worker 0; number {behind.number} (" in text
    assert "worker 1 does not come" in text


def test_the_exchange_that_a_dump_ends_with_is_named() -> None:
    """An entry as torch's recorder writes it; those of other groups and point-to-point ones are none of all workers."""
    entry = {
        "collective_seq_id": 7,
        "input_dtypes": ["Float", "Long", "Float", "Float", "Float"],
        "input_sizes": [[1000], [2, 3], [], [1], [1]],
        "is_p2p": False,
        "process_group": ["0", "default_pg"],
        "profiling_name": "nccl:all_reduce",
        "state": "scheduled",
    }
    others = [
        entry | {"collective_seq_id": 8, "is_p2p": True},
        entry | {"collective_seq_id": 9, "process_group": ["1", "b"]},
    ]
    status = {"last_enqueued_collective": 7, "last_completed_collective": 6}
    dump = {"pg_status": {"0": status}, "entries": [entry | {"collective_seq_id": 6}, *others, entry]}
    named = "all_reduce of Float [1000], Long [2, 3], Float [], 2 more"
    assert flight_recorder.read(json.dumps(dump)) == Exchanges(7, 6, named)
    dump["entries"] = dump["entries"][:-1]  # the recorder's memory is limited
    assert flight_recorder.read(json.dumps(dump)) == Exchanges(7, 6)


def test_workers_in_different_exchanges_are_told_from_a_cut_network() -> None:
    same = {rank: Begun(5, "barrier") for rank in range(20)}
    assert "network may have been cut" in describe(Missing([], [], same), 60.0, "gloo: timed out")
    text = describe(Missing([], [], same | {3: Begun(5, "all_reduce of Float [1]")}), 60.0, "gloo: timed out")
    assert "number 5 (barrier) on workers 0, 1, 2, 4, 5, 6, 7, 8, 11 more" in text
    assert "number 5 (all_reduce of Float [1]) on worker 3" in text


def test_a_dump_of_nccl_is_read() -> None:
    status = {"last_enqueued_collective": "7", "last_started_collective": "6", "last_completed_collective": "5"}
    assert flight_recorder.read(json.dumps({"pg_status": {"0": status}, "version": "2.10"})) == Exchanges(7, 5)
    assert flight_recorder.read(json.dumps({"version": "2.10"})) is None


def test_a_worker_is_stuck_once_the_same_exchange_is_waited_for_too_long() -> None:
    stuck = Stuck(0.2)
    assert not stuck.now(Exchanges(4, 3))
    assert not stuck.now(Exchanges(4, 3))
    time.sleep(0.3)
    assert not stuck.now(Exchanges(5, 4))  # it went on meanwhile
    time.sleep(0.3)
    assert stuck.now(Exchanges(5, 4))
    assert not stuck.now(Exchanges(5, 5))
    time.sleep(0.3)
    assert not stuck.now(Exchanges(5, 5))  # nothing is waited for
    assert not stuck.now(None)
