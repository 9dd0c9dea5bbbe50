"""recovery=continue: workers are lost in every phase, and those that are left end with the same bits and metrics.

A share of the schedules of `make chaos`, and what schedules do not hold.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

import mbgd
from mbgd.checkpoints.handover import Carried, Progress
from mbgd.cli.rest import Rest, signals_held
from mbgd.errors import UsageError
from mbgd.tracking.base import Trackers
from mbgd.tracking.recent import Recent
from mbgd.workers.membership import Membership, Roster
from mbgd.workers.store import STORE

import survivors
from own_processes import started_by_user
from struck import SLOW, STRIKES, Small
from survivors import OVERRIDES, PROGRAM, Schedule, Strike

ROOT = Path(__file__).parent.parent
SECONDS = 180
SECONDS_TO_STOP = 25
"""Less than the launcher gives its workers."""


@pytest.mark.parametrize("seed", [0, 5, 12, 13, 22, 25])
def test_the_run_ends_as_if_nobody_had_been_lost(tmp_path: Path, seed: int) -> None:
    plan = survivors.schedule(seed)
    said = survivors.check(tmp_path, plan)
    assert said.count("lost  ") >= 1, said


def test_schedules_strike_in_every_phase() -> None:
    plans = [survivors.schedule(seed) for seed in range(100)]
    strikes = [one for plan in plans for one in plan.strikes]
    assert {one.phase for one in strikes} == {*survivors.COUNTS, *survivors.COUNTS_OF_SHARDING}
    assert {one.kind for one in strikes} == {signal.SIGKILL, signal.SIGSTOP, -0.5}
    lost = [(plan.num_workers, sum(one.kind > 0 for one in plan.strikes)) for plan in plans]
    assert {number - num_workers for num_workers, number in lost} >= {-1, -2}
    for kinds in ([p.num_spare > 0 for p in plans], [p.over_gloo for p in plans], [p.is_sharded for p in plans]):
        assert set(kinds) == {True, False}


@pytest.mark.parametrize("over_gloo", [False, True])
@pytest.mark.parametrize("phase", survivors.COUNTS_OF_SHARDING)
def test_a_lost_worker_s_pieces_are_with_the_others(tmp_path: Path, phase: str, over_gloo: bool) -> None:
    """Also after the first update, which makes the optimizer's state."""
    count = 1 if phase == "spreading" else 4  # the first times are before training
    for number, strikes in enumerate(
        [(Strike(1, phase, count),), (Strike(0, phase, 9), Strike(2, phase, 15)), (Strike(2, phase, 8),)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        plan = Schedule(3, strikes, num_spare=2 * (number == 2), over_gloo=over_gloo, is_sharded=True)
        assert "go on after step" in survivors.check(folder, plan)


def test_workers_that_come_late_to_broadcasts_of_a_lost_one_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """One fails to send to the lost worker and so sends to nobody; the other waits for it, and it for the other."""
    late = Strike(0, "spreading", 3, -2)
    survivors.check(tmp_path, Schedule(3, (Strike(1, "spreading", 3), late), over_gloo=True, is_sharded=True))


def test_a_worker_is_lost_while_the_others_form_a_group_with_it(tmp_path: Path) -> None:
    """One comes so late that it does not try: the names of groups count, in torch, those that failed to form."""
    strikes = (Strike(2, "ending", 1), Strike(1, "forming", 2), Strike(0, "ending", 1, -0.5))
    said = survivors.check(tmp_path, Schedule(4, strikes, over_gloo=True))
    assert "2 workers go on after step 40" in said


def test_a_worker_is_lost_before_the_pieces_are_kept(tmp_path: Path) -> None:
    said = survivors.check(tmp_path, Schedule(3, (Strike(1, "keeping", 1),), is_sharded=True))
    assert said.count("lost  ") == 1


def test_a_worker_is_lost_while_the_state_is_gathered_for_a_checkpoint(tmp_path: Path) -> None:
    """No checkpoint has failed: the others take it once they go on."""
    plan = Schedule(3, (Strike(1, "taking", 3),), over_gloo=True, is_sharded=True)
    said = survivors.check(tmp_path, plan)
    assert "2 workers go on after step" in said
    assert "could not be written" not in said


def test_a_worker_is_lost_while_another_writes_histograms(tmp_path: Path) -> None:
    """With sharding each worker counts the gradient of its pieces; the step is not lost with one of them."""
    overrides = (f"histograms.steps={survivors.NUM_STEPS + 1}",)  # in every step
    plan = Schedule(3, (Strike(1, "drawing", 9),), is_sharded=True, overrides=overrides)
    assert "2 workers go on after step" in survivors.check(tmp_path, plan)
    lines = (tmp_path / "run/observed/histograms.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, survivors.NUM_STEPS + 1)]


def test_a_worker_is_lost_once_the_best_weights_are_loaded(tmp_path: Path) -> None:
    """The others still have the weights of the last step, with which they go on."""
    overrides = ("early_stopping.load_best=true", "early_stopping.metric=eval/loss", "early_stopping.min_delta=0.1")
    plan = Schedule(3, (Strike(1, "parting", 1),), overrides=overrides)
    said = survivors.check(tmp_path, plan)
    assert f"2 workers go on after step {survivors.NUM_STEPS}" in said
    assert survivors.summary(tmp_path)["weights_step"] == 30


def test_a_worker_that_stops_before_it_meets_the_others_is_ended(tmp_path: Path) -> None:
    strikes = (Strike(1, "averaging", 9), Strike(2, "meeting", 2, signal.SIGSTOP))
    said = survivors.check(tmp_path, Schedule(3, strikes))
    assert "1 worker goes on after step" in said


def test_a_worker_is_lost_while_the_run_resumes(tmp_path: Path) -> None:
    """The checkpoint is whole, and is not blamed for it."""
    plan = Schedule(3, tuple(Strike(seat, "averaging", 22) for seat in range(3)), is_sharded=True)
    with pytest.raises(AssertionError, match="exit code 1"):
        survivors.play(tmp_path, plan)
    survivors.check(tmp_path, replace(plan, strikes=(Strike(1, "keeping", 1),)))


@pytest.mark.parametrize("phase", ["building", "meeting"])
def test_a_signal_comes_while_a_new_worker_does(tmp_path: Path, phase: str) -> None:
    """While it prepares, it ends without having trained; once the others count on it, it stops together with them."""
    strikes = [[0, "averaging", 6, int(signal.SIGKILL)], [2, phase, 1, -5]]
    environment = {STRIKES: json.dumps(strikes), SLOW: "0.3", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, PROGRAM, "workers=2", "recovery=continue", "--max-restarts=1", *OVERRIDES]
    with started_by_user(command, tmp_path, environment) as process:
        deadline = time.monotonic() + SECONDS
        while f"late in {phase}" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 75, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "stopped by a signal after step" in said
    assert "have not saved" not in said


@pytest.mark.parametrize("seat", [0, 1])
def test_a_new_worker_takes_the_place_of_a_lost_one(tmp_path: Path, seat: int) -> None:
    plan = Schedule(2, (Strike(seat, "averaging", 6),), num_spare=1)
    said = survivors.check(tmp_path, plan)
    assert "1 worker goes on after step 5" in said
    assert "2 workers go on after step" in said, "the new worker came too late"
    assert survivors.summary(tmp_path)["num_workers"] == 2


def test_a_new_worker_with_other_code_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    """They still run the code that the file had when they began."""
    code = tmp_path / "own.py"
    code.write_text("from struck import Small\n\n\nclass Net(Small):\n    pass\n")
    environment = {
        STRIKES: f'[[0, "averaging", 12, {int(signal.SIGKILL)}]]',
        SLOW: "0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, PROGRAM, "workers=2", "recovery=continue", "--max-restarts=1", *OVERRIDES]
    with started_by_user([*command, "model._target_=own.Net"], tmp_path, environment) as process:
        deadline = time.monotonic() + SECONDS
        while "step 1/" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        code.write_text(code.read_text() + "\n    def extra_repr(self):\n        return 'other code'\n")
        assert process.wait(SECONDS) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "a new worker does not run the program that the others run: code of own: " in said
    assert "2 workers go on after" not in said
    weights, lines = survivors.undisturbed()
    assert survivors.summary(tmp_path)["weights_sha256"] == weights
    assert survivors.history(tmp_path) == lines


def test_the_folder_cannot_be_written_by_the_next_main_worker(tmp_path: Path) -> None:
    """The run ends, and as one that had begun: exit code 2 says that nothing has."""
    environment = {STRIKES: f'[[0, "averaging", 12, {int(signal.SIGKILL)}]]', SLOW: "0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, PROGRAM, "workers=2", "recovery=continue", *OVERRIDES]
    with started_by_user(command, tmp_path, environment) as process:
        wait_for(lambda: "step 1/" in (tmp_path / "log").read_text())
        (tmp_path / "run/.writable.tmp").mkdir()  # in the place of the file that is written to try
        assert process.wait(SECONDS) == 1, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "error: run.dir=run cannot be written" in said
    assert said.count("error") == 1


def test_a_frozen_worker_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    said = survivors.check(tmp_path, Schedule(3, (Strike(1, "forward", 30, signal.SIGSTOP),)))
    assert "2 workers go on after step" in said


def test_where_all_are_lost_all_start_again(tmp_path: Path) -> None:
    """Seats 0 and 1 are those of the second start, too, which is struck again; the third is not reached."""
    plan = Schedule(2, (Strike(0, "averaging", 22), Strike(1, "averaging", 22)), num_spare=0)
    with pytest.raises(AssertionError, match="exit code 1"):
        survivors.play(tmp_path, plan)
    assert any((tmp_path / "run/checkpoints").glob("step-*"))  # the newest may not have been written to its end
    survivors.play(tmp_path, Schedule(2, ()))
    weights, lines = survivors.undisturbed()
    assert survivors.summary(tmp_path)["weights_sha256"] == weights
    assert survivors.history(tmp_path) == lines


def test_an_error_in_a_worker_ends_the_run_as_ever(tmp_path: Path) -> None:
    plan = Schedule(2, (Strike(1, "forward", 30, 0),))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="exit code 1"):
        survivors.play(tmp_path, plan)
    said = (tmp_path / "log").read_text()
    assert "ArithmeticError" in said
    assert "go on" not in said
    assert "goes on" not in said


def test_survivors_stop_at_a_signal_and_the_run_resumes(tmp_path: Path) -> None:
    environment = {STRIKES: f'[[0, "averaging", 6, {int(signal.SIGKILL)}]]', SLOW: "0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, PROGRAM, "workers=2", "recovery=continue", *OVERRIDES]
    with started_by_user(command, tmp_path, environment) as process:
        deadline = time.monotonic() + SECONDS
        while "goes on after step" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 75, (tmp_path / "log").read_text()
    assert "stopped by a signal after step" in (tmp_path / "log").read_text()
    survivors.play(tmp_path, Schedule(2, ()))
    weights, lines = survivors.undisturbed()
    assert survivors.summary(tmp_path)["weights_sha256"] == weights
    assert survivors.history(tmp_path) == lines


@pytest.mark.parametrize(
    ("phase", "number"), [("stopping", signal.SIGTERM), ("stopping", signal.SIGINT), ("leaving", signal.SIGUSR1)]
)
def test_a_worker_is_lost_while_all_stop_at_a_signal(tmp_path: Path, phase: str, number: int) -> None:
    """The launcher still tells the others, which save."""
    environment = {STRIKES: f'[[1, "{phase}", 1, {int(signal.SIGKILL)}]]', SLOW: "0.05", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, PROGRAM, "workers=3", "recovery=continue", "--max-restarts=1", *OVERRIDES]
    with started_by_user(command, tmp_path, environment) as process:
        deadline = time.monotonic() + SECONDS
        while "step 1/" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        began = time.monotonic()
        assert process.wait(SECONDS) == 75, (tmp_path / "log").read_text()
        assert time.monotonic() - began < SECONDS_TO_STOP
    said = (tmp_path / "log").read_text()
    assert "lost  " in said
    assert "stopped by a signal after step" in said
    assert "error" not in said
    survivors.play(tmp_path, Schedule(2, ()))
    weights, lines = survivors.undisturbed()
    assert survivors.summary(tmp_path)["weights_sha256"] == weights
    assert survivors.history(tmp_path) == lines


def test_a_worker_lost_after_the_launcher_has_looked_is_lost_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch, which looks in between, would end the run for it."""
    monkeypatch.setenv(STORE, str(tmp_path / "store"))
    environments: dict[int, dict[str, str]] = {rank: {} for rank in range(3)}
    arguments: dict[int, tuple[str]] = dict.fromkeys(range(3), ("100",))
    processes = start_processes("sleep", "sleep", arguments, environments, DefaultLogsSpecs())
    try:
        rest = Rest(processes, "run", 0)
        first, second, _ = (processes.subprocess_handlers[rank].proc for rank in range(3))
        kill(first)
        rest.look(0)
        kill(second)
        assert rest.ended() is None
        rest.look(0)
        assert rest.ended() is None
        assert list(processes.subprocess_handlers) == [2]
        kill(processes.subprocess_handlers[2].proc)
        rest.look(0)
        assert rest.ended().is_failed()
    finally:
        processes.close()


def test_a_lost_worker_s_own_processes_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader processes hold its connections open: the others would wait until these notice."""
    monkeypatch.setenv(STORE, str(tmp_path / "store"))
    script = f"cd {tmp_path}; sleep 100 & echo $! > new-$RANK; mv new-$RANK child-$RANK; wait"
    environments = {rank: {"RANK": str(rank)} for rank in range(2)}
    arguments: dict[int, tuple[str, str]] = dict.fromkeys(range(2), ("-c", script))
    processes = start_processes("sh", "sh", arguments, environments, DefaultLogsSpecs())
    try:
        rest = Rest(processes, "run", 0)
        wait_for(lambda: all((tmp_path / f"child-{rank}").exists() for rank in range(2)))
        children = [Path("/proc") / (tmp_path / f"child-{rank}").read_text().strip() for rank in range(2)]
        kill(processes.subprocess_handlers[0].proc)
        assert not has_ended(children[0])
        rest.look(0)
        wait_for(lambda: has_ended(children[0]))
        assert not has_ended(children[1])
    finally:
        processes.close()


def has_ended(process: Path) -> bool:
    """process: its folder in /proc."""
    try:
        return ") Z" in (process / "stat").read_text()  # nobody has asked for its exit code
    except OSError:
        return True


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_a_signal_waits_until_the_launcher_has_answered() -> None:
    """Half of an answer would leave the workers waiting."""
    done = []

    def stop(number: int, frame: Any) -> None:
        done.append("stopped")

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with signals_held():
            signal.raise_signal(signal.SIGUSR1)
            done.append("answered")
        assert done == ["answered", "stopped"]
        assert signal.getsignal(signal.SIGUSR1) is stop
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_launcher_is_refused(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "train.py"), "recovery=continue", "epochs=1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode != 0
    assert "recovery=continue, but the launcher of these workers ends all when one is lost" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_nccl_is_refused() -> None:
    with pytest.raises(UsageError, match="recovery=continue over nccl"):
        Membership(HashStore(), 0, 2).begin("nccl")


def test_the_launcher_names_the_workers() -> None:
    store = HashStore()
    roster, first, third = Roster(store, 3), Membership(store, 0, 3), Membership(store, 2, 3)
    assert not roster.goes_on()
    first.begin("gloo")
    assert roster.goes_on()
    assert not first.has_changed()
    roster.publish([0, 2])
    assert third.wait_for_change()
    third.move_on()
    assert (third.rank, third.num_workers) == (1, 2)
    third.tell_silent([0])
    assert roster.silent() == [0]
    new = Membership(store, 3, 3)
    assert new.is_newcomer
    assert not roster.has_come(3)


def test_a_state_can_be_handed_on_at_once() -> None:
    """Buffers, too: put back are those of the state, not those of the new model."""
    first, second = (make_trainer() for _ in range(2))
    first.fit()
    wanted = first.snapshot()
    second.take_over(Carried(wanted, Progress(wanted.step, is_over=True)))
    carried = second.carried([])
    assert carried is not None
    assert carried.progress.step == wanted.step
    for file, tensors in wanted.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(carried.snapshot.tensors[file][name], tensor), name


def make_trainer() -> mbgd.Trainer:
    torch.manual_seed(0)
    model = Small()
    data = mbgd.Data(train=mbgd.data.digits("test"))
    settings = mbgd.Settings(steps=5, batch=mbgd.Batch(64))
    return mbgd.Trainer(model, mbgd.CrossEntropy(), torch.optim.AdamW(model.parameters()), data, settings)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (Progress(4, {"eval/loss": 1.0}, [], True), Progress(5)),
        (Progress(5), Progress(5, {"eval/loss": 1.0})),
        (Progress(5, {"eval/loss": 1.0}), Progress(5, {"eval/loss": 1.0}, [])),
        (Progress(5, {"eval/loss": 1.0}, []), Progress(5, None, None, True)),
    ],
)
def test_the_worker_that_is_furthest_gives_the_state(less: Progress, more: Progress) -> None:
    assert less.order < more.order


def test_lines_of_another_worker_are_written_once() -> None:
    written: list[Any] = []

    class Lines:
        def progress(self, step: int) -> None:
            pass

        def log(self, step: int, metrics: Any) -> None:
            written.append((step, metrics))

        def observed(self, name: str, step: int, values: Any) -> None:
            written.append((step, name, values))

        def close(self, ending: Any) -> None:
            pass

    ahead, behind = Recent(Trackers()), Recent(Trackers([Lines()]))
    for one in (ahead, behind):
        one.log(3, {"train/loss": 1.0})
        one.log(4, {"train/loss": 2.0})
    ahead.observed("histograms", 4, {"a": 1})
    ahead.log(4, {"eval/loss": 3.0})
    behind.catch_up(ahead.told)
    behind.catch_up(ahead.told)
    assert written == [
        (3, {"train/loss": 1.0}),
        (4, {"train/loss": 2.0}),
        (4, "histograms", {"a": 1}),
        (4, {"eval/loss": 3.0}),
    ]
    ahead.log(5, {"train/loss": 4.0})
    behind.catch_up(ahead.told)
    assert written[-1] == (5, {"train/loss": 4.0})
    assert behind.told == ahead.told
