"""Observers: called with the values that all workers share, may stop training, and resume with their state."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_configuration import composed
from torch import Tensor, nn

import mbgd
from mbgd.building.build import build_trainer, typed
from mbgd.errors import ObserverFailed
from mbgd.step.observers import Observers

import runs
from processes import run_workers
from small_runs import StopAt


class MovingAverage:
    """Of the parameters, with state in the checkpoints."""

    def before_training(self, trainer: Any) -> None:
        self._parameters = dict(trainer.setup.model.named_parameters())
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.num_updates = 0

    def after_update(self, done: mbgd.Done) -> None:
        self.num_updates += 1
        for name, parameter in self._parameters.items():
            self._averages[name].lerp_(parameter.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages, "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages, self.num_updates = state["averages"], state["num_updates"]

    def averages(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._averages.items()}


def trainer(workers: mbgd.Workers, observers: Any, *, averaging: str = "auto", steps: int = 12) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    inputs = torch.randn(40, 3, dtype=torch.float64)
    settings = mbgd.Settings(
        steps=steps,
        batch=mbgd.Batch(10),
        precision="fp64",
        averaging=mbgd.Averaging(averaging),
        evaluation=mbgd.Evaluation(every_steps=1),
    )
    train = mbgd.InMemory(inputs, inputs.sum(1, keepdim=True))
    held_out = mbgd.InMemory(inputs[:7] + 1, 3 * inputs[:7].sum(1, keepdim=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    data = mbgd.Data(train=train, evaluation=held_out)
    return mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, settings, workers, observers)


class Losses:
    """Keeps the evaluations' losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        assert step == len(self.losses) + 1
        self.losses.append(metrics["eval/loss"])


def stop_early(workers: mbgd.Workers, averaging: str) -> tuple[int, str, list[float], str]:
    losses = Losses()
    made = trainer(workers, [mbgd.EarlyStopping(patience=2, min_delta=0.01), losses], averaging=averaging, steps=60)
    result = made.fit()
    return result.steps, result.stopped_by, losses.losses, made.weights_sha256()


def first_stop(losses: list[float], patience: int, min_delta: float) -> int | None:
    """The number of evaluations after which training stops, from the definition; None if it does not."""
    best, since = None, 0
    for number, loss in enumerate(losses, 1):
        if best is None or loss < best - min_delta:
            best, since = loss, 0
        else:
            since += 1
        if since == patience:
            return number
    return None


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory", "reproducible"])
def test_the_stop_step_is_the_same_on_any_number_of_workers(averaging: str) -> None:
    alone = stop_early(mbgd.Workers(), "auto" if averaging == "shared_memory" else averaging)
    assert alone[1] == "early_stopping"
    assert alone[0] == first_stop(alone[2], 2, 0.01) == len(alone[2]) < 60
    for num_workers in (2, 3):
        for steps, stopped_by, losses, sha256 in run_workers(stop_early, num_workers, averaging):
            assert (steps, stopped_by) == alone[:2]
            assert losses == pytest.approx(alone[2], rel=1e-12)
            if averaging == "reproducible":
                assert (losses, sha256) == (alone[2], alone[3])


@given(st.lists(st.floats(allow_infinity=False, width=16), max_size=30), st.integers(1, 4), st.floats(0, 1))
def test_early_stopping_counts_as_defined(losses: list[float], patience: int, min_delta: float) -> None:
    early, opposite = (
        mbgd.EarlyStopping("eval/loss", patience, min_delta, direction) for direction in ("minimize", "maximize")
    )
    stop = stopped_opposite = None
    for number, loss in enumerate(losses, 1):
        resumed = mbgd.EarlyStopping("eval/loss", patience, min_delta)
        resumed.load_state_dict(early.state_dict())
        early = resumed
        if stop is None and early.after_evaluation(number, {"eval/loss": loss}):
            stop = number
        if stopped_opposite is None and opposite.after_evaluation(number, {"eval/loss": -loss}):
            stopped_opposite = number
    numbers = [loss if loss == loss else float("inf") for loss in losses]
    if numbers and numbers[0] == float("inf"):
        return  # NaN at the start is no best value; the plain definition above would take it for one
    assert stop == stopped_opposite == first_stop(numbers, patience, min_delta)


def average(workers: mbgd.Workers, cut: bool) -> tuple[dict[str, Tensor], int]:
    """The moving averages of 12 steps; cut: saved after 5, and gone on with in a new trainer."""
    observer = MovingAverage()
    made = trainer(workers, {"average": observer}, averaging="reproducible")
    if cut:
        with pytest.raises(mbgd.Preempted):
            made.fit(stop=StopAt(5))
        snapshot = made.snapshot()
        observer = MovingAverage()
        made = trainer(workers, {"average": observer}, averaging="reproducible")
        made.restore(snapshot)
    made.fit()
    return observer.averages(), observer.num_updates


def test_state_resumes_to_the_same_bits_on_any_number_of_workers() -> None:
    whole, num_updates = average(mbgd.Workers(), False)
    assert num_updates == 12
    for num_workers in (1, 2, 3):
        for cut in (False, True):
            for averages, updates in run_workers(average, num_workers, cut):
                assert updates == 12
                assert all(torch.equal(averages[name], whole[name]) for name in whole)


def test_a_checkpoint_without_the_state_of_an_observer_is_refused() -> None:
    before = trainer(mbgd.Workers(), ())
    with pytest.raises(mbgd.UsageError, match=r"observers.average: the checkpoint has no state of it"):
        trainer(mbgd.Workers(), {"average": MovingAverage()}).restore(before.snapshot())


class Raises:
    def after_update(self, done: mbgd.Done) -> None:
        if done.step == 4:
            raise KeyError("made up")


def test_one_that_raises_is_named_and_the_state_is_saved(tmp_path: Path) -> None:
    made = trainer(mbgd.Workers(), [Raises()])
    checkpoints = mbgd.Checkpoints(tmp_path, made)
    with pytest.raises(ObserverFailed, match=r"observers.Raises raised KeyError in after_update: 'made up'") as caught:
        made.fit(checkpoints=checkpoints)
    assert isinstance(caught.value.__cause__, KeyError)
    del checkpoints
    again = trainer(mbgd.Workers(), ())
    assert mbgd.Checkpoints(tmp_path, again).resume()
    assert again.state.step == 5


class OnOneWorker:
    def __init__(self, rank: int) -> None:
        self._stops = rank == 1

    def after_evaluation(self, step: int, metrics: Mapping[str, float]) -> bool:
        return self._stops and step == 3


def decide_apart(workers: mbgd.Workers) -> str:
    with pytest.raises(mbgd.UsageError) as caught:
        trainer(workers, [OnOneWorker(workers.rank)]).fit()
    return str(caught.value)


def test_one_that_does_not_decide_alike_is_refused_on_every_worker() -> None:
    for message in run_workers(decide_apart, 2):
        assert "observers.OnOneWorker stops training after step 3 on the workers [1] alone" in message


class Nothing:
    pass


class HalfState:
    def after_update(self, done: mbgd.Done) -> None:
        pass

    def state_dict(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Nothing()], "Nothing without any of the methods"),
        ([HalfState()], "state needs both"),
        ([mbgd.EarlyStopping], "is the class EarlyStopping; give an object"),
        ([mbgd.EarlyStopping(), mbgd.EarlyStopping()], "two are named early_stopping"),
        ({"a/b": mbgd.EarlyStopping()}, "letters, digits"),
    ],
)
def test_mistakes_are_refused(given: Any, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        Observers(given, mbgd.Workers(), [])


@pytest.mark.parametrize("keywords", [{"patience": 0}, {"min_delta": -1.0}, {"direction": "down"}])
def test_early_stopping_refuses_values_out_of_range(keywords: dict[str, Any]) -> None:
    with pytest.raises(mbgd.UsageError, match=next(iter(keywords))):
        mbgd.EarlyStopping(**keywords)


EARLY = "+observers.early={_target_: mbgd.EarlyStopping, metric: METRIC, patience: 1, min_delta: 10.0}"


def test_a_metric_that_no_evaluation_gives_is_refused() -> None:
    config = typed(composed(EARLY.replace("METRIC", "eval/los")))
    with pytest.raises(mbgd.UsageError, match=r"observers.early: metric=eval/los.*Did you mean eval/loss"):
        build_trainer(config, mbgd.Workers())


def test_a_run_that_stopped_is_complete(tmp_path: Path) -> None:
    """min_delta=10: the second evaluation is no improvement. With resume.force and without the observer it goes on."""
    early = EARLY.replace("METRIC", "eval/loss")
    runs.run(tmp_path, "epochs=9", early)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["stopped_by"], summary["steps"]) == ("early", 2 * 23)
    with pytest.raises(AssertionError):  # resume says that it is complete
        runs.run(tmp_path, "epochs=9", early)
    with pytest.raises(mbgd.UsageError, match=r"observers\.early"):
        runs.run(tmp_path, "epochs=9")
    runs.run(tmp_path, "epochs=3", "schedule=constant", "resume.force=true")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["stopped_by"], summary["steps"]) == ("", 3 * 23)


class Writes:
    """Writes a line after every second step."""

    def with_writer(self, write: Callable[[int, Mapping[str, Any]], None]) -> None:
        self._write = write

    def after_update(self, done: mbgd.Done) -> None:
        if done.step % 2:
            self._write(done.step + 1, {"size": done.minibatch.size, "not a number": float("nan")})


def writing(workers: mbgd.Workers, folder: Path) -> None:
    made = trainer(workers, {"mine": Writes(), "also": Writes()}, steps=6)
    made.fit(mbgd.Trackers([mbgd.ObservedLines(folder)] if workers.is_main else []))


def test_an_observers_lines_are_in_a_file_of_its_own(tmp_path: Path) -> None:
    run_workers(writing, 2, tmp_path)
    assert sorted(path.name for path in (tmp_path / "observed").iterdir()) == ["also.jsonl", "mine.jsonl"]
    lines = (tmp_path / "observed/mine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": n, "size": 10, "not a number": None} for n in (2, 4, 6)]


class CountsSteps:
    """A tracker of the user's, which does not care what observers write."""

    def __init__(self) -> None:
        self.steps = 0

    def progress(self, step: int) -> None:
        self.steps = step

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        pass

    def close(self, ending: object) -> None:
        pass


def test_a_tracker_need_not_take_what_observers_write() -> None:
    for tracker in (CountsSteps(), None):
        assert trainer(mbgd.Workers(), [Writes()], steps=3).fit(tracker).steps == 3
    counts = CountsSteps()
    trainer(mbgd.Workers(), [Writes()], steps=3).fit(mbgd.Trackers([counts]))
    assert counts.steps == 3


def test_lines_that_cannot_be_written_do_not_stop_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "observed").write_text("a file in the folder's place")
    result = trainer(mbgd.Workers(), [Writes()], steps=6).fit(mbgd.Trackers([mbgd.ObservedLines(tmp_path)]))
    assert result.steps == 6
    assert capsys.readouterr().out.count("warning: ObservedLines failed (FileExistsError") == 1
