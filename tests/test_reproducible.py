"""averaging=reproducible: the same bits at every step on any number of workers."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mbgd
import mbgd.averaging as averagings
from mbgd.averaging import rounds
from mbgd.averaging.host_memory.memory import CannotShareError
from mbgd.averaging.tree import Counter, fold, worker_nodes
from mbgd.batches.plan import cut
from mbgd.config import AveragingName
from mbgd.data import digits
from mbgd.models import CNN, MLP, Linear, ResNet

from processes import run_workers

ROOT = Path(__file__).parent.parent
NUM_STEPS = 6
NUM_TOKENS, NUM_WORDS = 12, 20


# The tree alone


def left_to_right(left: Any, right: Any) -> Any:
    return (*left, "(", *right, ")")


@np.errstate(all="ignore")
def float_add(left: Any, right: Any) -> Any:
    return np.add(left, right)


@given(st.integers(1, 64), st.data())
def test_the_tree_is_the_same_expression_on_any_number_of_workers(num_leaves: int, data: st.DataObject) -> None:
    num_workers = data.draw(st.integers(1, num_leaves))
    values = np.array(data.draw(st.lists(st.floats(width=32), min_size=num_leaves, max_size=num_leaves)), np.float32)
    for leaves, add in ((values, float_add), ([(i,) for i in range(num_leaves)], left_to_right)):
        on_one = Counter[Any](add)
        for leaf in range(num_leaves):
            on_one.push(leaf, leaves[leaf])
        on_many: dict[Any, Any] = {}
        for rank in range(num_workers):
            counter = Counter[Any](add)
            for leaf in range(cut(num_leaves, num_workers, rank), cut(num_leaves, num_workers, rank + 1)):
                counter.push(leaf, leaves[leaf])
            assert [node for node, _ in counter.nodes] == worker_nodes(num_leaves, num_workers, rank)
            assert len(counter.nodes) <= 2 * max(1, (num_leaves - 1).bit_length())
            on_many |= dict(counter.nodes)
        one, many = (fold(nodes, num_leaves, add) for nodes in (dict(on_one.nodes), on_many))
        assert np.asarray(one).tobytes() == np.asarray(many).tobytes()


# Models


class Transformer(nn.Module):
    """Token numbers (N, T) → (N, T, NUM_WORDS), with dropout, attention and tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, 16)
        self.layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, dropout=0.1, batch_first=True)
        self.output = nn.Linear(16, NUM_WORDS, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.output(self.layer(self.embedding(tokens)))
        return outputs


class LSTM(nn.Module):
    """Token numbers (N, T) → (N, T, NUM_WORDS); the embedding is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, 8)
        self.embedding.weight.requires_grad_(False)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.output = nn.Linear(16, NUM_WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.output(self.lstm(self.embedding(tokens))[0])
        return outputs


class SometimesUsed(nn.Module):
    """`rare` takes part only in micro-batches that hold a bright example, `never` in none."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.rare, self.never = (nn.Linear(64, 10) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flatten(1)
        logits: Tensor = self.common(inputs)
        return logits + self.rare(inputs) if (inputs[:, 2] > 0.9).any() else logits


class Transposed(nn.Module):
    """A matrix that does not lie row by row in memory, and filters that lie channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        filters = (nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3))
        self.filters = nn.Sequential(*filters).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.linear = nn.Linear(4 * 16, 10)
        self.linear.weight = nn.Parameter(self.linear.weight.detach().t().contiguous().t())

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(torch.tanh(self.filters(inputs)).flatten(1))
        return outputs


class Tokens:
    """Sequences of uneven length: each token's target is the next one, weight 0 behind the end."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(NUM_WORDS, (300, NUM_TOKENS + 1), generator=generator)
        lengths = torch.randint(1, NUM_TOKENS + 1, (300, 1), generator=generator)
        self.weights = (torch.arange(NUM_TOKENS) < lengths).float()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.weights[index]

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.tokens[indices], self.weights[indices]


def next_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
    tokens, weights = batch
    logits = model(tokens[:, :-1])
    return mbgd.PerExample(F.cross_entropy(logits.movedim(-1, 1), tokens[:, 1:], reduction="none"), weights)


IMAGE = ((1, 8, 8), 10)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)
ADAMW = partial(torch.optim.AdamW, lr=0.01, fused=True)


@dataclass(frozen=True)
class Case:
    name: str
    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[..., torch.optim.Optimizer] = SGD
    tokens: bool = False
    size: int = 97
    micro_batch_size: int | None = None  # 8 micro-batches
    max_grad_norm: float | None = None
    precision: str = "fp32"


CASES = [
    Case("linear", partial(Linear, *IMAGE)),
    Case("linear fp64", partial(Linear, *IMAGE), precision="fp64", make_optimizer=ADAMW),
    Case("mlp with dropout, clipped", partial(MLP, *IMAGE, dropout=0.3), max_grad_norm=0.1),
    Case("mlp, AdamW, clipped", partial(MLP, *IMAGE, dropout=0.1), ADAMW, max_grad_norm=0.1),
    Case("mlp, bf16", partial(MLP, *IMAGE), precision="bf16"),
    Case("cnn", partial(CNN, *IMAGE, channels=(4, 8)), ADAMW),
    Case("cnn with BatchNorm", partial(CNN, *IMAGE, channels=(4, 8), batch_norm=True), size=100),
    Case(
        "cnn with BatchNorm, micro-batches of 9",
        partial(CNN, *IMAGE, channels=(4, 8), batch_norm=True),
        size=100,
        micro_batch_size=9,
    ),
    Case("resnet", partial(ResNet, *IMAGE, depth=8, width=4), size=100, micro_batch_size=13),
    Case("transformer with dropout and tied embeddings", Transformer, ADAMW, tokens=True),
    Case("lstm with a frozen embedding", LSTM, SGD, tokens=True, max_grad_norm=1.0),
    Case("parameters used sometimes or never", SometimesUsed, ADAMW),
    Case("parameters with other strides", Transposed, ADAMW),
    Case("micro-batches of 1", partial(MLP, *IMAGE), size=11, micro_batch_size=1),
]


def train(
    workers: mbgd.Workers, case: Case, averaging: str = "reproducible"
) -> list[tuple[str, str, dict[str, float]]]:
    """After every step: hashes of the parameters and buffers, and of the optimizer's state; what was logged."""
    torch.manual_seed(0)
    torch.rand(workers.rank + 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.make_model()
    data = (
        mbgd.Data(train=Tokens(), evaluation=Tokens())
        if case.tokens
        else mbgd.Data(train=digits("test"), evaluation=digits("test"))
    )
    optimizer = case.make_optimizer([p for p in model.parameters() if p.requires_grad])
    trainer = mbgd.Trainer(
        model,
        next_token if case.tokens else mbgd.CrossEntropy(),
        optimizer,
        data,
        mbgd.Settings(
            steps=NUM_STEPS,
            batch=mbgd.Batch(case.size, case.micro_batch_size),
            precision=mbgd.Precision(case.precision),
            averaging=mbgd.Averaging(AveragingName(averaging)),
            max_grad_norm=case.max_grad_norm,
            log_every_steps=1,
            evaluation=mbgd.Evaluation(every_steps=2, batch_size=50),
            noise_scale=mbgd.NoiseScale(every_steps=1),
        ),
        workers,
    )
    records: list[tuple[str, str, dict[str, float]]] = []

    class Record:
        def progress(self, step: int) -> None:
            state = optimizer.state_dict()["state"]
            moments = [value for _, of_parameter in sorted(state.items()) for value in of_parameter.values()]
            records.append((digest(model.state_dict().values()), digest(moments), {}))

        def log(self, step: int, metrics: dict[str, float]) -> None:
            records[-1][2].update({k: v for k, v in metrics.items() if not k.startswith("time/")})

        def close(self) -> None:
            pass

    trainer.fit(Record())
    return records


def digest(tensors: Any) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


def train_cases(workers: mbgd.Workers, cases: list[Case], averaging: str, transport: str) -> list[Any]:
    if transport != "shared memory":  # as where workers are on several hosts
        averagings.HostMemory = no_memory  # type: ignore[misc, assignment]
    if transport == "gloo, always in rounds":
        rounds.MOST_PEERS = 1
    return [train(workers, case, averaging) for case in cases]


def no_memory(workers: mbgd.Workers) -> None:
    raise CannotShareError("the test wants none")


@cache
def trained(num_workers: int, averaging: str = "reproducible", transport: str = "shared memory") -> list[list[Any]]:
    """For each worker, for each case: its records."""
    return run_workers(train_cases, num_workers, CASES, averaging, transport)


@pytest.mark.parametrize(
    ("transport", "num_workers"),
    [
        *itertools.product(["shared memory", "gloo"], [2, 3, 4, 5, 7, 8]),
        ("gloo, always in rounds", 6),
        ("gloo, always in rounds", 8),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_bits_after_every_step(case: Case, transport: str, num_workers: int) -> None:
    index = CASES.index(case)
    wanted = trained(1)[0][index]
    assert len({weights for weights, _, _ in wanted}) == NUM_STEPS
    assert {"eval/loss", "train/gradient_variance", "train/update_ratio"} <= wanted[-1][2].keys()
    for rank, of_worker in enumerate(trained(num_workers, transport=transport)):
        for step, (got, expected) in enumerate(zip(of_worker[index], wanted, strict=True), 1):
            assert got == expected, f"worker {rank} of {num_workers}, step {step}"


def test_control_ddp_gives_other_bits_on_other_numbers_of_workers() -> None:
    two, three = (trained(num_workers, "ddp")[0][2] for num_workers in (2, 3))
    assert two[-1][0] != three[-1][0]


def train_small(workers: mbgd.Workers) -> Any:
    return train(workers, Case("minibatch of 3", partial(MLP, *IMAGE), size=3))


def test_a_minibatch_smaller_than_the_number_of_micro_batches() -> None:
    wanted = run_workers(train_small, 1)
    for num_workers in (2, 3):
        for got in run_workers(train_small, num_workers):
            assert got == wanted[0]


def too_many_workers(workers: mbgd.Workers) -> list[str]:
    told = []
    for case in (
        Case("minibatch of 2", partial(MLP, *IMAGE), size=2),
        Case("2 micro-batches of 8", partial(MLP, *IMAGE), size=16, micro_batch_size=8),
    ):
        with pytest.raises(mbgd.UsageError) as caught:
            train(workers, case)
        told.append(str(caught.value))
    return told


def test_more_workers_than_micro_batches_are_refused() -> None:
    """Smaller micro-batches are named as the remedy only where there are enough examples for them."""
    for small, large in run_workers(too_many_workers, 3):
        both = "averaging=reproducible with 3 workers and 2 micro-batches; a worker takes whole micro-batches. "
        assert small == f"{both}Use fewer workers: a minibatch has 2 examples."
        assert large == f"{both}Use fewer workers, or smaller micro-batches with batch.micro_batch_size=5."


class OwnNoise(nn.Module):
    """Draws from a generator that nobody keys."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(64, 10)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flatten(1)
        outputs: Tensor = self.output(inputs + torch.rand(inputs.shape, generator=self.generator))
        return outputs


def test_a_forward_that_cannot_be_repeated_is_refused() -> None:
    with pytest.raises(mbgd.UsageError, match="two computations of the same examples differ"):
        train(mbgd.Workers(), Case("own noise", OwnNoise))


class Put(nn.Module):
    """Uses an operation of which torch has no deterministic version."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.output(inputs.flatten(1))
        return outputs + torch.zeros(10).put_(torch.tensor([1, 1]), torch.ones(2))


def test_operations_that_are_not_deterministic_are_named() -> None:
    with pytest.raises(mbgd.UsageError, match=r"put_.*averaging=ddp"):
        train(mbgd.Workers(), Case("put", Put))


def test_the_same_weights_on_any_number_of_workers_through_the_command_line(tmp_path: Path) -> None:
    folders = [tmp_path / f"on{num_workers}" for num_workers in (1, 2, 3)]
    for num_workers, folder in enumerate(folders, 1):
        train_command(num_workers, folder, "averaging=reproducible")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert [summary["num_workers"] for summary in summaries] == [1, 2, 3]
    assert len({summary["weights_sha256"] for summary in summaries}) == 1
    assert summaries[0]["conditions"]["threads_per_worker"] == 1
    records = [json.loads(line) for line in (folders[2] / "metrics.jsonl").read_text().splitlines()]
    assert {"train/examples_sha256", "eval/weights_sha256"} <= {name for record in records for name in record}
    for other in folders[1:]:
        done = compare(folders[0], other)
        assert done.returncode == 0, done.stderr
        assert "same bits" in done.stdout

    train_command(2, tmp_path / "other", "averaging=reproducible", "seed=1")
    done = compare(folders[0], tmp_path / "other")
    assert done.returncode == 1
    assert "step 1" in done.stdout


def train_command(num_workers: int, folder: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers)]
    command += [str(ROOT / "train.py"), "epochs=1", "batch.size=97", "log_every_steps=1", f"run.dir={folder}"]
    threads = str(4 if num_workers == 1 else 1)  # as torchrun leaves them on four cores; the bits must not follow
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def compare(*folders: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mbgd", "compare", *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@settings(deadline=None)
@given(st.integers(1, 64))
def test_every_leaf_is_held_once(num_leaves: int) -> None:
    for num_workers in range(1, num_leaves + 1):
        nodes = [node for rank in range(num_workers) for node in worker_nodes(num_leaves, num_workers, rank)]
        leaves = [leaf for node in nodes for leaf in range(node.number << node.level, (node.number + 1) << node.level)]
        assert leaves == list(range(num_leaves))
