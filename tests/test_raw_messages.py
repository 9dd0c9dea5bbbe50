"""Commands that others would answer in their own words, or not at all: `train.py`, its tools and the launchers."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_command_line import ROOT, train

from mbgd.text import plain_output

FAST = ("steps=1", "tracking.report=false", "noise_scale.every_steps=null")


def run_in(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    added = {"OMP_NUM_THREADS": "1", "PATH": path, **environment}
    return subprocess.run(
        command, cwd=folder, env=os.environ | added, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unknown_experiment_is_refused(tmp_path: Path, num_workers: int) -> None:
    done = train(tmp_path, "experiment=fashion_cn", num_workers=num_workers)
    assert done.returncode == (1 if num_workers else 2)  # torchrun makes 1 of everything
    assert "Could not find 'experiment/fashion_cn'" in done.stderr
    assert "Did you mean fashion_cnn?" in done.stderr
    assert not list(tmp_path.iterdir())


def test_experiments_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text("# @package _global_\nseed: 7\n")
    for place in (["--config-dir", "own"], ["hydra.searchpath=[file://own]"]):
        done = train(tmp_path, *place, "experiment=mine", *FAST, "run.dir=out")
        assert done.returncode == 0, done.stderr
        assert "seed: 7" in (tmp_path / "out/config.yaml").read_text()
        done = train(tmp_path, *place, "experiment=mime")
        assert done.returncode == 2
        assert "Did you mean mine?" in done.stderr
    done = train(tmp_path, "hydra.searchpath=[file://owm]", *FAST)
    assert done.returncode == 2
    assert "file://owm, named by hydra.searchpath" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_sweep_over_an_unknown_experiment_is_refused(tmp_path: Path) -> None:
    done = train(tmp_path, "-m", "experiment=digits_mlp,digits_mpl", *FAST)
    assert done.returncode == 2
    assert "Did you mean digits_mlp?" in done.stderr
    assert "job 0" not in done.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.dir=a b é"], """'run.dir="a b é"'"""),
        (["run.dir=a=b"], """'run.dir="a=b"'"""),
        (["tracking.wandb.tags=[é]"], "texts with spaces or accents inside it in quotation marks of their own"),
        (["steps"], "steps is neither an option nor key=value"),
        (["model="], "names none of the choices of model (cnn, gpt, linear, mlp, own, resnet); ~model leaves"),
        (["schedule=null"], "~schedule leaves the group out"),
        (["experiment=null"], "without it there is none"),
        (["~epochs"], "~epochs leaves out a setting that is needed. Give it a value: epochs=…"),
        (["~batch"], "~batch leaves out a setting that is needed"),
        (["~ema.decay"], "Give it a value: ema.decay=…, or ema.decay=null where it may be"),
        (["batch.size=${nothing.here}"], "batch.size refers to a key that does not exist: Interpolation key"),
        (["run.name=${oc.env:MBGD_IS_NOT_SET}"], "run.name cannot be resolved: KeyError"),
        (["-m", "model=mlp,null"], "names none of the choices of model"),
        (["model.hidden=128"], "model.hidden=128; it takes a list of numbers, such as model.hidden=[128]"),
        (["optimizer.lr=fast"], "optimizer.lr=fast; it takes a number"),
        (["+foo=1"], "Key 'foo' not in 'Config'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_raw_messages_become_ours(tmp_path: Path, overrides: list[str], message: str) -> None:
    done = train(tmp_path, *overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_quotation_marks_that_are_shown_work(tmp_path: Path) -> None:
    done = train(tmp_path, 'run.dir="a b é"', *FAST)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a b é/summary.json").exists()


@pytest.mark.parametrize("workers", ["abc", "0", "-1", "1.5", "2 ", "08"])
def test_the_number_of_workers_is_checked_by_the_launcher(tmp_path: Path, workers: str) -> None:
    done = run_in(tmp_path, str(ROOT / "launch/local.sh"), WORKERS=workers)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: WORKERS={workers}; it must be a whole number >= 1: how many processes train on this host\n"
    )


ASCII = {"PYTHONIOENCODING": "ascii"}
C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [ASCII, C], ids=["ascii", "C"])
def test_output_that_takes_ascii_alone(tmp_path: Path, environment: dict[str, str]) -> None:
    done = run_in(tmp_path, sys.executable, str(ROOT / "train.py"), *FAST, "run.dir=out", **environment)
    assert done.returncode == 0, done.stderr
    assert "minibatch   64 = 1 worker x 1 micro-batch x 64" in done.stdout
    assert done.stdout.isascii()
    done = run_in(tmp_path, sys.executable, "-m", "mbgd", "checkpoints", "nowhere·", **environment)
    assert done.returncode == 2
    assert "UnicodeEncodeError" not in done.stderr


def test_what_stands_for_characters_that_an_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    plain_output.start()
    print("a → b · 2 × 3 ≥ é\udce9", flush=True)
    assert written.getvalue() == b"a -> b - 2 x 3 >= \\xe9\\udce9\n"
    for path in [*(ROOT / "mbgd").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]:
        lacking = {one for one in path.read_text(encoding="utf-8") if not one.isascii()}
        assert lacking <= plain_output.PLAIN.keys(), path


def test_a_progress_bar_that_takes_ascii_alone(tmp_path: Path) -> None:
    program = f"""
import os, pty, sys
def read(fd):
    return os.read(fd, 65536)
code = pty.spawn([sys.executable, {str(ROOT / "train.py")!r}, "epochs=2", "run.dir=out"], read)
sys.exit(os.waitstatus_to_exitcode(code))
"""
    done = run_in(tmp_path, sys.executable, "-c", program, TERM="xterm", **ASCII)
    assert done.returncode == 0, done.stdout
    assert "step 23/46 - eval loss" in done.stdout
    assert done.stdout.isascii()
