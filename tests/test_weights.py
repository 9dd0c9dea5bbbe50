"""Weights over time: the moving average, the best evaluation's weights, and parameters that are frozen at first."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import mbgd

import runs
from processes import run_workers
from small_runs import StopAt

NUM_EXAMPLES, NUM_STEPS, SIZE = 22, 12, 5  # the last minibatch of an epoch has 2 examples
AVERAGINGS = ["ddp", "shared_memory", "reproducible"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.backbone(inputs)))  # type: ignore[no-any-return]


def examples() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(NUM_EXAMPLES, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return inputs, inputs.sum(1, keepdim=True)


def trainer(
    workers: mbgd.Workers,
    observers: Any,
    *,
    averaging: str = "auto",
    steps: int = NUM_STEPS,
    lr: float = 0.1,
    precision: str = "fp64",
    sharding: str = "auto",
    at_start: bool = False,
) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = Net()
    settings = mbgd.Settings(
        steps=steps,
        batch=mbgd.Batch(SIZE),
        precision=precision,  # type: ignore[arg-type]
        averaging=mbgd.Averaging(averaging),  # type: ignore[arg-type]
        sharding=sharding,  # type: ignore[arg-type]
        evaluation=mbgd.Evaluation(every_steps=3, at_start=at_start),
        noise_scale=mbgd.NoiseScale(every_steps=None),
    )
    inputs, targets = examples()
    data = mbgd.Data(train=mbgd.InMemory(inputs, targets), evaluation=mbgd.InMemory(inputs[:7] + 1, 2 * targets[:7]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    return mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, settings, workers, observers)


class Plain:
    """The same training in plain torch, with the averages and losses that belong to it."""

    def __init__(self, made: mbgd.Trainer, *, frozen_until: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = Net().double()
        inputs, targets = examples()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, weight_decay=0.1)
        self.history = [self._copies()]
        for step in range(NUM_STEPS):
            if frozen_until is not None:
                self.model.backbone.requires_grad_(step >= frozen_until)
            chosen = torch.as_tensor(made.setup.loader.minibatch_indices(step))
            optimizer.zero_grad()
            ((self.model(inputs[chosen]) - targets[chosen]) ** 2).mean().backward()
            optimizer.step()
            self.history.append(self._copies())

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def average(self, decay: float, *, start: int = 0, every_steps: int = 1) -> dict[str, Tensor]:
        average = {name: tensor.clone() for name, tensor in self.history[start].items()}
        for step in range(start + every_steps, NUM_STEPS + 1, every_steps):
            for name, tensor in self.history[step].items():
                average[name].lerp_(tensor, 1 - decay)
        return average

    def loss(self, weights: dict[str, Tensor]) -> float:
        inputs, targets = examples()
        outputs = torch.func.functional_call(self.model, weights, (inputs[:7] + 1,))
        return float(((outputs - 2 * targets[:7]) ** 2).mean())


def trained_average(workers: mbgd.Workers, averaging: str, how: dict[str, Any], cut: int | None) -> dict[str, Any]:
    """The average after all steps, the evaluation's values and the weights; cut: saved there, and resumed."""
    ema = mbgd.EMA(**how)
    made = trainer(workers, [ema], averaging=averaging)
    if cut is not None:
        with pytest.raises(mbgd.Preempted):
            made.fit(stop=StopAt(cut))
        snapshot = made.snapshot()
        ema = mbgd.EMA(**how)
        made = trainer(workers, [ema], averaging=averaging)
        made.restore(snapshot)
    result = made.fit()
    average = {name: tensor.clone() for name, tensor in ema.state_dict()["average"].items()}
    return {"average": average, "metrics": result.metrics, "sha256": made.weights_sha256()}


HOW: list[dict[str, Any]] = [{"decay": 0.9}, {"decay": 0.5, "start": 3, "every_steps": 2}]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_average_has_the_bits_of_a_plain_loop(how: dict[str, Any]) -> None:
    made = trainer(mbgd.Workers(), [ema := mbgd.EMA(**how)])
    kept = []
    made.train_step.observers.append(type("Keep", (), {"after_update": lambda self, done: kept.append(copies(made))})())
    first = copies(made)
    made.fit()
    average = {name: tensor.clone() for name, tensor in [first, *kept][how.get("start", 0)].items()}
    for step in range(how.get("start", 0) + how.get("every_steps", 1), NUM_STEPS + 1, how.get("every_steps", 1)):
        for name, tensor in kept[step - 1].items():
            average[name].lerp_(tensor, 1 - how["decay"])
    assert all(tensor.equal(average[name]) for name, tensor in ema.state_dict()["average"].items())
    plain = Plain(made).average(**how)
    assert all(tensor.allclose(plain[name], rtol=1e-11, atol=1e-13) for name, tensor in average.items())


def copies(made: mbgd.Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.setup.model.named_parameters()}


@pytest.mark.parametrize("averaging", AVERAGINGS)
@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_average_is_that_of_one_process_on_any_number_of_workers(averaging: str, how: dict[str, Any]) -> None:
    made = trainer(mbgd.Workers(), [mbgd.EMA(**how)])
    plain = Plain(made)
    average, loss = plain.average(**how), plain.loss(plain.average(**how))
    alone = trained_average(mbgd.Workers(), "reproducible", how, cut=None) if averaging == "reproducible" else None
    for num_workers, cut in ((2, None), (3, 7)):
        for found in run_workers(trained_average, num_workers, averaging, how, cut):
            for name, tensor in found["average"].items():
                torch.testing.assert_close(tensor, average[name], rtol=1e-11, atol=1e-13)
            assert found["metrics"]["eval/ema/loss"] == pytest.approx(loss, rel=1e-11)
            assert found["metrics"]["eval/loss"] == pytest.approx(plain.loss(plain.history[-1]), rel=1e-11)
            if alone is not None:
                assert found["sha256"] == alone["sha256"]
                assert {k: v for k, v in found["metrics"].items() if "eval" in k} == {
                    k: v for k, v in alone["metrics"].items() if "eval" in k
                }
                assert all(tensor.equal(alone["average"][name]) for name, tensor in found["average"].items())


def test_durations_are_given_in_epochs_too() -> None:
    ema, freeze = mbgd.EMA(0.9, start="1 epochs", warmup_steps="10 examples"), mbgd.Freeze(["backbone.*"], "2 epochs")
    trainer(mbgd.Workers(), [ema, freeze])  # 5 minibatches an epoch
    assert (ema.start, freeze.until) == (5, 10)
    assert ema.decay_after(6) == pytest.approx(0.45)


@given(st.floats(0, 0.9999), st.integers(1, 50), st.integers(1, 300))
def test_the_decay_rises_as_defined(decay: float, warmup_steps: int, since: int) -> None:
    linear, power = mbgd.EMA(decay, start=10, warmup_steps=warmup_steps), mbgd.EMA(decay, start=10, power=2 / 3)
    assert linear.decay_after(10 + since) == pytest.approx(decay * min(1, since / warmup_steps))
    assert power.decay_after(10 + since) == pytest.approx(min(decay, 1 - 1 / (1 + since) ** (2 / 3)))
    assert mbgd.EMA(decay).decay_after(since) == decay


class Spiral(nn.Module):
    """A complex parameter, and one in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.tensor([1 + 2j, 0.5j]))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return ((inputs * self.turn).abs() * self.scale).sum(1, keepdim=True)


def test_complex_parameters_are_averaged_and_put_back() -> None:
    model, ema = Spiral(), mbgd.EMA(0.5)
    inputs = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    data = mbgd.Data(train=mbgd.InMemory(inputs, inputs.sum(1, keepdim=True)))
    settings = mbgd.Settings(steps=2, batch=mbgd.Batch(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    made = mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, settings, observers=[ema])
    history = [model.turn.detach().clone()]
    made.train_step.observers.append(
        type("Keep", (), {"after_update": lambda self, done: history.append(model.turn.detach().clone())})()
    )
    made.fit()
    expected = history[0].lerp(history[1], 0.5).lerp(history[2], 0.5)
    with ema.other_weights():
        torch.testing.assert_close(model.turn.detach(), expected, rtol=1e-6, atol=0)
    assert model.turn.equal(history[2])


def test_a_step_that_fp16_skips_leaves_the_average_as_it_is() -> None:
    ema, averages, weights = mbgd.EMA(0.5), [], []
    made = trainer(mbgd.Workers(), [ema], precision="fp16")

    class Overflow:
        """Makes the gradient of the fourth step overflow, and looks at each step."""

        def before(self, shard: Any, weight: Any) -> None:
            if shard.step == 3:
                next(iter(made.setup.trained.parameters)).grad.fill_(torch.inf)  # type: ignore[union-attr]

        def after_update(self, done: mbgd.Done) -> None:
            weights.append(made.setup.model.head.weight.detach().clone())

    look = Overflow()
    made.train_step.before_update.append(look.before)
    made.train_step.observers.append(look)
    made.observers._after_update.append(
        ("look", lambda done: averages.append(ema.state_dict()["average"]["head.weight"].clone()))
    )
    num_skipped = made.fit().num_skipped_steps
    skipped = [number for number in range(1, NUM_STEPS) if weights[number].equal(weights[number - 1])]
    assert 3 in skipped
    assert len(skipped) in (num_skipped - 1, num_skipped)  # the first step may be skipped, too
    assert len(skipped) < NUM_STEPS - 3
    for number, (before, after) in enumerate(pairwise(averages), 1):
        assert after.equal(before if number in skipped else before.lerp(weights[number], 0.5))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mbgd", *map(str, arguments)], capture_output=True, text=True)


def test_the_average_is_exported_and_evaluated_by_commands(tmp_path: Path) -> None:
    run, without, exported = tmp_path / "run", tmp_path / "without", tmp_path / "exported.safetensors"
    runs.run(run, "model=linear", "ema.decay=0.9", "early_stopping.patience=9")
    with safe_open(run / "model_ema.safetensors", "pt") as file:
        assert file.metadata() == {"weights": "ema"}
    own, average = load_file(run / "model.safetensors"), load_file(run / "model_ema.safetensors")
    assert own.keys() == average.keys()
    assert not any(own[name].equal(average[name]) for name in own)
    recorded = json.loads((run / "summary.json").read_text())["metrics"]
    found = json.loads(command("evaluate", run, "--ema", "--json", "-").stdout)["metrics"]
    assert found == {name: recorded[name.replace("eval/", "eval/ema/")] for name in ("eval/loss", "eval/accuracy")}
    assert command("checkpoints", run, "--export", exported, "--ema").returncode == 0
    assert exported.read_bytes() == (run / "model_ema.safetensors").read_bytes()
    (run / "checkpoints").rename(tmp_path / "moved")  # then the exported file is taken
    assert json.loads(command("evaluate", run, "--ema", "--json", "-").stdout)["metrics"] == found
    runs.run(without, "model=linear", "epochs=1")
    refused = command("evaluate", without, "--ema")
    assert refused.returncode == 2
    assert "holds the model's own weights alone, no ema" in refused.stderr


def test_a_stopped_run_can_end_with_the_weights_of_its_best_evaluation() -> None:
    kept: dict[int, tuple[float, str]] = {}
    stop = mbgd.EarlyStopping(patience=2, load_best=True)
    made = trainer(mbgd.Workers(), [stop], steps=300, lr=0.3)

    class Keep:
        def after_evaluation(self, step: int, metrics: dict[str, float]) -> None:
            kept[step] = metrics["eval/loss"], made.weights_sha256()

    made.observers._after_evaluation["keep"] = Keep().after_evaluation
    made.observers._by_name["keep"] = Keep()
    result = made.fit()
    best = min(kept, key=lambda step: kept[step][0])
    assert result.steps == max(kept) == best + 6 < 300
    assert result.weights_step == best
    assert (result.metrics["eval/loss"], made.weights_sha256()) == kept[best]


def stop_and_load(workers: mbgd.Workers, cut: bool) -> tuple[int, int | None, str, float]:
    made = trainer(
        workers, [mbgd.EarlyStopping(patience=2, load_best=True)], averaging="reproducible", steps=300, lr=0.3
    )
    if cut:
        with pytest.raises(mbgd.Preempted):
            made.fit(stop=StopAt(4))
        snapshot = made.snapshot()
        made = trainer(
            workers, [mbgd.EarlyStopping(patience=2, load_best=True)], averaging="reproducible", steps=300, lr=0.3
        )
        made.restore(snapshot)
    result = made.fit()
    return result.steps, result.weights_step, made.weights_sha256(), result.metrics["eval/loss"]


def test_the_best_weights_are_the_same_on_any_number_of_workers_and_after_a_resume() -> None:
    alone = stop_and_load(mbgd.Workers(), False)
    for num_workers in (2, 3):
        assert set(run_workers(stop_and_load, num_workers, num_workers == 3)) == {alone}


def worsened(workers: mbgd.Workers) -> tuple[int, int | None, bool, float, float]:
    """A run whose first weights are its best: each step makes the loss worse."""
    stop, log = mbgd.EarlyStopping(patience=2, load_best=True), Lines()
    made = trainer(workers, [stop], lr=30.0, at_start=True)
    first = copies(made)
    result = made.fit(log)
    are_first = all(tensor.equal(first[name]) for name, tensor in copies(made).items())
    [(step, metrics), *_] = log.lines
    assert step == 0
    return result.steps, result.weights_step, are_first, metrics["eval/loss"], result.metrics["eval/loss"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_evaluation_before_the_first_step_counts_for_early_stopping(num_workers: int) -> None:
    for steps, weights_step, are_first, first_loss, last_loss in run_workers(worsened, num_workers):
        assert (steps, weights_step, are_first) == (6, 0, True)
        assert first_loss == last_loss


def fit_twice(workers: mbgd.Workers, folder: str, sharding: str) -> list[Any]:
    """What two fits of one trainer give and write, and the weights in the last checkpoint of the second's folder."""
    made = trainer(workers, [mbgd.EarlyStopping(patience=2, load_best=True)], steps=300, lr=0.3, sharding=sharding)
    found: list[Any] = []
    for number in range(2):
        log = Lines()
        result = made.fit(log, mbgd.Checkpoints(f"{folder}/{number}", made))
        found.append((result.steps, result.weights_step, result.metrics["eval/loss"], made.weights_sha256()))
        found.append([step for step, metrics in log.lines if "eval/loss" in metrics])
    again = trainer(workers, [mbgd.EarlyStopping(patience=2, load_best=True)], steps=300, lr=0.3)
    for number in range(2):
        assert mbgd.Checkpoints(f"{folder}/{number}", again).resume()
        found.append(again.weights_sha256())
    return found


class Lines:
    def __init__(self) -> None:
        self.lines: list[tuple[int, Any]] = []

    def log(self, step: int, metrics: Any) -> None:
        self.lines.append((step, metrics))

    def progress(self, step: int) -> None:
        pass


@pytest.mark.parametrize(("num_workers", "sharding"), [(1, "none"), (2, "none"), (2, "optimizer")])
def test_a_second_fit_after_the_best_weights_were_loaded_changes_nothing(
    num_workers: int, sharding: str, tmp_path: Path
) -> None:
    """It neither evaluates the best weights as the last step's nor saves them as those."""
    for found in run_workers(fit_twice, num_workers, str(tmp_path), sharding):
        (first, evaluated, second, evaluated_again, saved, saved_again) = found
        assert first == second
        assert (evaluated[-1], evaluated_again) == (first[0], [])
        assert saved == saved_again != first[-1]


def frozen(workers: mbgd.Workers, averaging: str, until: int | None, cut: int | None) -> dict[str, Any]:
    made = trainer(workers, [mbgd.Freeze(["backbone.*"], until)], averaging=averaging)
    if cut is not None:
        with pytest.raises(mbgd.Preempted):
            made.fit(stop=StopAt(cut))
        snapshot = made.snapshot()
        made = trainer(workers, [mbgd.Freeze(["backbone.*"], until)], averaging=averaging)
        made.restore(snapshot)
    made.fit()
    return {"weights": copies(made), "sha256": made.weights_sha256()}


@pytest.mark.parametrize("averaging", AVERAGINGS)
def test_parameters_are_frozen_and_unfrozen_as_in_plain_torch(averaging: str) -> None:
    made = trainer(mbgd.Workers(), [])
    never, at_five = (Plain(made, frozen_until=until).history[-1] for until in (NUM_STEPS, 5))
    assert never["backbone.weight"].equal(Plain(made).history[0]["backbone.weight"])
    alone = frozen(mbgd.Workers(), averaging if averaging == "reproducible" else "auto", 5, None)
    for num_workers, until, cut, expected in (
        (2, 5, None, at_five),
        (3, 5, 4, at_five),
        (3, 5, 5, at_five),
        (2, None, 6, never),
    ):
        for found in run_workers(frozen, num_workers, averaging, until, cut):
            for name, tensor in found["weights"].items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-13)
            if averaging == "reproducible" and until == 5:
                assert found["sha256"] == alone["sha256"]


@pytest.mark.parametrize("start", [2, 5])
def test_an_average_that_has_not_begun_is_told(capsys: pytest.CaptureFixture[str], start: int) -> None:
    class StopAfterThree:
        def after_evaluation(self, step: int, metrics: dict[str, float]) -> bool:
            return step == 3

    trainer(mbgd.Workers(), [mbgd.EMA(0.9, start=start), StopAfterThree()]).fit()
    assert ("the moving average has not begun" in capsys.readouterr().out) == (start == 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mbgd.EMA(1.0), "ema.decay=1.0; it must be at least 0 and less than 1"),
        (lambda: mbgd.EMA(every_steps=0), "ema.every_steps=0; it must be at least 1"),
        (lambda: mbgd.EMA(start=-1), "ema.start=-1; it must be at least 0"),
        (lambda: mbgd.EMA(start="1 epoc"), "ema.start=1 epoc; it takes a whole number of steps"),
        (lambda: mbgd.EMA(power=0.0), "ema.power=0.0; it must be greater than 0"),
        (lambda: mbgd.EMA(power=0.5, warmup_steps=9), "choose one kind of warm-up"),
        (lambda: mbgd.Freeze("backbone.*"), "it takes a list of patterns"),
        (lambda: mbgd.Freeze(["head.*"], 0), "unfreeze.at=0; it must be at least 1"),
        (lambda: trainer(mbgd.Workers(), [mbgd.Freeze(["hed.*"])]), "no parameter's name matches 'hed.*'"),
        (lambda: trainer(mbgd.Workers(), [mbgd.Freeze(["*"])]), "leaves no parameter to train"),
        (
            lambda: trainer(mbgd.Workers(), [mbgd.EMA(), mbgd.EarlyStopping("eval/ema/loss", load_best=True)]),
            "load_best with metric=eval/ema/loss",
        ),
        (
            lambda: trainer(mbgd.Workers(), [mbgd.EMA(evaluate=False), mbgd.EarlyStopping("eval/ema/loss")]),
            "evaluations give eval/loss",
        ),
        (lambda: trainer(mbgd.Workers(), [mbgd.EMA(0.9), mbgd.EMA(0.99)]), "two are named ema"),
        (lambda: trainer(mbgd.Workers(), [mbgd.EMA(start=9)], steps=9), "first update the average after step 10, but"),
        (lambda: trainer(mbgd.Workers(), [mbgd.EMA(every_steps="3 epochs")]), "ema.every_steps=3 epochs first update"),
        (lambda: trainer(mbgd.Workers(), [mbgd.Freeze(["head.*"], 9)], steps=9), "unfreeze.at=9, but the run ends"),
        (lambda: trainer(mbgd.Workers(), [mbgd.Freeze(["head.*"], "9 epochs")]), "unfreeze.at=9 epochs, but the run"),
    ],
)
def test_mistakes_are_refused(make: Any, message: str) -> None:
    with pytest.raises(mbgd.UsageError) as refused:
        make()
    assert message in str(refused.value)
