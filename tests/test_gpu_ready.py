"""What of the way to a GPU a CPU can prove: choices, dtypes, sizes, seeds of what CUDA is told, and who is missing.

And how micro-batches are replayed, with a stand-in for CUDA's graphs that does the work again.
"""

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_gpu import MODELS, Weighted, make_trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mbgd
import mbgd.averaging as averagings
from mbgd.averaging.host_memory.memory import CannotShareError
from mbgd.batches.reading import BLOCK_BYTES, BLOCK_EXAMPLES, Batches, most_at_once
from mbgd.checks.graphs import obstacles
from mbgd.cli.tools.compare import differing_conditions
from mbgd.config import CompileName, NoiseScale
from mbgd.measuring.garbage import ALL_EVERY_STEPS, YOUNG_EVERY_STEPS, collected_at_steps
from mbgd.models import GPT, MLP
from mbgd.runs.wording import plan_lines
from mbgd.step import graphed
from mbgd.step.graph import CannotRecordError, Graph, Outputs, difference, shape_of
from mbgd.step.graphed import Graphed
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


def where_norms_begin(workers: mbgd.Workers, num_features: int) -> tuple[set[int], list[float]]:
    """Places in memory of what `_foreach_norm` gets, counted from the start of the memory; and the norms."""

    def refuse(workers: mbgd.Workers) -> None:
        raise CannotShareError("this test sends messages")

    averagings.HostMemory = refuse  # type: ignore[assignment,misc]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(num_features, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
    inputs = torch.randn(24, num_features, generator=torch.Generator().manual_seed(0))
    trainer = mbgd.Trainer(
        model,
        mbgd.MeanSquaredError(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        mbgd.Data(train=mbgd.InMemory(inputs, inputs[:, :1].sin())),
        mbgd.Settings(
            steps=6,
            batch=mbgd.Batch(12, 2),
            averaging=mbgd.Averaging(mbgd.AveragingName.reproducible),
            max_grad_norm=0.1,
            noise_scale=NoiseScale(every_steps=1),
        ),
        workers,
    )
    places: set[int] = set()
    plain = torch._foreach_norm

    def noted(tensors: list[Tensor], *more: Any) -> Any:
        places.update(tensor.storage_offset() for tensor in tensors)
        return plain(tensors, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_norm", noted)
        trainer.fit()
    return places, trainer.train_step.noise_scale.values()["noise_scale"]


def test_norms_of_gradients_do_not_depend_on_where_a_bucket_holds_them() -> None:
    """On a GPU the alignment decides in which order a norm adds up."""
    ((_, wanted),) = run_workers(where_norms_begin, 1, 5)
    for places, norms in run_workers(where_norms_begin, 3, 5):
        assert places == {0}
        assert norms == wanted


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


# Micro-batches that are replayed


class Reruns:
    """In the place of CUDA's graphs: a replay does the work again, and leaves the results where the first were.

    As with CUDA's, buffers change without their `_version`, and a recording draws nothing from the generator.
    """

    def __init__(self, buffers: tuple[Tensor, ...] = ()) -> None:
        self._buffers = buffers
        self.num_warmed_up = self.num_recorded = self.num_replays = 0

    def warm_up(self, work: Callable[[], object]) -> None:
        self.num_warmed_up += 1
        for _ in range(2):
            work()

    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        self.num_recorded += 1
        with torch.random.fork_rng([]):
            outputs = work()

        def replay() -> None:
            self.num_replays += 1
            with torch.autograd._unsafe_preserve_version_counter(self._buffers):
                self.copy(work(), outputs)

        return outputs, replay

    def copy(self, new: Outputs, outputs: Outputs) -> None:
        outputs.losses.copy_(new.losses)
        for one, into in zip((new.weights, *new.gradients), (outputs.weights, *outputs.gradients), strict=True):
            assert (one is None) == (into is None)
            if one is not None and into is not None:
                into.copy_(one)


class Waits(Reruns):
    def warm_up(self, work: Callable[[], object]) -> None:
        super().warm_up(work)
        raise CannotRecordError("the forward waits for the GPU")


class Breaks(Reruns):
    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        super().record(work)
        raise RuntimeError("no memory is left\nmore of it")


CUT = {"batch": mbgd.Batch(14, 5), "steps": 24, "log_every_steps": 10, "noise_scale": NoiseScale(every_steps=7)}
"""60 examples in minibatches of 14: micro-batches of 4 and 5 examples, and a minibatch of 4 in each epoch's end."""


def replaying(trainer: mbgd.Trainer, recorder: Reruns | None = None) -> Graphed:
    """Let the trainer replay, although it trains on a CPU."""
    step, buffers = trainer.train_step, tuple(trainer.setup.model.buffers())
    eager, recorder = step.passes, recorder or Reruns(buffers)
    assert isinstance(eager, graphed.OnePass)
    wants = step._means.wants
    step.passes = Graphed(trainer.setup, step.averaging, step.update, eager, recorder, wants, lap=lambda part: None)
    return step.passes


def bits(trainer: mbgd.Trainer) -> tuple[str, str]:
    """Of the metrics and the state after training."""
    metrics = {k: v for k, v in trainer.fit().metrics.items() if not k.startswith("time/")}
    of_state = hashlib.sha256()
    for of_file in trainer.snapshot().tensors.values():
        for _, tensor in sorted(of_file.items()):
            of_state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    torch.use_deterministic_algorithms(False)
    return of_state.hexdigest(), repr(sorted(metrics.items()))


@pytest.mark.parametrize(
    ("name", "precision", "averaging", "weighted"),
    [
        ("mlp with dropout", "fp32", "ddp", False),
        ("mlp with dropout", "fp16", "ddp", False),
        ("mlp with dropout", "fp64", "reproducible", True),
        ("cnn with BatchNorm", "fp32", "ddp", True),
        ("cnn with BatchNorm", "bf16", "reproducible", False),
        ("gpt", "fp32", "reproducible", False),
        ("gpt", "bf16", "ddp", False),
        ("gpt", "bf16-true", "ddp", False),
    ],
)
def test_replayed_micro_batches_train_to_the_same_bits(
    name: str, precision: str, averaging: str, weighted: bool
) -> None:
    def make() -> mbgd.Trainer:
        objective = Weighted() if weighted else None
        return make_trainer(mbgd.Workers(), name, averaging, precision, objective=objective, **CUT)

    wanted = bits(make())
    trainer = make()
    recorder = Reruns(tuple(trainer.setup.model.buffers()))
    passes = replaying(trainer, recorder)
    assert bits(trainer) == wanted
    assert passes.reason == ""
    assert recorder.num_recorded == recorder.num_warmed_up == 2
    assert passes.num_replayed > 24
    assert recorder.num_replays > passes.num_replayed  # some only to be compared


def test_one_micro_batch_a_step_is_replayed_to_the_same_bits() -> None:
    def make() -> mbgd.Trainer:
        return make_trainer(mbgd.Workers(), "cnn with BatchNorm", **{**CUT, "batch": mbgd.Batch(20), "steps": 13})

    wanted, trainer = bits(make()), make()
    passes = replaying(trainer)
    assert bits(trainer) == wanted
    # The graph is recorded in step 3 and compared in step 4. Steps 10 and 13 are logged, and so eager.
    assert passes.num_replayed == len([5, 6, 7, 8, 9, 11, 12])


class Noisy(torch.optim.SGD):
    """Draws random numbers after the forward and the backward."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter in (one for group in self.param_groups for one in group["params"]):
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)


@pytest.mark.parametrize("recorder", [Reruns, Waits, Breaks])
def test_what_is_drawn_after_a_micro_batch_is_the_same(recorder: type[Reruns]) -> None:
    def make() -> mbgd.Trainer:
        how = {**CUT, "batch": mbgd.Batch(20), "steps": 8}
        return make_trainer(mbgd.Workers(), "mlp with dropout", optimizer=partial(Noisy, lr=0.01), **how)

    wanted, trainer = bits(make()), make()
    passes = replaying(trainer, recorder())
    assert bits(trainer) == wanted
    assert (passes.num_replayed > 0) == (recorder is Reruns)


def test_parameters_that_are_trained_later_have_graphs_of_their_own() -> None:
    def make() -> mbgd.Trainer:
        torch.manual_seed(0)
        model = MLP((1, 8, 8), 10, hidden=(16,), dropout=0.1)
        return mbgd.Trainer(
            model,
            mbgd.CrossEntropy(),
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            mbgd.Data(train=MODELS["mlp with dropout"][1]()),
            mbgd.Settings(batch=mbgd.Batch(20), steps=20, log_every_steps=10),
            observers=[mbgd.Freeze(["layers.0.*"], until=8), mbgd.EMA(0.9)],
        )

    wanted, trainer, recorder = bits(make()), make(), Reruns()
    passes = replaying(trainer, recorder)
    assert bits(trainer) == wanted
    assert passes.reason == ""
    assert recorder.num_recorded == 2
    assert passes.num_replayed > 8


def test_shapes_beyond_the_most_graphs_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 1)
    wanted = bits(make_trainer(mbgd.Workers(), "gpt", **CUT))
    trainer, recorder = make_trainer(mbgd.Workers(), "gpt", **CUT), Reruns()
    passes = replaying(trainer, recorder)
    assert bits(trainer) == wanted
    assert recorder.num_recorded == 1
    assert passes.num_replayed > 10
    monkeypatch.setattr(graphed, "MOST_COUNTED", 1)  # the two shapes take turns, and none comes three times in a row
    trainer, recorder = make_trainer(mbgd.Workers(), "gpt", **{**CUT, "batch": mbgd.Batch(9, 5)}), Reruns()
    replaying(trainer, recorder)
    trainer.fit()
    assert recorder.num_recorded == 0


class Differs(Reruns):
    """Its replays after the first `num_right` ones have another loss."""

    num_right = 0

    def copy(self, new: Outputs, outputs: Outputs) -> None:
        super().copy(new, outputs)
        if self.num_replays > self.num_right:
            outputs.losses[0] = torch.nextafter(outputs.losses[0], torch.tensor(torch.inf))


class DiffersLater(Differs):
    num_right = 20


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Waits, "the forward waits for the GPU"),
        (Breaks, "the recording failed: RuntimeError: no memory is left"),
        (Differs, "a replay has other bits than an eager computation: the losses"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_what_cannot_be_replayed_goes_on_eagerly_to_the_same_bits(
    name: str, recorder: type[Reruns], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = bits(make_trainer(mbgd.Workers(), name, **CUT))
    trainer = make_trainer(mbgd.Workers(), name, **CUT)
    passes = replaying(trainer, recorder(tuple(trainer.setup.model.buffers())))
    capsys.readouterr()
    assert bits(trainer) == wanted
    assert passes.reason == reason
    assert passes.num_replayed == 0
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "CUDA graphs" in line)
    assert told == f"note: no CUDA graphs after step 2: {reason}."


def test_a_graph_whose_bits_change_later_ends_the_run() -> None:
    trainer = make_trainer(mbgd.Workers(), "mlp with dropout", **CUT)
    replaying(trainer, DiffersLater())
    match = r"step 14: .* bits than computed eagerly: the losses. In step (7|10) they were equal.* Set cuda_graphs=off"
    with pytest.raises(mbgd.UsageError, match=match):
        trainer.fit()


class Around(nn.Module):
    """A model, and something that its forward does."""

    def __init__(self, also: Callable[["Around"], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.also = MLP((1, 8, 8), 10, hidden=(8,)), also
        self.register_buffer("count", torch.zeros(()))
        self.part = nn.Identity()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.inner(inputs) * (1.0 + self.also(self))
        return outputs


def assign(model: Around) -> float:
    model.count = model.count + 1.0
    return 0.0


def switch(model: Around) -> float:
    model.part.training = not model.part.training
    return 0.0


def draw(model: Around) -> float:
    return torch.rand((), generator=model.generator).item()


@pytest.mark.parametrize(
    ("also", "reason"),
    [
        (assign, "the forward assigns a buffer"),
        (switch, "the forward changes the mode of a module"),
        (draw, "two eager computations of a micro-batch differ in the losses"),
    ],
)
def test_forwards_with_effects_on_the_host_are_not_replayed(also: Callable[[Around], float], reason: str) -> None:
    model = Around(also)
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        mbgd.Data(train=MODELS["mlp with dropout"][1]()),
        mbgd.Settings(batch=mbgd.Batch(20), steps=8),
    )
    passes = replaying(trainer)
    trainer.fit()
    assert reason in passes.reason
    assert passes.num_replayed == 0


def test_a_hook_that_comes_later_is_called() -> None:
    trainer = make_trainer(mbgd.Workers(), "gpt", **CUT)
    passes = replaying(trainer)
    shards = trainer.setup.loader.shards(0, 9)
    for _ in range(5):
        trainer.train_step(next(shards))
    assert passes.num_replayed > 0
    called: list[int] = []
    trainer.setup.model.blocks[0].register_forward_hook(lambda *_: called.append(1))
    trainer.train_step(next(shards))
    assert len(called) == 3  # micro-batches of a step
    assert passes.reason == "the module blocks.0 (Block) has hooks, which a replay would not call"


def test_a_batch_that_is_not_tensors_alone_is_refused_by_name() -> None:
    tensor = torch.zeros(2, 3)
    shape = shape_of({"a": (tensor, tensor.T)}, CPU)
    assert shape == (("a[0]", (2, 3), torch.float32, (3, 1)), ("a[1]", (3, 2), torch.float32, (1, 3)))
    assert shape_of(tensor, CPU) != shape_of(tensor.double(), CPU) != shape_of(tensor[:1].double(), CPU)
    for batch, reason in (
        ({"a": [tensor, 3]}, r"the batch \(a\[1\]\) has a value of type int"),
        (tensor.to_sparse(), "a sparse one"),
        (tensor.clone().requires_grad_(), "requires a gradient"),
        (tensor.to("meta"), "on another device"),
    ):
        with pytest.raises(CannotRecordError, match=reason):
            shape_of(batch, CPU)
    with pytest.raises(CannotRecordError, match="gaps or overlaps"):
        Graph({"a": torch.zeros(1, 3).expand(2, 3)}, lambda batch: Outputs(batch["a"], None, ()), {}, dict)


def test_gradients_are_added_in_memory_of_their_own() -> None:
    """Where autograd would leave them: with the parameter's strides, and added up over micro-batches."""
    parameters = {
        "a": nn.Parameter(torch.ones(3, 2).T),
        "b": nn.Parameter(torch.ones(4)),
        "c": nn.Parameter(torch.ones(1)),
    }

    def compute(batch: Tensor) -> Outputs:
        return Outputs(batch.sum().view(1), None, (batch.expand(2, 3).contiguous(), batch[0].expand(4), None))

    class Recorder(Reruns):
        def copy(self, new: Outputs, outputs: Outputs) -> None:
            for one, into in zip(new.gradients, outputs.gradients, strict=True):
                if one is not None and into is not None:
                    into.copy_(one) if into.is_contiguous() else into[:1].copy_(one[:1])

    graph = Graph(torch.tensor([1.0, 2.0, 3.0]), compute, parameters, dict)
    graph.record(Recorder())
    graph.fill(torch.tensor([4.0, 5.0, 6.0]))
    graph.replay()
    graph.add_gradients()
    first = parameters["a"].grad
    assert first is not None
    assert first.stride() == parameters["a"].stride()
    assert first.tolist() == [[4.0, 5.0, 6.0]] * 2
    graph.fill(torch.tensor([10.0, 20.0, 30.0]))
    graph.replay()
    assert first.tolist() == [[4.0, 5.0, 6.0]] * 2  # until it is added to
    graph.add_gradients()
    assert parameters["a"].grad is first
    assert first.tolist() == [[14.0, 25.0, 36.0]] * 2
    assert parameters["b"].grad is not None
    assert parameters["b"].grad.tolist() == [14.0] * 4
    assert parameters["c"].grad is None


def test_a_difference_is_one_of_bits() -> None:
    nan, zero = torch.tensor([torch.nan]), torch.zeros(1)
    assert difference({"a": nan, "b": zero}, {"a": nan.clone(), "b": zero.clone()}) == ""
    assert difference({"a": nan, "b": zero}, {"a": nan, "b": -zero}) == "b"
    assert difference({"a": zero}, {"a": zero.double()}) == "a"
    assert difference({"a": zero}, {"a": zero, "c": zero}) == "c"


# Whether there are graphs at all


def test_on_a_cpu_auto_is_eager_with_the_same_bits_and_says_so() -> None:
    trainers = [make_trainer(mbgd.Workers(), "gpt", cuda_graphs=name, **CUT) for name in ("off", "auto")]
    plans = [plan_lines(trainer) for trainer in trainers]
    assert plans[1].pop("cuda graphs") == "none: the workers compute on a CPU"
    assert plans[0] == plans[1]
    off, auto = map(bits, trainers)
    assert off == auto


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compile": CompileName.blocks}, "compile=blocks"),
        ({"activation_checkpointing": mbgd.ActivationCheckpointing(["blocks.*"])}, "activation_checkpointing.layers"),
        ({"averaging": mbgd.Averaging(find_unused_parameters=True)}, "which parameters take part may differ"),
        ({"check": mbgd.Check(recompute_every_steps=5)}, "check.recompute_every_steps"),
        ({"log_every_steps": 1}, "log_every_steps=1"),
    ],
)
def test_settings_without_graphs_are_named(change: dict[str, Any], reason: str) -> None:
    setup = make_trainer(mbgd.Workers(), "gpt").setup
    on_cpu, named = obstacles(replace(setup, settings=replace(setup.settings, **change)), [])
    assert on_cpu == "the workers compute on a CPU"
    assert reason in named


class Stateful(nn.Identity):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_parts_without_graphs_are_named() -> None:
    def found(observers: list[str], **changed: Any) -> str:
        _, named = obstacles(replace(setup, **changed), observers)
        return named

    setup = make_trainer(mbgd.Workers(), "mlp with dropout").setup
    assert obstacles(setup, []) == ["the workers compute on a CPU"]
    assert found(["mine"]) == "the observer mine may change what a forward does"
    assert found([], workers=replace(setup.workers, num_workers=2)).startswith("2 workers exchange gradients by hooks")
    unused = replace(setup.findings, unused_parameters=("layers.0.weight",))
    assert found([], findings=unused).startswith("which parameters take part may differ")
    handle = setup.model.layers[0].register_forward_hook(lambda *_: None)
    assert found([]).startswith("the module layers.0 (Linear) has hooks")
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert found([]).startswith("all modules have a hook")
    handle.remove()
    setup.model.layers.append(Stateful())
    assert found([]).startswith("modules keep extra state on the host (layers.4._extra_state)")
    coupled = mbgd.InfoNCE(augment=mbgd.RandomCrops())
    setup = make_trainer(mbgd.Workers(), "mlp with dropout", objective=coupled).setup
    assert found([]).startswith("the objective looks at several examples at once")


@pytest.mark.parametrize("value", ["on", False, None])
def test_other_values_of_cuda_graphs_are_refused(value: Any) -> None:
    with pytest.raises(mbgd.UsageError, match=r"cuda_graphs=.*: it is one of off, auto"):
        mbgd.Settings(cuda_graphs=value)


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
