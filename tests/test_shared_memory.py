"""averaging=shared_memory: right sums whatever the gradients, errors that name who is gone, nothing left behind."""

import ctypes
import gc
import os
import random
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mbgd
import mbgd.averaging as averagings
from mbgd.averaging.host_memory import memory
from mbgd.averaging.host_memory.exchange import Exchange
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.averaging.shared_memory import PLACED_AT_ONCE_BYTES, in_order
from mbgd.averaging.start import start_alike
from mbgd.batches.plan import Plan
from mbgd.config import Averaging, AveragingName
from mbgd.data import digits
from mbgd.errors import WorkersLost
from mbgd.workers.group import start_workers

from processes import environment, eventually, run_workers, started

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
ROUNDS = 30


def gradients_of(seed: int, rank: int, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """What worker `rank` has in the round of that seed: seldom nothing, sometimes not for every parameter."""
    chance = random.Random(f"{seed} {rank}")
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    gradients = [torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype) for p in parameters]
    missing = chance.choice([0.0, 0.0, 0.3, 1.0])
    return [None if chance.random() < missing else gradient for gradient in gradients]


def random_parameters(seed: int) -> list[nn.Parameter]:
    """From none to tens of thousands of elements, several dtypes mixed, some in channels_last order."""
    chance = random.Random(seed)
    parameters = []
    for _ in range(chance.randint(1, 12)):
        shape = [chance.choice([1, 2, 3, 17, 64, 100]) for _ in range(chance.randint(0, 4))]
        if torch.Size(shape).numel() < 300_000:
            tensor = torch.zeros(shape, dtype=chance.choice(DTYPES))
            last = len(shape) == 4 and chance.random() < 0.5
            parameters.append(nn.Parameter(tensor.to(memory_format=torch.channels_last) if last else tensor))
    return parameters or [nn.Parameter(torch.zeros(0))]


def exchange_at_random(workers: mbgd.Workers, seeds: list[int]) -> list[list[list[Tensor | None]]]:
    """Every round's gradients after an exchange; the workers come late at random and spoil what they were given."""
    chance = random.Random(workers.rank)
    shared = HostMemory(workers)
    results = []
    for seed in seeds:
        parameters = random_parameters(seed)
        exchange = Exchange(parameters, 1, shared, rank=workers.rank)
        for number in range(ROUNDS):
            for parameter, gradient in zip(
                parameters, gradients_of(1000 * seed + number, workers.rank, parameters), strict=True
            ):
                parameter.grad = gradient
            if chance.random() < 0.1:
                time.sleep(chance.random() * 0.01)
            exchange([[p.grad for p in parameters]], [1] * workers.num_workers, in_order)
            results.append([None if p.grad is None else p.grad.clone() for p in parameters])
            if chance.random() < 0.5:  # as the division and clipping do
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("nan"))
    return results


@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_random_gradients_of_every_dtype_add_up_in_the_order_of_the_workers(num_workers: int) -> None:
    seeds = list(range(6))
    results = run_workers(exchange_at_random, num_workers, seeds)
    rounds = [(seed, number) for seed in seeds for number in range(ROUNDS)]
    for at, (seed, number) in enumerate(rounds):
        parameters = random_parameters(seed)
        of_workers = [gradients_of(1000 * seed + number, rank, parameters) for rank in range(num_workers)]
        for which, gradients in enumerate(zip(*of_workers, strict=True)):
            there = [gradient for gradient in gradients if gradient is not None]
            for rank in range(num_workers):
                got = results[rank][at][which]
                if not there:
                    assert got is None
                    continue
                wanted = torch.zeros_like(there[0])
                for gradient in there:
                    wanted = wanted + gradient
                assert got is not None
                assert torch.equal(got, wanted), (seed, number, which, rank)


def gather_many(workers: mbgd.Workers) -> bool:
    shared = HostMemory(workers)
    for number in range(200):
        values = torch.tensor([number, workers.rank], dtype=torch.float64)
        gathered = shared.all_gather(values)
        if [rows.tolist() for rows in gathered] != [[number, rank] for rank in range(workers.num_workers)]:
            return False
    return True


def test_small_values_are_gathered() -> None:
    assert run_workers(gather_many, 3) == [True] * 3


# Through the trainer


def wide() -> nn.Module:
    """Its first weight is moved into shared memory within the backward, the others in the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 700), nn.Tanh(), nn.Linear(700, 10))
    assert model[1].weight.nbytes * 2 >= PLACED_AT_ONCE_BYTES > model[3].weight.nbytes * 2
    return model


def trainer(workers: mbgd.Workers, averaging: str, model: nn.Module, **settings: Any) -> mbgd.Trainer:
    return mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
        mbgd.Data(train=digits("test"), evaluation=digits("test")),
        mbgd.Settings(**{"steps": 12, "averaging": Averaging(AveragingName(averaging)), **settings}),
        workers,
    )


def train_wide(workers: mbgd.Workers, averaging: str, micro_batch_size: int | None) -> Tensor:
    model = wide()
    trainer(
        workers,
        averaging,
        model,
        batch=mbgd.Batch(50, micro_batch_size),
        precision=mbgd.Precision.fp64,
        max_grad_norm=0.1,
    ).fit()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("micro_batch_size", [None, 7])
def test_large_gradients_are_moved_within_the_backward(micro_batch_size: int | None) -> None:
    wanted = train_wide(mbgd.Workers(), "ddp", None)
    first, *others = run_workers(train_wide, 3, "shared_memory", micro_batch_size)
    torch.testing.assert_close(first, wanted, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(first, other) for other in others)


def train_after_another(workers: mbgd.Workers, *averagings: str) -> Tensor:
    """One trainer after the other over the same model; the earlier ones are still there."""
    model = wide()
    trainers = []
    for averaging in averagings:
        trainers.append(trainer(workers, averaging, model, batch=mbgd.Batch(50, 7), precision=mbgd.Precision.fp64))
        trainers[-1].fit()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("averagings", [("shared_memory", "reproducible"), ("ddp", "shared_memory", "ddp")])
def test_several_trainers_of_one_model_do_not_meddle(averagings: tuple[str, ...]) -> None:
    (wanted,) = run_workers(train_after_another, 1, *averagings)
    for got in run_workers(train_after_another, 2, *averagings):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def count_mapped(workers: mbgd.Workers) -> tuple[int, int]:
    """Pieces that are mapped while a trainer is there, and after it has gone while its model has not."""
    model = wide()
    made = trainer(workers, "shared_memory", model)
    made.fit()
    there = Path("/proc/self/maps").read_text().count("memfd:mbgd")
    model.zero_grad()
    del made
    gc.collect()
    return there, Path("/proc/self/maps").read_text().count("memfd:mbgd")


def test_memory_goes_with_the_trainer() -> None:
    for there, after in run_workers(count_mapped, 2):
        assert there >= 4  # its own and the other's: semaphores and gradients
        assert after == 0


def start_unalike(workers: mbgd.Workers) -> tuple[list[float], str]:
    same_kind = nn.Linear(1, 3)
    nn.init.constant_(same_kind.weight, workers.rank + 1.0)
    for dtype in (torch.bool, torch.int16, torch.complex64):
        same_kind.register_buffer(str(dtype).removeprefix("torch."), torch.full((3, 2), workers.rank).to(dtype))
    start_alike(same_kind, workers)
    assert not any(buffer.any() for buffer in same_kind.buffers())
    with pytest.raises(mbgd.UsageError) as caught:
        trainer(workers, "shared_memory", nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=workers.rank == 0)))
    return same_kind.weight.flatten().tolist(), str(caught.value)


def test_every_worker_starts_with_the_main_ones_values_and_the_same_kind_of_model() -> None:
    for values, message in run_workers(start_unalike, 2):
        assert values == [1.0, 1.0, 1.0]
        assert "worker 1 has other parameters or buffers than worker 0" in message


# Where it cannot be


def describe_auto(workers: mbgd.Workers) -> str:
    return trainer(workers, "auto", wide()).train_step.averaging.describe()


def be_elsewhere(workers: mbgd.Workers) -> tuple[str, str, str]:
    """Every worker pretends to be on a host of its own."""
    memory._host = lambda: ["host", str(workers.rank)]  # type: ignore[assignment]
    with pytest.raises(mbgd.UsageError) as caught:
        trainer(workers, "shared_memory", wide())
    return (
        str(caught.value),
        describe_auto(workers),
        trainer(workers, "reproducible", wide()).train_step.averaging.describe(),
    )


def test_hosts_of_one_worker_are_refused_on_every_worker_and_auto_takes_ddp() -> None:
    for message, auto, reproducible in run_workers(be_elsewhere, 3):
        assert "workers 0 and 1 are on different hosts" in message
        assert "averaging=ddp" in message
        note = (
            "over gloo; not through shared memory: workers 0 and 1 are on different hosts, or in different containers"
        )
        assert auto == f"ddp {note}"
        assert reproducible == f"reproducible {note}"


def have_too_little(workers: mbgd.Workers) -> tuple[str, str, str]:
    """On one worker, the system gives memory for semaphores, but not for gradients."""
    if workers.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    with pytest.raises(mbgd.UsageError) as caught:
        trainer(workers, "shared_memory", wide())
    descriptions = []
    for averaging in ("auto", "reproducible"):
        made = trainer(workers, averaging, wide())
        assert made.fit().steps == 12
        descriptions.append(made.train_step.averaging.describe())
    return str(caught.value), *descriptions


def test_too_little_memory_is_told_on_every_worker_and_gloo_does_instead() -> None:
    for message, auto, reproducible in run_workers(have_too_little, 2):
        why = "worker 1 cannot: 210,176 bytes of shared memory cannot be allocated: File too large"
        assert f"averaging=shared_memory, but {why}" in message
        assert "Use averaging=ddp" in message
        assert auto == f"ddp over gloo; not through shared memory: {why}"
        assert reproducible.startswith("reproducible over gloo; not through shared memory: worker 1 cannot: ")


def test_memory_that_the_host_lacks_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would give it out, and then kill processes."""
    found = memory.available_bytes()
    assert found is not None
    assert 2**20 < found < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "available_bytes", lambda: 4095)
    with pytest.raises(OSError, match="4,096 bytes of shared memory cannot be allocated: 4,095 are available"):
        memory._make_file(4096)


def test_gpus_are_refused_and_one_worker_needs_nobody() -> None:
    plan = Plan(num_examples=8, minibatch_size=4, num_workers=2)
    with pytest.raises(mbgd.UsageError, match="averaging=shared_memory with workers on cuda"):
        averagings.prepare(Averaging(AveragingName.shared_memory), plan, torch.device("cuda"))
    for name in ("auto", "shared_memory"):
        result = trainer(mbgd.Workers(), name, wide()).fit()
        assert result.steps == 12


CLONE_NEWNS = 0x00020000
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18


def train_with_a_small_dev_shm(workers: mbgd.Workers) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
    assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=4k") == 0
    made = trainer(workers, "auto", wide())
    made.fit()
    return made.train_step.averaging.describe()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_small_dev_shm_does_not_matter() -> None:
    assert run_workers(train_with_a_small_dev_shm, 2) == ["shared_memory"] * 2


# Who can get at it, and what stays behind


def named_memory_of(pid: int) -> list[str]:
    """Files in /dev/shm that the process maps: those could outlive it. Other processes have theirs there, too."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line})


def mapped_and_open(workers: mbgd.Workers) -> tuple[int, list[str], list[str], list[str]]:
    """Mode of a piece; what of it is mapped; which files in memory are open once all have mapped it; named files."""
    descriptor = memory._make_file(100)
    mode = os.fstat(descriptor).st_mode & 0o777
    os.close(descriptor)
    made = trainer(workers, "shared_memory", wide())
    made.fit()
    mapped = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "mbgd" in line]
    open_files = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            open_files.append(str(link.readlink()))
        except FileNotFoundError:  # that of the listing itself
            continue
    held = [name for name in open_files if "mbgd" in name and "memfd" in name]
    return mode, mapped, held, named_memory_of(os.getpid())


def test_pieces_have_no_name_and_are_closed_to_others() -> None:
    for mode, mapped, still_open, in_dev_shm in run_workers(mapped_and_open, 2):
        assert mode == 0o600
        assert len(mapped) >= 4  # its own and the other's: semaphores and gradients
        assert set(mapped) == {"/memfd:mbgd (deleted)"}
        assert still_open == []
        assert in_dev_shm == []


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_another_user_can_open_nothing() -> None:
    descriptor = memory._make_file(100)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            os.open(path, os.O_RDONLY)
        except PermissionError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    os.close(os.open(path, os.O_RDWR))  # which this user can
    os.close(descriptor)


# Workers that go away


TIMEOUT_SECONDS = 3.0


def exchange_until_lost(rank: int, num_workers: int, port: int, folder: Path, victim: int, at: str, how: int) -> None:
    """The victim gives itself the signal in its 20th exchange; what the others are told goes into `folder`."""
    torch.set_num_threads(1)
    os.environ |= environment(rank, num_workers, port)
    try:
        with start_workers("gloo", TIMEOUT_SECONDS) as workers:
            parameter = nn.Parameter(torch.zeros(100_000))
            exchange = Exchange([parameter], 1, HostMemory(workers), rank=rank)
            for number in range(10_000):
                strikes = rank == victim and number == 20
                if strikes and at == "before":
                    os.kill(os.getpid(), how)
                parameter.grad = torch.full_like(parameter, float(rank + 1))
                fold = in_order
                if strikes and at == "between":
                    fold = partial(strike_first, how)
                exchange([[parameter.grad]], [1] * num_workers, fold)
                if not torch.all(parameter.grad == num_workers * (num_workers + 1) / 2):
                    (folder / f"wrong-{rank}").write_text(str(number))
    except WorkersLost as error:
        (folder / f"error-{rank}").write_text(f"{time.monotonic()} {error}")
        os._exit(1)


def strike_first(how: int, rows: list[Tensor]) -> Tensor:
    os.kill(os.getpid(), how)
    return in_order(rows)


@pytest.mark.parametrize(
    ("how", "at", "most_seconds", "reason"),
    [
        (signal.SIGKILL, "before", 1.5, "has ended"),
        (signal.SIGKILL, "between", 1.5, "has ended"),
        (signal.SIGSTOP, "between", TIMEOUT_SECONDS + 2, "it is stopped, or busy"),
    ],
)
def test_who_is_gone_is_named_and_no_sum_is_wrong(
    tmp_path: Path, how: signal.Signals, at: str, most_seconds: float, reason: str
) -> None:
    num_workers, victim = 3, 1
    with started(exchange_until_lost, num_workers, tmp_path, victim, at, how) as processes:
        eventually(lambda: gone(processes[victim].pid), 60)
        struck = time.monotonic()
        for rank in (0, 2):
            processes[rank].join(60)
            assert processes[rank].exitcode == 1
            when, message = (tmp_path / f"error-{rank}").read_text().split(maxsplit=1)
            assert float(when) - struck < most_seconds
            assert f"worker {victim} does not answer any more: process {processes[victim].pid} " in message
            assert reason in message
            assert "worker 0" not in message
            assert "worker 2" not in message
    assert not list(tmp_path.glob("wrong-*"))


NUM_KILLS = int(os.environ.get("MBGD_CHAOS_RUNS", "4"))


def exchange_for_ever(rank: int, num_workers: int, port: int, seed: int, folder: Path) -> None:
    """Exchanges of random parameters with random delays until the others are lost."""
    torch.set_num_threads(1)
    os.environ |= environment(rank, num_workers, port)
    chance = random.Random(f"{seed} {rank}")
    try:
        with start_workers("gloo", TIMEOUT_SECONDS) as workers:
            parameters = [p for more in range(5) for p in random_parameters(100 * seed + more)]
            exchange = Exchange(parameters, 1, HostMemory(workers), rank=rank)
            (folder / f"ready-{rank}").touch()
            while True:
                for parameter in parameters:
                    parameter.grad = torch.full_like(parameter, float(rank + 1))
                if chance.random() < 0.2:
                    time.sleep(chance.random() * 0.002)
                exchange([[p.grad for p in parameters]], [1] * num_workers, in_order)
                right = num_workers * (num_workers + 1) / 2
                if not all(p.grad is not None and torch.all(p.grad == right) for p in parameters):
                    (folder / f"wrong-{rank}").touch()
    except WorkersLost as error:
        (folder / f"error-{rank}").write_text(str(error))
        os._exit(1)


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    num_workers = chance.randint(2, 4)
    victim, how = chance.randrange(num_workers), signal.SIGSTOP if seed % 4 == 3 else signal.SIGKILL
    with started(exchange_for_ever, num_workers, seed, tmp_path) as processes:
        eventually(lambda: len(list(tmp_path.glob("ready-*"))) == num_workers, 60)
        time.sleep(chance.random() * 0.3)
        pid = processes[victim].pid
        assert pid is not None
        assert named_memory_of(pid) == []  # nothing that could be left behind
        os.kill(pid, how)
        for rank in set(range(num_workers)) - {victim}:
            processes[rank].join(TIMEOUT_SECONDS + 10)
            assert processes[rank].exitcode == 1
            assert f"worker {victim} does not answer any more" in (tmp_path / f"error-{rank}").read_text()
    assert not list(tmp_path.glob("wrong-*"))


def gone(pid: int | None) -> bool:
    """Whether the process is dead or stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZXT"
    except FileNotFoundError:
        return True
