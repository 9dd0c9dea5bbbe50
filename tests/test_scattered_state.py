"""sharding=optimizer without shared memory: the state lies in pieces on all workers, who put it together to save it."""

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharding import NUM_STEPS, OPTIMIZERS, Case, Logged, Net, digest, examples, make_trainer, muon, of_torch
from torch import Tensor, nn

import mbgd
from mbgd.checkpoints.keeper import NoCheckpoints, Take
from mbgd.checkpoints.saving import CheckpointFolder, CheckpointsElsewhere
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.config import Checkpoint
from mbgd.data import InMemory
from mbgd.errors import ObserverFailed, ReplicasDiffer
from mbgd.runs.library import Checkpoints
from mbgd.step import scattered_state, sharding, sharding_trial

from processes import run_workers

ADAM = Case("Adam", of_torch("Adam", amsgrad=True))
TRANSPORTS = ["ddp", "reproducible over gloo"]

# Checkpoints


def save(workers: mbgd.Workers, folder: str, sharded: str, transport: str, stop: int | None) -> str:
    trainer = make_trainer(workers, ADAM, transport, sharded, NUM_STEPS)
    best = {"best": "eval/loss", "keep": 9, "every_seconds": None}
    checkpoints = Checkpoints(folder, trainer, Checkpoint(every_steps=3, **best))  # type: ignore[arg-type]
    checkpoints.resume()
    try:
        trainer.fit(checkpoints=checkpoints, stop=StopAt(stop))
    except mbgd.Preempted:
        return "preempted"
    return trainer.weights_sha256()


class StopAt:
    def __init__(self, step: int | None) -> None:
        self._step = step

    def agreed(self, step: int) -> bool:
        return step == self._step


def contents(folder: Path) -> dict[str, Any]:
    """Every checkpoint's files; of the manifest what is not a time, nor follows from one."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("checkpoints/*/*")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.suffix == ".json":
            manifest = json.loads(path.read_text())
            metrics, _ = manifest["values"].pop("metrics"), manifest.pop("sha256")
            found[name] = manifest, {name: value for name, value in metrics.items() if "time/" not in name}
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_files_are_those_of_a_run_that_is_not_sharded(tmp_path: Path, transport: str) -> None:
    """Also those of a run that was stopped, and goes on."""
    (wanted,) = set(run_workers(save, 2, str(tmp_path / "none"), "none", transport, None))
    assert set(run_workers(save, 2, str(tmp_path / "whole"), "optimizer", transport, None)) == {wanted}
    assert set(run_workers(save, 2, str(tmp_path / "stopped"), "optimizer", transport, 1)) == {"preempted"}
    assert set(run_workers(save, 2, str(tmp_path / "stopped"), "optimizer", transport, None)) == {wanted}
    files = contents(tmp_path / "none")
    assert {f"checkpoints/step-{step:09d}/optimizer.safetensors" for step in (3, 5)} <= files.keys()
    assert contents(tmp_path / "whole") == files
    stopped = contents(tmp_path / "stopped")
    assert stopped.keys() > files.keys()
    assert {name: stopped[name] for name in files} == files


class Takes(NoCheckpoints):
    """Takes a snapshot after every second step, however many workers do so."""

    def __init__(self, *, announces: bool = True) -> None:
        self._announces = announces
        self.taken: list[str] = []

    def every_steps(self) -> list[int]:
        return [2] if self._announces else []

    def after_step(self, step: int, evaluation: Any, take: Take, *, is_time: bool = True) -> None:
        if step % 2 == 0:
            try:
                self.taken.append(digest(take()))
            except mbgd.UsageError as error:
                self.taken.append(str(error))


def take_on(workers: mbgd.Workers, takers: list[int], case: Case, transport: str, sharded: str) -> list[str]:
    scattered_state.CHUNK_BYTES = 10_007
    keeper = Takes()
    checkpoints = keeper if workers.rank in takers else None
    make_trainer(workers, case, transport, sharded, NUM_STEPS).fit(checkpoints=checkpoints)
    return keeper.taken


@pytest.mark.parametrize("case", [ADAM, Case("Muon", muon), OPTIMIZERS[-3]], ids=lambda case: case.name)
def test_any_workers_may_take_snapshots(case: Case) -> None:
    """As the first worker of each host does for the snapshots in memory."""
    (wanted,) = run_workers(take_on, 1, [0], case, "reproducible", "none")
    assert len(set(wanted)) == 2
    assert run_workers(take_on, 3, [0, 2], case, "reproducible over gloo", "optimizer") == [wanted, [], wanted]


def take_unannounced(workers: mbgd.Workers) -> list[str]:
    keeper = Takes(announces=False)
    settings = {"evaluation": mbgd.Evaluation(every_steps=4)}
    trainer = make_trainer(workers, Case("", ADAM.make), "ddp", "optimizer", 6, **settings)
    trainer.fit(checkpoints=keeper if workers.is_main else None)
    return keeper.taken


def test_a_snapshot_of_which_the_others_do_not_know_is_refused() -> None:
    told = run_workers(take_unannounced, 2)[0]
    assert ["every_steps()" in one for one in told] == [True, False, False]  # all meet at each evaluation


class Raises:
    def after_update(self, done: mbgd.Done) -> None:
        if done.step == 3:
            raise KeyError("made up")


def fail_in_observer(workers: mbgd.Workers, folder: str, required: bool) -> tuple[list[str], str]:
    case = Case("", ADAM.make, observers=lambda: [Raises()])
    trainer = make_trainer(workers, case, "ddp", "optimizer", NUM_STEPS)
    settings = Checkpoint(every_steps=2, every_seconds=None, required=required)
    checkpoints = CheckpointFolder(Path(folder), settings, {}) if workers.is_main else CheckpointsElsewhere()
    with pytest.raises(ObserverFailed), redirect_stdout(StringIO()) as out:
        trainer.fit(checkpoints=checkpoints)
    return sorted(path.name for path in Path(folder).iterdir()), out.getvalue()


@pytest.mark.parametrize("required", [False, True])
def test_an_observer_that_fails_leaves_the_last_checkpoint(tmp_path: Path, required: bool) -> None:
    (files, out), (_, no_out) = run_workers(fail_in_observer, 2, str(tmp_path), required)
    assert files == ["step-000000002"]
    assert "the optimizer's state lies in pieces on all workers" in out
    assert "this worker may have been the only one to stop here" in out
    assert "Training goes on" not in out
    assert not no_out


def save_without_memory(workers: mbgd.Workers, folder: str) -> tuple[str, str]:
    make, has_room = scattered_state.available_bytes, [0]

    def little() -> int | None:  # at step 2 there is no room, later there is
        has_room[0] += 1
        return 1000 if has_room[0] == 1 else make()

    scattered_state.available_bytes = little  # type: ignore[assignment]
    trainer = make_trainer(workers, ADAM, "ddp", "optimizer", NUM_STEPS)
    settings = Checkpoint(every_steps=2, every_seconds=None)
    checkpoints = CheckpointFolder(Path(folder), settings, {}) if workers.is_main else CheckpointsElsewhere()
    with redirect_stdout(StringIO()) as out:
        trainer.fit(checkpoints=checkpoints)
    return ", ".join(sorted(path.name for path in Path(folder).iterdir())), out.getvalue()


def test_too_little_memory_for_the_whole_state_is_a_failed_save(tmp_path: Path) -> None:
    (main, out), (other, _) = run_workers(save_without_memory, 2, str(tmp_path))
    assert main == other == "step-000000004, step-000000005"
    assert "a checkpoint could not be written" in out
    assert "bytes are available" in out


def end_without_memory(workers: mbgd.Workers) -> tuple[str, str, str, str]:
    trainer = make_trainer(workers, ADAM, "ddp", "optimizer", NUM_STEPS)
    scattered_state.available_bytes = lambda: 1000
    with redirect_stdout(StringIO()) as out:
        trainer.fit()
    with pytest.raises(mbgd.UsageError) as caught:
        trainer.setup.optimizer.state_dict()
    weights = trainer.weights_sha256()
    trainer.state.step = 0
    trainer.fit()  # goes on with its pieces
    return str(caught.value), weights, trainer.weights_sha256(), out.getvalue()


def test_the_optimizer_keeps_its_pieces_where_the_whole_has_no_room() -> None:
    first, second = run_workers(end_without_memory, 2)
    assert first[:3] == second[:3]
    assert "lies in pieces on all workers" in first[0]
    assert first[1] != first[2]
    assert first[3].startswith("warning: after training the optimizer holds pieces of the parameters: the whole takes")


# What each worker holds


class LooksAtState(Logged):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self._optimizer, self.refusals, self.num_bytes = optimizer, [], 0  # type: ignore[var-annotated]

    def progress(self, step: int) -> None:
        tensors = [one for state in self._optimizer.state.values() for one in state.values()]
        self.num_bytes = sum(one.nbytes for one in tensors)
        try:
            self._optimizer.state_dict()
        except mbgd.UsageError as error:
            self.refusals.append(str(error))


def look_at_state(workers: mbgd.Workers) -> tuple[int, list[str], int]:
    trainer = make_trainer(workers, ADAM, "ddp", "optimizer", NUM_STEPS)
    optimizer = trainer.setup.optimizer
    looks = LooksAtState(optimizer)
    trainer.fit(looks)
    whole = sum(one.nbytes for state in optimizer.state_dict()["state"].values() for one in state.values())
    return looks.num_bytes, looks.refusals, whole


def test_each_worker_holds_the_state_of_its_pieces_alone() -> None:
    of_workers = run_workers(look_at_state, 3)
    whole = of_workers[0][2]
    assert all(0 < held < 0.5 * whole for held, *_ in of_workers)
    assert whole <= sum(held for held, *_ in of_workers) < whole + 1000  # each piece counts its steps
    for _, refusals, _ in of_workers:
        assert len(refusals) == NUM_STEPS
        assert "sharding=none keeps it whole on each worker" in refusals[0]


def restore_after_fit(workers: mbgd.Workers, transport: str) -> list[str]:
    trainer = make_trainer(workers, ADAM, transport, "optimizer", NUM_STEPS)
    trainer.fit()
    first = trainer.snapshot()
    trainer.restore(first)
    trainer.state.step = NUM_STEPS - 2
    trainer.fit()
    changed = trainer.snapshot()
    trainer.restore(first)
    trainer.state.step = NUM_STEPS - 2
    trainer.fit()
    return [digest(one) for one in (first, changed, trainer.snapshot())]


@pytest.mark.parametrize("transport", ["shared_memory", "ddp"])
def test_a_trainer_may_be_restored_after_training(transport: str) -> None:
    first, changed, again = run_workers(restore_after_fit, 2, transport)[0]
    assert first != changed
    assert changed == again


# Changes by others


class Writes(Net):
    """In every forward, with .data, so that torch does not see it; `amount` is 0.9, or depends on the worker."""

    amount: Callable[[], float] = staticmethod(lambda: 0.9)

    def forward(self, inputs: Tensor) -> Tensor:
        self.first.weight.data.mul_(self.amount())
        return super().forward(inputs)


class WritesUnlike(Writes):
    amount = staticmethod(lambda: 0.9 + 0.01 * torch.distributed.get_rank())


class Replaces(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        self.head.weight.data = self.head.weight.data.clone()
        return super().forward(inputs)


def train_written(workers: mbgd.Workers, kind: type[Net], sharded: str) -> str:
    torch.manual_seed(0)
    model = kind()
    settings = mbgd.Settings(
        steps=4,
        batch=mbgd.Batch(16),
        averaging=mbgd.Averaging("ddp", find_unused_parameters=True),  # type: ignore[arg-type]
        sharding=sharded,  # type: ignore[arg-type]
    )
    data = mbgd.Data(train=InMemory(*examples()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    try:
        trainer = mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers)
        trainer.fit()
    except (mbgd.UsageError, ReplicasDiffer) as error:
        return f"{type(error).__name__}: {error}"
    return trainer.weights_sha256()


def test_what_a_forward_writes_alike_on_all_workers_counts_as_without_sharding() -> None:
    (wanted,) = set(run_workers(train_written, 2, Writes, "none"))
    assert set(run_workers(train_written, 2, Writes, "optimizer")) == {wanted}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WritesUnlike, "ReplicasDiffer: the workers' copies of the state differ after step 0"),
        (Replaces, "UsageError: by step 1 something other than the optimizer has written to parameters"),
    ],
)
def test_other_writes_are_refused_by_name(kind: type[Net], message: str) -> None:
    for told in run_workers(train_written, 2, kind, "optimizer"):
        assert told.startswith(message)
        assert ("first.weight" if kind is WritesUnlike else "head.weight") in told


# Where auto shards


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_the_size_of_the_state_is_known_before_there_is_any(case: Case) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = case.make(model)
    expected = sharding_trial.state_bytes(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    tensors = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    made = sum(one.nbytes for one in tensors)
    assert expected in (made, None)
    assert expected is not None or case.name in ("ASGD", "Adafactor")


def plan_of(workers: mbgd.Workers, least: int, name: str) -> str:
    sharding.LEAST_STATE_BYTES = least
    torch.manual_seed(0)
    model = nn.Linear(61, 3)
    settings = mbgd.Settings(steps=1, batch=mbgd.Batch(16), averaging=mbgd.Averaging("ddp"))  # type: ignore[arg-type]
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    data = mbgd.Data(train=InMemory(*examples()))
    return mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers).train_step.describe_sharding


def test_auto_shards_from_a_size_of_the_state_on() -> None:
    adam = 2 * 4 * (61 * 3 + 3) + 2 * 4
    for plan in run_workers(plan_of, 2, adam - 1, "Adam"):
        assert plan.startswith("optimizer: each worker updates at most ")
    for plan in run_workers(plan_of, 2, adam, "Adam"):
        assert (
            plan == f"none: over gloo the optimizer's state must take more than {adam:,} bytes, and it takes {adam:,}"
        )
    for plan in run_workers(plan_of, 2, 0, "ASGD"):
        assert plan.startswith("none: how much state ASGD makes is not known")


def test_snapshots_of_one_worker_need_no_others() -> None:
    trainer = make_trainer(mbgd.Workers(), ADAM, "ddp", "optimizer", 2)
    trainer.fit()
    assert isinstance(trainer.snapshot(), Snapshot)
