"""Losses that look at several examples: plain torch's, on the whole minibatch, however it is cut."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd

from processes import run_workers

NUM_EXAMPLES, EPOCHS, LR = 22, 1, 0.2
AVERAGINGS = ("ddp", "shared_memory", "reproducible")


def data() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(NUM_EXAMPLES, 4, generator=generator, dtype=torch.float64)
    second = first + 0.5 * torch.randn(NUM_EXAMPLES, 4, generator=generator, dtype=torch.float64)
    weights = torch.arange(NUM_EXAMPLES) % 4 * 0.5  # some are 0
    return first, second, weights.double(), torch.arange(NUM_EXAMPLES) % 3


class Pairs:
    def __init__(self) -> None:
        self.columns = data()

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(column[index] for column in self.columns)

    def gather(self, indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(column[indices] for column in self.columns)


class Net(nn.Module):
    def __init__(self, *, spare: bool = False, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))
        self.norm = nn.BatchNorm1d(3) if batch_norm else nn.Identity()
        self.spare = nn.Linear(2, 2) if spare else None

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.layers(inputs))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(first), self.second(second)


class Plain:
    """A pair without parameters, and without weights."""

    def encode(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def losses(self, encodings: Tensor) -> mbgd.PerExample:
        return mbgd.PerExample(torch.cdist(encodings, encodings.roll(1, 0)).square().mean(1))


class Weighted(nn.Module):
    """Softmax over all examples of a minibatch, with a temperature and a head of its own, weights and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.log_t = nn.Parameter(torch.tensor(0.3))
        self.head = nn.Linear(3, 3)

    def encode(self, model: nn.Module, batch: Any) -> tuple[Tensor, ...]:
        first, second, weights, labels = batch
        return self.head(model(first)), model(second), weights, labels

    def losses(self, *encodings: Tensor) -> mbgd.PerExample:
        first, second, weights, labels = encodings
        logits = self.head(first) @ second.T * self.log_t.exp() + (labels[:, None] == labels).to(first.dtype)
        losses = F.cross_entropy(logits, torch.arange(len(first)), reduction="none")
        return mbgd.PerExample(losses, weights, {"largest": lambda: logits.detach().max(1).values})


class Normalised(nn.Module):
    """Buffers of its own: `losses` normalises the whole minibatch, and counts its examples and its calls."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))
        self.shared = shared

    def encode(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if self.shared:
            self.num_seen += 1
        return model(batch[0]), model(batch[1])

    def losses(self, *encodings: Tensor) -> mbgd.PerExample:
        first, second = encodings
        correlation = self.norm(first).T @ self.norm(second) / len(first)
        if self.training:
            self.num_seen += len(first)
            self.centre = 0.9 * self.centre + 0.1 * first.detach().mean(0)
        loss = (correlation - torch.eye(3)).square().sum() + (first - self.centre).square().mean()
        return mbgd.PerExample(loss.expand(len(first)))


@dataclass
class Case:
    model: Callable[[], nn.Module]
    objective: Callable[[], Any]
    size: int = 8  # minibatches of 8, 8 and 6: shards are uneven on 3 workers
    max_grad_norm: float | None = None


CASES = {
    "plain": Case(Net, Plain),
    "fewer examples than workers": Case(Net, Weighted, size=2),
    "weighted": Case(Net, Weighted, max_grad_norm=0.1),
    "unused parameters": Case(partial(Net, spare=True), Weighted),
    "buffers": Case(Net, Normalised),
    "views": Case(Net, partial(mbgd.InfoNCE, temperature=0.5)),
    "towers": Case(
        Towers, partial(mbgd.InfoNCE, temperature=0.5, learn_temperature=True, negatives="other", two_towers=True)
    ),
}


def made(case: Case) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model, objective = case.model().double(), case.objective()
    own = objective.double().parameters() if isinstance(objective, nn.Module) else ()
    return model, objective, torch.optim.SGD([*model.parameters(), *own], lr=LR, momentum=0.5)


def state(model: nn.Module, objective: Any) -> dict[str, Tensor]:
    of_objective = objective.state_dict() if isinstance(objective, nn.Module) else {}
    of_objective = {f"objective.{name}": value for name, value in of_objective.items()}
    return {name: value.detach().clone() for name, value in {**model.state_dict(), **of_objective}.items()}


def minibatches(size: int) -> list[tuple[Tensor, ...]]:
    return [
        tuple(column[start : start + size] for column in data())
        for _ in range(EPOCHS)
        for start in range(0, NUM_EXAMPLES, size)
    ]


def whole(case: Case) -> dict[str, Tensor]:
    """One process, plain torch, one backward for each minibatch."""
    model, objective, optimizer = made(case)
    for batch in minibatches(case.size):
        encodings = objective.encode(model, batch)
        terms = objective.losses(*([encodings] if isinstance(encodings, Tensor) else encodings))
        weights = torch.ones_like(terms.losses) if terms.weights is None else terms.weights
        optimizer.zero_grad()
        ((terms.losses * weights).sum() / weights.sum()).backward()
        if case.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
        optimizer.step()
    return state(model, objective)


def trainer_of(workers: mbgd.Workers, case: Case, averaging: str, size: int | None, **settings: Any) -> mbgd.Trainer:
    model, objective, optimizer = made(case)
    return mbgd.Trainer(
        model,
        objective,
        optimizer,
        mbgd.Data(train=Pairs(), evaluation=Pairs(), shuffle=False),
        mbgd.Settings(
            **{
                "epochs": EPOCHS,
                "batch": mbgd.Batch(size=case.size, micro_batch_size=size),
                "precision": "fp64",
                "averaging": mbgd.Averaging(name=averaging),  # type: ignore[arg-type]
                "max_grad_norm": case.max_grad_norm,
                "check": mbgd.Check(replicas_every_steps=1),
                "evaluation": mbgd.Evaluation(batch_size=9),  # three groups, of 7, 7 and 8 examples
                "log_every_steps": 1,
                **settings,
            }
        ),
        workers,
    )


def train(workers: mbgd.Workers) -> dict[tuple[str, str, int | None], tuple[dict[str, Tensor], dict[str, float]]]:
    """Every case in every averaging, with one micro-batch a worker and with several."""
    found = {}
    names = ["weighted", "buffers", "unused parameters"] if workers.num_workers == 2 else list(CASES)
    for name, case in ((name, CASES[name]) for name in names):
        for averaging in AVERAGINGS[workers.num_workers == 1 :]:  # alone, the first two are the same
            for size in (None, min(3, case.size - 1)):
                if averaging == "reproducible" and case.size < workers.num_workers:
                    continue  # refused: a worker takes whole micro-batches
                trainer = trainer_of(workers, case, averaging, size)
                metrics = trainer.fit().metrics
                found[name, averaging, size] = state(trainer.setup.model, trainer.setup.task.given_objective), metrics
                torch.use_deterministic_algorithms(False)
    return found


@pytest.fixture(scope="module")
def trained() -> dict[int, Any]:
    return {number: run_workers(train, number) for number in (1, 2, 3)}


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_the_whole_minibatch_in_plain_torch(trained: dict[int, Any], name: str) -> None:
    wanted = whole(CASES[name])
    torch.manual_seed(1)
    num_compared = 0
    for num_workers, of_workers in trained.items():
        for found in of_workers:
            for how, (parameters, _) in found.items():
                if how[0] == name:
                    assert parameters.keys() == wanted.keys()
                    num_compared += 1
                    for key, value in wanted.items():
                        error = (parameters[key] - value).double().norm() / value.double().norm().clamp(min=1e-3)
                        assert error <= 1e-12, (num_workers, how, key)
    assert num_compared >= 4 + 3 * (4 if CASES[name].size < 3 else 6)
    start = state(*made(CASES[name])[:2])
    assert all((wanted[key] - start[key]).norm() > 1e-3 for key in ("layers.0.weight", "first.weight") if key in wanted)


@pytest.mark.parametrize("name", ["weighted", "views"])
def test_losses_and_metrics_are_those_of_the_whole_minibatch_and_of_each_evaluated_group(
    trained: dict[int, Any], name: str
) -> None:
    runs = [run for of_workers in trained.values() for one in of_workers for run in one.items()]
    found = [metrics for how, (_, metrics) in runs if how[0] == name]
    model, objective, _ = made(CASES[name])
    at_end = trained[1][0][name, "reproducible", None][0]
    model.load_state_dict({key: value for key, value in at_end.items() if not key.startswith("objective.")})
    if isinstance(objective, nn.Module):
        own = {k.removeprefix("objective."): v for k, v in at_end.items() if k.startswith("objective.")}
        objective.load_state_dict(own)
    sums = torch.zeros(2, dtype=torch.float64)
    for rows in torch.arange(NUM_EXAMPLES).split([7, 7, 8]):
        terms = objective.losses(*objective.encode(model, tuple(column[rows] for column in data())))
        weights = torch.ones_like(terms.losses) if terms.weights is None else terms.weights
        sums += torch.stack([(weights * terms.losses).sum(), weights.sum()]).detach()
    for metrics in found:
        assert metrics["eval/loss"] == pytest.approx(float(sums[0] / sums[1]), rel=1e-12)
        own = {"weighted": "train/largest", "views": "train/accuracy"}[name]
        for key in ("train/loss", "train/gradient_norm", own, own.replace("train", "eval")):
            assert metrics[key] == pytest.approx(found[0][key], rel=1e-11), key


def images() -> mbgd.InMemory:
    generator = torch.Generator().manual_seed(0)
    return mbgd.InMemory(torch.randn(52, 1, 4, 4, generator=generator), torch.zeros(52))


def random_trainer(workers: mbgd.Workers, **settings: Any) -> mbgd.Trainer:
    """Draws everywhere, and statistics of BatchNorm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))
    objective = mbgd.InfoNCE(learn_temperature=True, augment=mbgd.RandomCrops())
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=0.01)
    settings = {"batch": mbgd.Batch(size=18), "averaging": mbgd.Averaging(name="reproducible"), **settings}  # type: ignore[arg-type]
    return mbgd.Trainer(
        model, objective, optimizer, mbgd.Data(train=images()), mbgd.Settings(epochs=3, **settings), workers
    )


def bits(workers: mbgd.Workers, recompute: int | None) -> str:
    trainer = random_trainer(workers, check=mbgd.Check(recompute_every_steps=recompute))
    trainer.fit()
    buffers = [float(one.double().sum()) for one in trainer.setup.model.buffers()]
    return f"{trainer.weights_sha256()} {buffers}"


def test_reproducible_averaging_gives_the_same_bits_on_any_number_of_workers() -> None:
    """8 workers have one micro-batch each, and make one pass; with fewer, each makes two."""
    found = {one for number in (1, 2, 3) for one in run_workers(bits, number, 1)}
    assert found == set(run_workers(bits, 8, None))
    assert len(found) == 1


def half(workers: mbgd.Workers) -> dict[str, dict[str, float]]:
    trainers = {one: trainer_of(workers, CASES["views"], "ddp", 3, precision=one, steps=1) for one in ("fp32", "fp16")}
    return {one: trainer.fit().metrics for one, trainer in trainers.items()}


def test_fp16_comes_near() -> None:
    """bf16 is a case of `verify`, which knows how far rounding alone goes."""
    for found in run_workers(half, 2):
        for key in ("train/loss", "train/gradient_norm"):
            assert found["fp16"][key] == pytest.approx(found["fp32"][key], rel=0.03)
            assert found["fp16"][key] != found["fp32"][key]


def resumed(workers: mbgd.Workers, name: str) -> dict[str, Tensor]:
    first = trainer_of(workers, CASES[name], "ddp", 3, steps=3)
    first.fit()
    second = trainer_of(workers, CASES[name], "ddp", 3)
    second.restore(first.snapshot())
    second.fit()
    return state(second.setup.model, second.setup.task.given_objective)


@pytest.mark.parametrize("name", ["buffers"])
def test_a_resumed_run_goes_on(name: str) -> None:
    wanted = whole(CASES[name])
    for key, value in resumed(mbgd.Workers(), name).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-12, atol=1e-12)


class Counting(Net):
    num_calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.num_calls += self.training
        return super().forward(inputs)


def test_one_micro_batch_is_encoded_once_and_several_are_encoded_twice() -> None:
    for size, a_step in ((None, 1), (8, 1), (3, 2 * 3), (1, 2 * 8)):
        trainer = trainer_of(mbgd.Workers(), Case(Counting, Plain), "ddp", size, steps=2)
        before = trainer.setup.model.num_calls
        trainer.fit()
        assert trainer.setup.model.num_calls - before == 2 * a_step


def of_micro_batch(model: nn.Module, batch: Any) -> mbgd.PerExample:
    """The same loss as an ordinary objective sees only a micro-batch of it."""
    return Plain().losses(Plain().encode(model, batch))


def test_an_ordinary_objective_gives_another_result_once_the_minibatch_is_cut() -> None:
    wanted = whole(CASES["plain"])
    for size, is_wrong in ((None, False), (3, True)):
        trainer = trainer_of(mbgd.Workers(), Case(Net, lambda: of_micro_batch), "ddp", size)
        trainer.fit()
        found = state(trainer.setup.model, None)
        error = max(float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted)
        assert (error > 0.01) is is_wrong
        assert is_wrong or error <= 1e-12


def test_the_noise_scale_is_not_measured() -> None:
    settings = {"noise_scale": mbgd.NoiseScale(every_steps=1)}
    trainer = trainer_of(mbgd.Workers(), CASES["plain"], "ddp", 3, **settings)
    assert trainer.train_step.noise_scale.describe() == "not measured: examples have no losses of their own"
    assert "noise_scale" not in trainer.fit().metrics


def unlike(workers: mbgd.Workers, objective: Any) -> str:
    try:
        trainer_of(workers, Case(Net, lambda: objective), "ddp", 3).fit()
    except mbgd.UsageError as error:
        return str(error)
    return ""


class Odd(Plain):
    def __init__(self, what: str) -> None:
        self.what = what
        self.generator = torch.Generator().manual_seed(0)

    def encode(self, model: nn.Module, batch: Any) -> Any:
        codes = model(batch[0])
        shown = {
            "mean": lambda: codes.mean(0),
            "scalar": lambda: (codes, torch.tensor(0.1)),
            "text": lambda: (codes, "text"),
            "nothing": lambda: None,
            "ragged": lambda: F.pad(codes, (0, len(codes) % 2)),
            "own draws": lambda: codes + torch.rand(codes.shape, generator=self.generator),
        }
        return shown.get(self.what, lambda: codes)()

    def losses(self, *encodings: Tensor) -> Any:
        terms = super().losses(encodings[0])
        if self.what == "tensor":
            return terms.losses
        if self.what == "mean of losses":
            return mbgd.PerExample(terms.losses.mean())
        return mbgd.PerExample(terms.losses.detach()) if self.what == "detached" else terms


class Late(Plain):
    """Draws of its own, long after the trial before training."""

    num_calls = 0

    def encode(self, model: nn.Module, batch: Any) -> Tensor:
        self.num_calls += 1
        return model(batch[0]) + max(0, self.num_calls - 12)


class Both(Plain):
    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        return self.losses(self.encode(model, batch))


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (Odd("mean"), "encode returned a tensor of shape (3,) for 4 examples"),
        (Odd("scalar"), "encode returned a tensor of shape () for 4 examples"),
        (Odd("text"), "encode returned a tuple of Tensor, str; it must return a tensor of shape (N, …)"),
        (Odd("nothing"), "encode returned a NoneType"),
        (Odd("ragged"), "encode returned float64 (N, 4) for one micro-batch, and float64 (N, 3) for others"),
        (Odd("own draws"), "A coupled objective encodes each example twice"),
        (Late(), "two computations of the same examples under the same key differ: encodings"),
        (Odd("tensor"), "losses returned Tensor; it must return mbgd.PerExample"),
        (Odd("mean of losses"), "objective returned a scalar loss"),
        (Odd("detached"), "losses do not depend on any"),
        (Normalised(shared=True), "encode and its losses both change the buffer objective.num_seen"),
        (Both(), "the objective Both has encode and losses, and can be called"),
    ],
    ids=lambda value: getattr(value, "what", type(value).__name__) if not isinstance(value, str) else "",
)
def test_what_cannot_be_right_is_refused(objective: Any, told: str) -> None:
    assert told in unlike(mbgd.Workers(), objective)


class Infinite(Pairs):
    """Example 13 has no finite encoding."""

    def __init__(self) -> None:
        super().__init__()
        self.columns[0][13] = torch.inf


def not_finite(workers: mbgd.Workers) -> str:
    model, objective, optimizer = made(Case(Net, Weighted))
    settings = mbgd.Settings(steps=3, batch=mbgd.Batch(size=8, micro_batch_size=3), precision="fp64")  # type: ignore[arg-type]
    data = mbgd.Data(train=Infinite(), shuffle=False)
    with pytest.raises(mbgd.UsageError) as caught:
        mbgd.Trainer(model, objective, optimizer, data, settings, workers).fit()
    return str(caught.value)


def test_the_example_that_spoils_all_losses_is_named() -> None:
    for told in run_workers(not_finite, 2):
        assert told.startswith("the loss is not finite at step 2; it is not for the examples 13."), told


def test_the_example_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs/coupled_losses.md").read_text()
    lines = page.split("    class Contrastive:")[1].split("\n\n    mbgd.Trainer")[0].splitlines()
    source = "class Contrastive:\n" + "\n".join(line.removeprefix("    ") for line in lines)
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    names: dict[str, Any] = {"torch": torch, "F": F, "mbgd": mbgd}
    exec(source, names)

    def of_page() -> Any:
        objective = names["Contrastive"]()
        encode = objective.encode
        objective.encode = lambda model, batch: encode(model, batch[:2])  # the page's data has nothing but pairs
        return objective

    case = Case(Net, of_page)
    trainer = trainer_of(mbgd.Workers(), case, "ddp", 3)
    trainer.fit()
    found, wanted = state(trainer.setup.model, None), whole(case)
    assert all((found[key] - wanted[key]).norm() <= 1e-12 * wanted[key].norm() for key in wanted)
