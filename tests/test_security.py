"""Who can reach a run: its sockets and its store, what is unpickled, where its key is."""

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mbgd import torchrun

import wandb_server
from own_processes import listening, marked, started_by_user
from processes import eventually

ROOT = Path(__file__).parent.parent
ENDLESS = ["steps=1000000", "log_every_steps=10", "backend=gloo"]
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
NOBODY = "65534"


def trains(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def checkpoints(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob("step-*/manifest.json"))


def test_the_test_itself_sees_who_listens_where() -> None:
    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("0.0.0.0", 0)):
        assert listening([os.getpid()]) >= {"127.0.0.1", "0.0.0.0"}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_run_on_one_host_is_open_to_nobody_and_a_closed_terminal_saves_it(tmp_path: Path) -> None:
    command = [str(ROOT / "launch/local.sh"), *ENDLESS, "averaging=ddp", "run.dir=run"]
    with started_by_user(command, tmp_path, {"WORKERS": "2"}) as process:
        eventually(lambda: trains(tmp_path / "run"), 120)
        processes = marked(tmp_path)
        assert len(processes) >= 3  # torchrun and two workers
        assert listening(processes) <= LOOPBACK
        assert listening([process.pid]) == set()
        stores = [
            link
            for link in Path(f"/proc/{process.pid}/fd").iterdir()
            if "mbgd-store" in os.fsdecode(os.readlink(link))  # noqa: PTH115 - pathlib's would need the link's target
        ]
        assert len(stores) == 1
        assert stores[0].stat().st_mode & 0o777 == 0o600
        if os.geteuid() == 0 and shutil.which("setpriv"):
            stranger = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            read = subprocess.run([*stranger, "cat", str(stores[0])], capture_output=True, text=True)
            assert "Permission denied" in read.stderr
            assert subprocess.run(["cat", str(stores[0])], capture_output=True, check=True).stdout
        process.send_signal(signal.SIGHUP)
        process.wait(60)
        eventually(lambda: not marked(tmp_path), 60)
    assert checkpoints(tmp_path / "run"), (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_sweep_is_open_to_nobody_and_its_jobs_end_with_it(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *ENDLESS, "hydra.launcher.nproc_per_node=2"]
    command += ["averaging=ddp", "seed=0,1", "hydra.sweep.dir=made"]
    with started_by_user(command, tmp_path, {"CUDA_VISIBLE_DEVICES": ""}) as process:
        eventually(lambda: trains(tmp_path / "made/0"), 120)
        processes = marked(tmp_path)
        assert len(processes) >= 4
        assert listening(processes) <= LOOPBACK
        process.kill()
        eventually(lambda: not marked(tmp_path), 60)
    assert checkpoints(tmp_path / "made/0")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch reached",)


def test_of_the_hosts_state_only_what_torch_writes_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import UTC, datetime

    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

    monkeypatch.chdir(tmp_path)
    state = _RendezvousState()
    node = _NodeDesc("10.0.0.1", 1, 2)
    state.deadline, state.participants, state.wait_list = datetime.now(UTC), {node: 0}, {node}
    assert vars(torchrun.load_state(pickle.dumps(state))) == vars(state)
    state.participants = {Evil(): 0}
    with pytest.raises(pickle.UnpicklingError, match="system is no part of a rendezvous' state"):
        torchrun.load_state(pickle.dumps(state))
    assert not (tmp_path / "reached").exists()


def test_a_key_that_others_can_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    monkeypatch.setenv(torchrun.KEY_FILE, str(key))
    with pytest.raises(SystemExit, match="cannot be read: No such file"):
        torchrun._key()
    key.write_text("0123456789abcdef")
    key.chmod(0o640)
    with pytest.raises(SystemExit, match="chmod 600"):
        torchrun._key()
    key.chmod(0o600)
    assert len(torchrun._key()) == 65
    assert "0123456789abcdef" not in torchrun._key()
    key.write_text("short")
    with pytest.raises(SystemExit, match="holds 5 bytes"):
        torchrun._key()


def test_the_key_of_wandb_is_in_no_file_and_in_no_process_list(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mbgd[wandb]'")
    key = "fedcba9876543210" * 2 + "89abcdef"
    own = {"WANDB_CONFIG_DIR": "config", "WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache", "HOME": str(tmp_path)}
    patient = "tracking.wandb.init_timeout_seconds=100"  # on a busy machine, W&B's own processes start slowly
    command = [str(ROOT / "launch/local.sh"), *ENDLESS, "run.dir=run", "tracking=wandb", patient]
    with wandb_server.working() as server:
        environment = own | {"WORKERS": "2", "WANDB_API_KEY": key, "WANDB_BASE_URL": server.url}
        environment["WANDB_SERVICE"] = "3-1-unix-/nowhere"  # as a program that uses W&B leaves to those it starts
        with started_by_user(command, tmp_path, environment) as process:
            eventually(lambda: server.history, 200)
            lines = [path.read_bytes() for pid in marked(tmp_path) if (path := Path(f"/proc/{pid}/cmdline")).exists()]
            assert len(lines) >= 3
            process.terminate()
            process.wait(60)
            eventually(lambda: not marked(tmp_path), 60)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"log", "config.yaml", "worker-0.log"} <= {path.name for path in files}
    assert any("wandb" in path.parts for path in files)
    assert not [path for path in files if key.encode() in path.read_bytes()]
    assert not [line for line in lines if key.encode() in line]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_worker_that_is_lost_is_started_again_and_sigusr1_saves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mbgd.torchrun", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += [str(ROOT / "train.py"), *ENDLESS, "run.dir=run", "checkpoint.every_steps=50"]
    with started_by_user(command, tmp_path, {"PYTHONPATH": str(ROOT)}) as process:
        eventually(lambda: checkpoints(run), 120)
        before = set(marked(tmp_path))
        os.kill(max(before - {process.pid}), signal.SIGKILL)
        eventually(lambda: not before & set(marked(tmp_path)) - {process.pid}, 60)
        eventually(lambda: "resume      step" in (tmp_path / "log").read_text(), 60)
        saved = max(checkpoints(run))
        eventually(lambda: max(checkpoints(run)) > saved, 60)
        process.send_signal(signal.SIGUSR1)
        process.wait(60)
        eventually(lambda: not marked(tmp_path), 60)
    assert "the same command goes on from there" in (tmp_path / "log").read_text()
