"""Hosts of several workers add up twice: right sums whatever the gradients and the numbers of workers of the hosts."""

import os
import random
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_accounted_for
import test_batch_norm
import test_evaluation_sets
import test_exactness
import test_noise_scale
import test_refused_by_name
import test_reproducible
import test_sharding
import test_sums
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_exactness import relative_error
from test_shared_memory import ROUNDS, gradients_of, random_parameters, trainer, wide
from torch import Tensor, nn

import mbgd
from mbgd.averaging.host_memory.between_hosts import BetweenHosts
from mbgd.averaging.host_memory.hosts_exchange import HostsExchange, TwoFolds
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.averaging.shared_memory import in_order
from mbgd.averaging.tree import Counter, worker_nodes
from mbgd.errors import WorkersLost
from mbgd.workers.group import start_workers

from process_hosts import hosts_started, needs_hosts, run_on_hosts
from processes import environment, eventually

pytestmark = needs_hosts

HOSTS = [(2, 2), (1, 3), (3, 2), (2, 1, 1)]
"""The numbers of workers of hosts."""


def exchange_at_random(workers: mbgd.Workers, num_hosts: int, seeds: list[int]) -> list[list[Tensor | None]]:
    """Every round's gradients after an exchange; the workers come late at random and spoil what they were given."""
    chance = random.Random(workers.rank)
    memory = HostMemory(workers)
    assert len(memory.hosts) == num_hosts
    between = BetweenHosts(memory)
    folds = TwoFolds(lambda rows: [in_order(rows)], in_order, (1,) * num_hosts)
    results: list[list[Tensor | None]] = []
    for seed in seeds:
        parameters = random_parameters(seed)
        exchange = HostsExchange(parameters, 1, between)
        for number in range(ROUNDS):
            if chance.random() < 0.1:
                time.sleep(chance.random() * 0.01)
            rows = [gradients_of(1000 * seed + number, workers.rank, parameters)]
            of_host = len(memory.members) * torch.tensor([1.0, number], dtype=torch.float64)
            rider = partial(torch.clone, of_host)
            notes, total = exchange(rows, [1] * workers.num_workers, folds, workers.rank, rider=rider)
            assert notes == list(range(workers.num_workers))
            assert total.tolist() == [workers.num_workers, number * workers.num_workers]
            results.append([None if p.grad is None else p.grad.clone() for p in parameters])
            if chance.random() < 0.5:  # as the division and clipping do
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("nan"))
    return results


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_random_gradients_of_every_dtype_add_up_by_host(hosts: tuple[int, ...]) -> None:
    seeds = list(range(6))
    results = run_on_hosts(exchange_at_random, hosts, len(hosts), seeds)
    ranks = [range(sum(hosts[:number]), sum(hosts[: number + 1])) for number in range(len(hosts))]
    rounds = [(seed, number) for seed in seeds for number in range(ROUNDS)]
    for at, (seed, number) in enumerate(rounds):
        parameters = random_parameters(seed)
        of_workers = [gradients_of(1000 * seed + number, rank, parameters) for rank in range(sum(hosts))]
        for which, parameter in enumerate(parameters):
            there = [of_worker[which] for of_worker in of_workers]
            filled = [torch.zeros_like(parameter) if gradient is None else gradient for gradient in there]
            of_hosts = [in_order([filled[rank].clone() for rank in of_host]) for of_host in ranks]
            for rank in range(sum(hosts)):
                got = results[rank][at][which]
                if all(gradient is None for gradient in there):
                    assert got is None
                else:
                    assert got is not None
                    assert torch.equal(got, in_order([one.clone() for one in of_hosts])), (seed, number, which, rank)


def gather_and_sum(workers: mbgd.Workers) -> bool:
    between = BetweenHosts(HostMemory(workers))
    for number in range(50):
        values = torch.tensor([number, workers.rank], dtype=torch.float64)
        everybody = [[number, rank] for rank in range(workers.num_workers)]
        if [rows.tolist() for rows in between.gather(values)] != everybody:
            return False
        if between.sum(values).tolist() != torch.tensor(everybody).sum(0).tolist():
            return False
    return True


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_small_values_are_gathered_and_added_up(hosts: tuple[int, ...]) -> None:
    assert run_on_hosts(gather_and_sum, hosts) == [True] * sum(hosts)


def count_bytes_sent(workers: mbgd.Workers) -> tuple[int, int]:
    """Of an exchange: what this worker hands to gloo, and the size of its gradients."""
    sent, send = [0], torch.distributed.isend

    def counted(values: Tensor, rank: int) -> Any:
        sent[0] += values.nbytes
        return send(values, rank)

    memory = HostMemory(workers)
    parameters = [nn.Parameter(torch.zeros(1000, 700)), nn.Parameter(torch.zeros(33, dtype=torch.float64))]
    exchange = HostsExchange(parameters, 1, BetweenHosts(memory))
    folds = TwoFolds(lambda rows: [in_order(rows)], in_order, (1,) * len(memory.hosts))
    torch.distributed.isend = counted  # type: ignore[assignment]
    exchange([[torch.ones_like(p) for p in parameters]], [1] * workers.num_workers, folds)
    assert all(bool((p.grad == workers.num_workers).all()) for p in parameters if p.grad is not None)
    return sent[0], sum(p.nbytes for p in parameters)


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_a_host_sends_what_one_worker_would(hosts: tuple[int, ...]) -> None:
    results = run_on_hosts(count_bytes_sent, hosts)
    share = 2 * (len(hosts) - 1) / len(hosts)  # a ring all-reduce with one worker per host
    for number, size in enumerate(hosts):
        first = sum(hosts[:number])
        sent = sum(of_worker for of_worker, _ in results[first : first + size])
        assert sent == pytest.approx(share * results[0][1], abs=1000)  # cache lines, parts of a line, notes


# Through the trainer

CASES = [replace(case, averaging="auto") for case in test_exactness.CASES_OF_DDP]


@pytest.fixture(scope="module", params=HOSTS, ids=str)
def trained(request: pytest.FixtureRequest) -> list[list[tuple[Tensor, list[str], list[float]]]]:
    """For each worker, for each case: parameters, their hashes after every step, logged losses."""
    return run_on_hosts(test_exactness.train_cases, request.param, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process_in_plain_torch(trained: Any, case: test_exactness.Case) -> None:
    parameters, of_main, losses = trained[0][CASES.index(case)]
    wanted, wanted_losses = test_exactness.expected(case)
    assert relative_error(parameters, wanted) <= 1e-12
    assert losses == pytest.approx(wanted_losses, rel=1e-11)
    assert len(of_main) == len(list(case.minibatches())) == len(set(of_main))
    for worker in trained:
        assert worker[CASES.index(case)][1] == of_main


def describe(workers: mbgd.Workers) -> list[str]:
    names = ("auto", "shared_memory", "reproducible", "ddp")
    return [trainer(workers, name, wide()).train_step.averaging.describe() for name in names]


def test_what_each_averaging_is_on_several_hosts() -> None:
    twice = "shared memory on each of 2 hosts, gloo between them"
    for descriptions in run_on_hosts(describe, (2, 1)):
        assert descriptions == [twice, twice, f"reproducible over {twice}", "ddp over gloo"]


def test_what_training_changes_equals_plain_torch() -> None:
    """Parameters frozen, unfrozen in a step or a forward, unused, of the objective, complex; hooks; buffers."""
    for averaging, micro_batch_size in (("auto", None), ("auto", 2), ("reproducible", 2)):
        for got in run_on_hosts(test_accounted_for.train_all, (2, 1), averaging, micro_batch_size):
            for name, wanted in test_accounted_for.WANTED.items():
                for key, value in wanted.items():
                    message = f"{averaging}: {name}: {key}: {got[name][key]}, right {value}"
                    assert torch.allclose(got[name][key], value, rtol=1e-11, atol=1e-13), message


@pytest.mark.parametrize("averaging", ["auto", "reproducible"])
def test_unfreezing_on_one_worker_alone_is_refused_on_all(averaging: str) -> None:
    for message in run_on_hosts(test_refused_by_name.unfreeze_on_one, (1, 2), averaging):
        assert "requires_grad of some parameters changed on worker 1, but not on worker 0, 2" in message


@pytest.mark.parametrize("averaging", ["auto", "reproducible"])
def test_a_gradient_that_is_not_finite_is_named_with_its_step(averaging: str) -> None:
    for message in run_on_hosts(test_refused_by_name.not_finite_of_workers, (2, 1), averaging):
        assert "The gradient of step 3 was not finite, although its loss was" in message
        assert "layer.weight" in message


def test_batch_norm_over_the_minibatch_equals_one_process() -> None:
    main, *others = run_on_hosts(test_batch_norm.train_all, (2, 1), "auto")
    for name in test_batch_norm.CASES:
        for key, value in test_batch_norm.plain_torch(name).items():
            least = 0.01  # a bias before another BatchNorm has no effect: its gradient is rounding alone
            error = (main[name][key] - value).abs().max() / value.abs().max().clamp(min=least)
            assert error <= 1e-12, f"{name}: {key}: {error}"
            assert all(torch.equal(other[name][key], main[name][key]) for other in others), (name, key)


@pytest.mark.parametrize("averaging", ["auto", "reproducible"])
def test_evaluations_have_their_exact_means(averaging: str) -> None:
    for _, error in run_on_hosts(test_evaluation_sets._train, (2, 1), averaging, True):
        assert error <= 1e-12


@pytest.mark.parametrize("averaging", ["auto", "reproducible"])
def test_the_same_bits_of_sums_beside_the_backward_and_after_it(averaging: str) -> None:
    results = run_on_hosts(test_sums.train_in_every_way, (2, 1), averaging, False)
    for of_worker in results:
        assert of_worker == results[0]
        assert all(len(set(of_cut)) == 1 for of_cut in of_worker)


def measure_noise(workers: mbgd.Workers, averaging: str) -> list[dict[str, float]]:
    return test_noise_scale.train(workers, mbgd.Batch(50, 7), averaging=averaging, has_weights=True, steps=3)


def test_the_noise_scale_is_that_of_one_worker() -> None:
    wanted = measure_noise(mbgd.Workers(), "auto")
    assert all("train/gradient_variance" in line for line in wanted)
    for got in run_on_hosts(measure_noise, (2, 1), "auto"):
        for line, of_one in zip(got, wanted, strict=True):
            assert line == pytest.approx(of_one, rel=1e-9)


def train_in(workers: mbgd.Workers, precision: str) -> Tensor:
    model = wide()
    trainer(workers, "auto", model, precision=mbgd.Precision(precision), batch=mbgd.Batch(50, 7)).fit()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_other_precisions_train_alike(precision: str) -> None:
    wanted = train_in(mbgd.Workers(), precision)
    first, *others = run_on_hosts(train_in, (2, 1), precision)
    torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_reproducible_has_the_bits_of_one_worker(hosts: tuple[int, ...]) -> None:
    cases, wanted = test_reproducible.CASES, test_reproducible.trained(1)[0]
    for of_worker in run_on_hosts(test_reproducible.train_cases, hosts, cases, "reproducible", "shared memory"):
        for case, got, of_one in zip(cases, of_worker, wanted, strict=True):
            assert got == of_one, case.name


@given(st.integers(1, 64), st.data())
def test_what_a_host_folds_are_the_nodes_of_its_leaves(num_leaves: int, data: st.DataObject) -> None:
    num_workers = data.draw(st.integers(1, 8))
    first = data.draw(st.integers(0, num_workers - 1))
    ranks = range(first, data.draw(st.integers(first + 1, num_workers)))
    counter = Counter[tuple[int, ...]](lambda left, right: (*left, *right))
    for rank in ranks:
        for node in worker_nodes(num_leaves, num_workers, rank):
            leaves = range(node.number << node.level, (node.number + 1) << node.level)
            counter.push_node(node, tuple(leaves))
    assert [node for node, _ in counter.nodes] == worker_nodes(num_leaves, num_workers, first, len(ranks))
    for node, leaves_of_node in counter.nodes:
        assert leaves_of_node == tuple(range(node.number << node.level, (node.number + 1) << node.level))


# Lost workers

TIMEOUT_SECONDS = 5.0


def train_until_lost(
    rank: int, num_workers: int, port: int, averaging: str, how: signal.Signals, victim: int, folder: Path
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, num_workers, port)
    try:
        with start_workers("gloo", TIMEOUT_SECONDS) as workers:
            settings: dict[str, Any] = {"steps": 10**9, "log_every_steps": 10**9}
            settings["evaluation"] = mbgd.Evaluation(every_steps=10**9)
            made = trainer(workers, averaging, wide(), **settings)
            if rank == victim:
                threading.Timer(random.uniform(0.3, 0.6), os.kill, (os.getpid(), how)).start()
            made.fit()
    except WorkersLost as error:
        (folder / f"error-{rank}").write_text(str(error))
        os._exit(1)  # as torchrun would end them, without waiting for the rest


@pytest.mark.parametrize(
    ("hosts", "averaging", "how", "victim"),
    [
        ((2, 2), "auto", signal.SIGKILL, 0),
        ((2, 2), "auto", signal.SIGKILL, 3),
        ((2, 2), "auto", signal.SIGSTOP, 1),
        ((3, 2), "auto", signal.SIGKILL, 2),
        ((2, 1, 1), "reproducible", signal.SIGKILL, 1),
        ((1, 3), "auto", signal.SIGSTOP, 0),
    ],
    ids=str,
)
def test_a_lost_worker_is_named_on_every_host(
    tmp_path: Path, hosts: tuple[int, ...], averaging: str, how: signal.Signals, victim: int
) -> None:
    survivors = sorted(set(range(sum(hosts))) - {victim})
    with hosts_started(train_until_lost, hosts, averaging, how, victim, tmp_path):
        eventually(lambda: len(list(tmp_path.glob("error-*"))) == len(survivors), 60)
    for rank in survivors:
        message = (tmp_path / f"error-{rank}").read_text()
        assert message.startswith(f"worker {victim} does not answer any more"), f"worker {rank}: {message}"


@pytest.mark.parametrize("transport", ["shared_memory", "reproducible"])
def test_sharding_changes_no_bit_on_hosts(transport: str) -> None:
    """Owners send their pieces to all, over all hosts."""
    cases = list(test_sharding.CASES)
    whole, pieces = (
        run_on_hosts(test_sharding.train_all, (2, 1), cases, transport, sharding, timeout_seconds=600)
        for sharding in ("none", "optimizer")
    )
    for of_worker in pieces:
        for case, wanted, got in zip(cases, whole[0], of_worker, strict=True):
            assert got[2].startswith("optimizer: each worker updates at most "), case.name
            assert got[:2] == wanted[:2], case.name
