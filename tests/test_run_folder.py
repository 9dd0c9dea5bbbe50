"""Which folder a run gets: its own, the same for all restarts, and with what each worker said."""

import subprocess
import sys
from pathlib import Path

import pytest

from mbgd import Workers
from mbgd.building.build import run_name
from mbgd.config import Run
from mbgd.errors import UsageError
from mbgd.runs.names import id_of_restarts
from mbgd.runs.run_folder import open_run_folder
from mbgd.text.suggestions import nearest
from mbgd.workers.log import start_log

UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"


def open_folder(root: Path, name: str = "mlp-digits", **run: str) -> Path:
    return open_run_folder(Run(root=str(root), **run), name, Workers(), may_hold_a_run=False).path


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = {open_folder(tmp_path) for _ in range(20)}
    assert len(folders) == 20
    assert all("_mlp-digits-" in folder.name and folder.parent == tmp_path for folder in folders)
    assert open_folder(tmp_path, id="mine") == tmp_path / "mine"
    with pytest.raises(UsageError, match="already holds a run"):
        open_folder(tmp_path, id="mine")


def test_restarts_of_a_run_share_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", UUID)
    run = Run(root=str(tmp_path))
    first = open_run_folder(run, "gpt", Workers(), may_hold_a_run=True).path
    assert open_run_folder(run, "gpt", Workers(), may_hold_a_run=True).path == first
    assert open_run_folder(run, "cnn", Workers(), may_hold_a_run=True).path != first
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", UUID[::-1])
    assert open_run_folder(run, "gpt", Workers(), may_hold_a_run=True).path != first


def test_a_folder_that_another_process_writes_to_is_left_alone_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mbgd.runs.run_folder.SECONDS_FOR_ANOTHER_RUN_TO_END", 0.1)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (tmp_path / "lock").write_text("process 12 on node7")
        with pytest.raises(UsageError, match=r"by another run \(process 12 on node7\)"):
            open_run_folder(Run(dir=str(tmp_path)), "", Workers(), may_hold_a_run=True)
        assert "waiting" in capsys.readouterr().out
        other.kill()
    folder = open_run_folder(Run(dir=str(tmp_path)), "", Workers(), may_hold_a_run=True)
    assert folder.path == tmp_path


def test_the_id_comes_from_slurm_before_torchrun() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": UUID}
    batch = torchrun | {"SLURM_JOB_ID": "712", "SLURM_PROCID": "0"}
    assert id_of_restarts({}) == id_of_restarts({"TORCHELASTIC_RUN_ID": "none"}) == ""
    assert id_of_restarts(torchrun) == "0f8fad5b"
    assert id_of_restarts({"TORCHELASTIC_RUN_ID": "team/long-name-1"}) == "team-long-name-1"
    assert id_of_restarts(batch) == "slurm712"
    assert id_of_restarts(batch | {"SLURM_STEP_ID": "3"}) == "slurm712.3"
    assert id_of_restarts(torchrun | {"SLURM_JOB_ID": "712"}) == "0f8fad5b"  # an interactive allocation


def test_a_run_is_named_by_its_experiment_or_its_parts() -> None:
    choices = {"model": "cnn", "data": "digits", "experiment": "null"}
    assert run_name(Run(), choices) == run_name(Run(), choices | {"experiment": None}) == "cnn-digits"
    assert run_name(Run(), choices | {"experiment": "vision/large"}) == "vision-large"
    assert run_name(Run(name="mine"), choices) == "mine"


def test_a_workers_log_holds_all_starts_but_no_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back at the end
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    path = tmp_path / "logs/worker-3.log"
    for start in (1, 2):
        start_log(path, 3, 4)
        print(f"said {start}")
        print("\x1b[2Kredrawn", end="\r")
        print(f"warned {start}", file=sys.stderr)
    text = path.read_text()
    assert text.count("worker 3 of 4, process") == 2
    assert [word in text for word in ("said 1", "said 2", "warned 1", "warned 2", "redrawn")] == [True] * 4 + [False]
    assert "redrawn" in capsys.readouterr().out


VALID = ["batch.size", "batch.micro_batch_size", "batch.last", "model", "optimizer.lr", "evaluation.batch_size", "seed"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("batch.sise", ["batch.size"]),
        ("batch.micro_size", ["batch.micro_batch_size", "batch.size"]),
        ("lr", ["optimizer.lr"]),
        ("batch_size", ["evaluation.batch_size"]),
        ("batch.micro", ["batch.micro_batch_size"]),
        ("modle", ["model"]),
        ("zzz", []),
        ("", []),
    ],
)
def test_the_nearest_names(name: str, expected: list[str]) -> None:
    assert nearest(name, VALID)[: len(expected) or None] == expected
