"""The real wandb, offline and with servers on loopback that work or do not: nothing of it ever hurts training."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import mbgd
from mbgd.checkpoints.format import read
from mbgd.errors import Preempted
from mbgd.files import observed
from mbgd.runs.trackers import check_installed
from mbgd.tracking import Ending, Outcome
from mbgd.tracking.follower import Follower

import runs
import wandb_files
import wandb_server
from processes import eventually
from runs import metrics

KEY = "0123456789abcdef" * 2 + "01234567"

pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mbgd[wandb]'")


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no settings, and no run of whoever starts the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-settings"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def run(folder: Path, *overrides: str, **options: Any) -> float:
    return runs.run(folder, "tracking=wandb", *overrides, **options)


def merged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each step, as W&B has them."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update(line)
    return list(rows.values())


def offline_files(folder: Path) -> list[dict[str, Any]]:
    return [wandb_files.read(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def history(folder: Path) -> list[dict[str, Any]]:
    return [row for file in offline_files(folder) for row in file["history"]]


def test_histograms_are_sent_once_with_the_metrics_of_their_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        run(folder, "histograms.steps=6", stop_at=20)
    run(folder, "histograms.steps=6")
    lines, problem = observed.read(folder, observed.HISTOGRAMS, observed.HistogramLine)
    assert problem == ""
    wanted: list[dict[str, Any]] = metrics(folder)
    for line in lines:  # at steps 9, 18, 28, 37 no metrics are logged
        values: dict[str, Any] = {}
        for name, one in observed.by_name(line):
            counts, edges = one.counts_and_edges()
            values |= {f"{name}/_type": "histogram", f"{name}/values": counts, f"{name}/bins": edges}
        wanted.append({"step": line.step, **values})
    rows = history(folder)
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows == merged(sorted(wanted, key=lambda row: row["step"]))


def test_an_offline_run_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    kept = ["tracking.wandb.log_checkpoints=true", "checkpoint.best=eval/loss"]
    run(folder, "tracking.wandb.tags=[a,b]", "tracking.wandb.group=sweep", *kept)
    [file] = offline_files(folder)
    assert file["history"] == merged(metrics(folder))
    assert file["metrics"] == {"step": "", "*": "step"}
    assert (file["name"], file["group"], file["tags"], file["project"]) == ("run", "sweep", ["a", "b"], "mbgd")
    assert file["config"]["optimizer"]["lr"] == 0.01
    assert file["config"]["plan"]["steps"] == "46, 23 an epoch"
    assert set(file["config"]["code"]) <= {"commit", "dirty"}
    summary = json.loads((folder / "summary.json").read_text())
    assert file["summary"]["eval/accuracy"] == summary["metrics"]["eval/accuracy"]
    assert file["summary"]["weights_sha256"] == summary["weights_sha256"]
    assert (file["exit"], file["alerts"]) == (0, [])
    assert file["artifacts"] == [(f"checkpoint-{file['id']}", ["best", "last", "latest"])]
    # The run's id is with the folder and with its checkpoints.
    checkpoint = max(folder.glob("checkpoints/step-*"))
    assert read(checkpoint)[0].values["tracking"] == {"wandb": file["id"]}
    assert json.loads((folder / "wandb/state.json").read_text()) == {"id": file["id"], "sent_step": 46}
    assert f"offline; to upload it: wandb sync {folder}/wandb/offline-run-" in capsys.readouterr().out


def test_a_run_that_goes_on_is_the_same_run_without_repeats_or_gaps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        run(folder, stop_at=17)
    (folder / "wandb/state.json").unlink()  # then the checkpoint knows
    run(folder)
    before, after = offline_files(folder)
    assert before["id"] == after["id"]
    assert before["alerts"] == [("preempted", "stopped by a signal after step 17")]
    assert before["preempting"]
    assert (before["exit"], after["exit"]) == (1, 0)
    rows = [*before["history"], *(row for row in after["history"] if row["step"] > 17)]
    assert rows == merged(metrics(folder))


def test_online_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with wandb_server.working() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with pytest.raises(Preempted):
            run(folder, "tracking.wandb.tags=[a]", stop_at=17)
        assert server.exit_code == 1
        # The last rows never reached the server: it decides where to go on, not what the folder believes.
        del server.history[-2:]
        run(folder, "tracking.wandb.tags=[a]")
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in server.history]
    assert [row["step"] for row in rows] == [row["step"] for row in merged(metrics(folder))]
    assert rows == merged(metrics(folder))
    assert server.exit_code == 0
    assert {sent["name"] for sent in server.runs} == {json.loads((folder / "wandb/state.json").read_text())["id"]}
    assert server.runs[0]["tags"] == ["a"]
    assert f"{server.url}/me/mbgd/runs/" in capsys.readouterr().out
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), f"the key is in {path}"


@pytest.mark.parametrize(
    "server", [wandb_server.refusing, wandb_server.never_answering, wandb_server.answering_with_errors]
)
def test_without_a_server_that_works_training_goes_on_and_ends_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Callable[[], AbstractContextManager[str]]
) -> None:
    folder = tmp_path / "run"
    with server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        limits = ["tracking.wandb.init_timeout_seconds=300", "tracking.wandb.finish_seconds=1"]
        start = time.monotonic()
        assert run(folder, *limits) < 60  # nowhere near the 300 s in which W&B would give up
        assert time.monotonic() - start < 90
    assert history(folder) == merged(metrics(folder))
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), f"the key is in {path}"


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While training goes on, that is: after `init_timeout_seconds` the next logged step starts it again, offline."""
    folder = tmp_path / "run"

    def wait_at_the_25th(step: int) -> None:
        if step == 25:
            eventually(lambda: b"Traceback" in (folder / "wandb/output.log").read_bytes())

    with wandb_server.never_answering() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        run(folder, "tracking.wandb.init_timeout_seconds=1", after_step=wait_at_the_25th)
    assert history(folder) == merged(metrics(folder))


def test_a_server_that_falls_silent_later_holds_the_end_for_seconds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with wandb_server.working() as server:
        server.takes_history.clear()
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)

        def wait_at_the_25th(step: int) -> None:  # W&B may need longer to begin than all of this training
            if step == 25:
                eventually(lambda: server.runs)

        start = time.monotonic()
        run(folder, "tracking.wandb.finish_seconds=8", after_step=wait_at_the_25th)
        assert time.monotonic() - start < 60  # without the limit: for ever
        server.takes_history.set()
    said = re.search(r"not everything is uploaded; later: wandb sync (\S+)", capsys.readouterr().out)
    [path] = Path(said[1]).glob("*.wandb")
    assert wandb_files.read(path)["history"] == merged(metrics(folder))


def test_a_crash_of_wandbs_own_process_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def kill_at_the_25th(step: int) -> None:
        if step == 25:
            [core] = eventually(lambda: processes_of(folder, "wandb-core"))
            eventually(lambda: b"offline" in b"".join(path.name.encode() for path in folder.glob("wandb/*")))
            os.kill(core, signal.SIGKILL)

    run(folder, after_step=kill_at_the_25th)
    rows = {row["step"]: row for row in history(folder)}
    assert list(rows.values()) == merged(metrics(folder))


def test_a_training_process_that_is_killed_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = multiprocessing.get_context("forkserver").Process(target=run_and_die, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    [file] = eventually(lambda: [file for file in offline_files(folder) if file["exit"] is not None])
    assert file["alerts"] == [("training failed", "the training process died")]
    assert file["exit"] == 1
    assert file["history"] == merged(metrics(folder))
    eventually(lambda: not processes_of(folder, ""))


def run_and_die(folder: Path) -> None:
    run(folder, after_step=lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 30 else None)


def test_quiet_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", "tracking.quiet=true")
    assert capfd.readouterr() == ("", "")


def test_a_loss_that_is_not_finite_raises_an_alert(tmp_path: Path) -> None:
    with pytest.raises(mbgd.UsageError):
        run(tmp_path / "run", "optimizer=sgd", "optimizer.lr=1e30")
    [file] = offline_files(tmp_path / "run")
    [(title, text)] = file["alerts"]
    assert title == "training failed"
    assert "the loss is not finite at step 2" in text
    assert file["exit"] == 1


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbgd.config import Tracking, Wandb, WandbMode

    monkeypatch.setattr("mbgd.runs.trackers.find_spec", lambda name: None)
    with pytest.raises(mbgd.UsageError, match=r"pip install 'mbgd\[wandb\]'"):
        check_installed(Tracking(wandb=Wandb(mode=WandbMode.auto)))
    with pytest.raises(mbgd.UsageError, match=r"pip install 'mbgd\[tensorboard\]'"):
        check_installed(Tracking(tensorboard=True))
    check_installed(Tracking())


def test_a_sink_that_always_fails_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follower = Follower("wandb", tmp_path, finish_seconds=10)  # there is no configuration in this folder
    for step in range(100):
        follower.log(step, {})
        time.sleep(0.02)
    follower.close(Ending(Outcome.finished))
    assert "wandb failed; all metrics are in" in capsys.readouterr().out
    assert (tmp_path / "wandb/output.log").read_text().count("FileNotFoundError: ") == 3


def processes_of(folder: Path, name: str) -> list[int]:
    """Processes of this name that the follower of a run has started, or it itself."""
    listed = subprocess.run(["ps", "-ewwo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()[1:]]
    followers = {pid for pid, _, command in rows if "mbgd.tracking.follow" in command and str(folder) in command}
    return [int(pid) for pid, parent, command in rows if {pid, parent} & followers and name in command]
