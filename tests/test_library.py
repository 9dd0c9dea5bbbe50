"""mbgd as a library: checkpoints, resuming and signals in a program of one's own, and a process left as it was."""

import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from test_observers import trainer

import mbgd

from processes import eventually, free_port, run_workers
from small_runs import StopAt

ROOT = Path(__file__).parent.parent


def stop_and_go_on(workers: mbgd.Workers, folder: str) -> tuple[str, str]:
    """The hash of an undisturbed run, and of one stopped after 5 steps that goes on in another trainer."""
    whole = trainer(workers, ())
    whole.fit()
    first = trainer(workers, ())
    checkpoints = mbgd.Checkpoints(folder, first)
    assert not checkpoints.resume()
    with pytest.raises(mbgd.Preempted):
        first.fit(None, checkpoints, StopAt(5))
    del checkpoints, first  # the folder's lock with it
    second = trainer(workers, ())
    checkpoints = mbgd.Checkpoints(folder, second)
    assert checkpoints.resume()
    assert second.state.step == 5
    second.fit(None, checkpoints)
    return whole.weights_sha256(), second.weights_sha256()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_goes_on_to_the_same_bits(num_workers: int, tmp_path: Path) -> None:
    for whole, cut in run_workers(stop_and_go_on, num_workers, str(tmp_path)):
        assert whole == cut


def test_a_checkpoint_with_another_seed_is_refused(tmp_path: Path) -> None:
    first = trainer(mbgd.Workers(), ())
    first.fit(checkpoints=mbgd.Checkpoints(tmp_path, first))
    made = trainer(mbgd.Workers(), ())
    object.__setattr__(made.setup, "settings", mbgd.Settings(seed=1, precision="fp64", batch=mbgd.Batch(10)))
    with pytest.raises(mbgd.UsageError, match=r"seed: 0 before, 1 now"):
        mbgd.Checkpoints(tmp_path, made).resume()


def test_best_must_be_a_metric(tmp_path: Path) -> None:
    with pytest.raises(mbgd.UsageError, match=r"checkpoint.best=eval/f1, which no evaluation gives"):
        mbgd.Checkpoints(tmp_path, trainer(mbgd.Workers(), ()), mbgd.Checkpoint(best="eval/f1"))


def test_the_example_goes_on_after_a_signal(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/library_resume.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = tmp_path / "metrics.jsonl"
    eventually(lambda: (lines.exists() and lines.read_text().count("\n") > 2) or process.poll() is not None, 60)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (0, 75)  # 0: training was over before the signal came
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "stopped by early_stopping" in done.stdout or "the last step" in done.stdout


def shown_class(name: str) -> Any:
    """The class of this name in docs/bring_your_own.md, made there of at most 10 lines."""
    text = (ROOT / "docs/bring_your_own.md").read_text()
    block = text[text.index(f"    class {name}:\n") :].split("\n\n")[0]
    assert block.count("\n") < 10
    namespace: dict[str, Any] = {"math": math, "wandb": pytest.importorskip("wandb")}
    exec(textwrap.dedent(block), namespace)
    return namespace[name]


def test_the_observer_in_the_docs_runs() -> None:
    best = shown_class("Best")()
    made = trainer(mbgd.Workers(), [best])
    made.fit()
    again = shown_class("Best")()
    trainer(mbgd.Workers(), [again]).restore(made.snapshot())
    assert again.best == best.best < math.inf


def test_the_tracker_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = shown_class("Wandb")(mode="offline", dir=tmp_path, project="own")
    made = trainer(mbgd.Workers(), ())
    log = mbgd.JsonLines(tmp_path / "metrics.jsonl")
    made.fit(mbgd.Trackers([tracker, log]))
    tracker.close(None)
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") >= 12


def test_process_wide_settings_are_put_back() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with mbgd.start_workers() as workers:
        trainer(workers, (), averaging="reproducible").fit()
        assert torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
