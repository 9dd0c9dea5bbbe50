"""mbgd as a user has it: a wheel in a fresh environment, and a project of their own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from own_processes import listening, marked, started_by_user
from processes import eventually

ROOT = Path(__file__).parent.parent
FAST = ("tracking.report=false", "noise_scale.every_steps=null")
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

PARTS = """
import os
import torch.nn.functional as F
import mbgd

count = 0


def losses(model, batch):
    return mbgd.PerExample(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))


def shared(model, batch):
    return losses(model, batch[0][0][0][0][0].undefined_name)


def on_one_worker(model, batch):
    global count
    count += 1
    if count > 12 and os.environ["RANK"] == "1":
        raise ValueError("only here")
    return losses(model, batch)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a fresh environment with the wheel in it; what mbgd needs is there as it is here."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("mbgd", "hydra_plugins", "conf", "launch"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run(wheel, check=True, timeout=120)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    install = [
        *pip,
        "--python",
        str(environment / "bin/python"),
        "install",
        "-q",
        "--no-deps",
        *map(str, folder.glob("*.whl")),
    ]
    subprocess.run(install, check=True, timeout=120)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "theirs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return environment / "bin"


@pytest.fixture(scope="module")
def alone(installed: Path) -> Path:
    """The commands of a fresh environment with the wheel in it, and what pyproject.toml requires without an extra."""
    environment = installed.parent.with_name("alone")
    shutil.copytree(installed.parent, environment, symlinks=True)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "theirs.pth").unlink()
    for script in (environment / "bin").iterdir():
        if not script.is_symlink() and script.is_file():
            script.write_text(script.read_text().replace(str(installed.parent), str(environment)))
    for one in required(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]):
        for name in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(one.locate_file(name))))
    return environment / "bin"


def required(requirements: list[str]) -> list[Distribution]:
    """The packages that these requirements install, with those that they require in turn."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(one) for one in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = distribution(name)
            waiting += [Requirement(one) for one in found[name].requires or []]
    return list(found.values())


@pytest.fixture(scope="module")
def project(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("projects")
    done = mbgd(installed, folder, "new", "mine")
    assert done.returncode == 0, done.stderr
    (folder / "mine/parts.py").write_text(PARTS)
    return folder / "mine"


def environment_of(installed: Path) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    return inherited | {"PATH": f"{installed}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}


def mbgd(installed: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(installed / "mbgd"), *arguments],
        cwd=folder,
        env=environment_of(installed) | variables,
        capture_output=True,
        text=True,
        timeout=180,
    )


def num_lines(text: str) -> int:
    return len(text.splitlines())


def test_a_project_trains_sweeps_resumes_and_evaluates(installed: Path, project: Path) -> None:
    done = mbgd(installed, project, "train", "experiment=first", "workers=2", "run.dir=a", *FAST)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    summary = json.loads((project / "a/summary.json").read_text())
    assert summary["num_workers"] == 2
    assert summary["metrics"]["eval/accuracy"] > 0.95
    assert done.stdout.index("folder      a") < done.stdout.index("step 1/400")

    done = mbgd(
        installed, project, "train", "-m", "experiment=first", "seed=1,2", "steps=3", "hydra.sweep.dir=s", *FAST
    )
    assert done.returncode == 0, done.stderr
    assert (project / "s/sweep.csv").exists()

    longer = ("experiment=first", "schedule=constant", "run.dir=b", *FAST)
    assert mbgd(installed, project, "train", *longer, "steps=3").returncode == 0
    (project / "b/run.json").write_text((project / "b/run.json").read_text().replace('"mbgd": "', '"mbgd": "9.9.'))
    done = mbgd(installed, project, "train", *longer, "steps=5")
    assert "resume      step 3, from b/checkpoints" in done.stdout
    assert "note: mbgd 9.9." in done.stdout
    evaluate = ("experiment=first", "resume=a", "run.dir=c", "data.evaluation.num_examples=100", *FAST)
    done = mbgd(installed, project, "train", *evaluate)
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((project / "c/summary.json").read_text())
    assert evaluated["weights_sha256"] == summary["weights_sha256"]
    assert evaluated["metrics"]["eval/loss"] != summary["metrics"]["eval/loss"]


def test_without_any_extra_the_default_trains_sweeps_and_is_explained(alone: Path, tmp_path: Path) -> None:
    """`pip install mbgd` and `mbgd train`."""
    command = [str(alone / "python"), "-c", "import torch, sklearn"]
    done = subprocess.run(command, env=environment_of(alone), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "No module named 'sklearn'" in done.stderr, "a package that only an extra requires is not there"
    done = mbgd(alone, tmp_path, "train", "steps=2", "run.dir=run")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert (tmp_path / "run/report.html").exists()
    done = mbgd(alone, tmp_path, "train", "-m", "seed=1,2", "steps=2", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sweep/sweep.svg").exists()
    done = mbgd(alone, tmp_path, "explain", "batch.size=4")
    assert done.returncode == 0, done.stderr
    assert "data:image/png;base64," in (tmp_path / "explain.html").read_text()


def test_the_launcher_for_slurm_is_in_the_package(installed: Path, tmp_path: Path) -> None:
    sweep = ("train", "-m", "hydra/launcher=slurm", "seed=1,2", "hydra.sweep.dir=sweep")
    done = mbgd(installed, tmp_path, *sweep, PATH=str(installed))
    assert f"sbatch is not installed here. Where it is: sbatch {tmp_path}/sweep/array-0.sbatch" in done.stderr
    text = (tmp_path / "sweep/array-0.sbatch").read_text()
    assert re.search(r"^TRAIN=\(.*/python\S* .*/mbgd train\) ", text, re.MULTILINE), text


def test_the_projects_own_test_passes(installed: Path, project: Path) -> None:
    command = [str(installed / "python"), "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=project, env=environment_of(installed), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workers=2", "batch.sise=3"], "Did you mean batch.size?"),
        (
            ["workers=2", "model=nope"],
            "Could not find 'model/nope'. There are cnn, gpt, linear, mlp, net, own, resnet.",
        ),
        (["workers=2", "batch.micro_batch_size=99"], "micro-batch has from 1 example to the whole minibatch"),
        (["workers=2", "objective=own", "objective._target_=parts.nowhere"], "parts.nowhere"),
        (["workers=0"], "workers=0; it must be a whole number >= 1"),
        (["workers=abc"], "workers=abc; it must be a whole number >= 1"),
        (["workers=gpus"], "torch sees no GPU"),
        (["workers=2", "workers=3"], "given twice"),
        (["--max-restarts", "x"], "--max-restarts x; it must be a whole number"),
        (["--fot"], "unrecognized arguments: --fot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_once_in_few_lines(
    installed: Path, project: Path, arguments: list[str], message: str
) -> None:
    before = set(project.iterdir())
    done = mbgd(installed, project, "train", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert num_lines(done.stderr + done.stdout) <= 8
    assert done.stderr.count("error") == 1
    assert set(project.iterdir()) <= before | {project / "__pycache__"}


@pytest.mark.parametrize(
    ("target", "shown", "heading"),
    [
        ("shared", "has no attribute 'undefined_name'", "error: "),
        ("on_one_worker", "ValueError: only here", "error on worker 1: "),
    ],
)
def test_an_exception_of_the_users_shows_their_own_lines_once(
    installed: Path, project: Path, target: str, shown: str, heading: str
) -> None:
    overrides = ("workers=2", "steps=100", "objective=own", f"objective._target_=parts.{target}", f"run.dir={target}")
    done = mbgd(installed, project, "train", *overrides, *FAST)
    assert done.returncode == 1
    assert num_lines(done.stderr) <= 25
    assert done.stderr.startswith(heading)
    assert done.stderr.count(shown) == done.stderr.count("Traceback") == 1
    for inside in ("/torch/", "/hydra/", "mbgd/", "torchrun"):
        assert not re.search(f'File ".*{inside}.*py"', done.stderr), done.stderr
    assert f'File "{project}/parts.py"' in done.stderr
    if target == "on_one_worker":
        assert "host" in done.stderr
        assert "logs/worker-1.log" in done.stderr
        log = (project / target / "logs/worker-1.log").read_text()
        assert "only here" in log
        assert "mbgd/trainer.py" in log


def test_what_a_module_raises_when_it_is_imported(installed: Path, project: Path) -> None:
    (project / "broken.py").write_text("import json\n\njson.loads('{')\n")
    done = mbgd(installed, project, "train", "model=own", "model._target_=broken.Net")
    assert done.returncode == 2
    assert f'File "{project}/broken.py", line 3' in done.stderr
    assert "mbgd/" not in done.stderr.replace(str(project), "")
    assert done.stderr.count("Traceback") == 1
    assert num_lines(done.stderr) <= 25


def test_a_folders_own_configuration_wins_and_that_is_told(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    own = (ROOT / "conf/model/mlp.yaml").read_text().replace("[128]", "[7]")
    (tmp_path / "conf/model/mlp.yaml").write_text(own)
    done = mbgd(installed, tmp_path, "train", "steps=1", "run.dir=out", *FAST)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "note: conf/model/mlp.yaml is used, not mbgd's own model/mlp.yaml, which has the same name\n"
    )
    assert "hidden:\n  - 7" in (tmp_path / "out/config.yaml").read_text()
    assert "(small model" in done.stdout
    shutil.rmtree(tmp_path / "conf")
    (tmp_path / "conf").touch()
    done = mbgd(installed, tmp_path, "train", "steps=1")
    assert done.returncode == 2
    assert "conf is not a folder" in done.stderr


def test_another_application_of_hydra_is_left_alone(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/c.yaml").write_text("a: 1\n")
    (tmp_path / "app.py").write_text(
        "import hydra\n\n@hydra.main(version_base='1.3', config_path='other', config_name='c')\n"
        "def main(c): print(c, len(hydra.core.hydra_config.HydraConfig.get().runtime.config_sources))\n\nmain()\n"
    )
    command = [str(installed / "python"), "app.py", "hydra.run.dir=."]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment_of(installed), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "{'a': 1} 3\n", done.stderr


def test_completion_and_version(installed: Path, project: Path) -> None:
    assert mbgd(installed, project, "--version").stdout.startswith("mbgd 0.")
    script = """
eval "$(mbgd completion bash)"
for COMP_LINE in "mbgd tra" "mbgd train model=n" "mbgd train workers=2 experiment=f" "mbgd train batch.s"; do
    COMP_POINT=${#COMP_LINE} COMPREPLY=()
    _mbgd
    echo "${COMPREPLY[@]}"
done
"""
    done = subprocess.run(
        ["bash", "-c", script], cwd=project, env=environment_of(installed), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[:4] == ["train", "net", "fashion_cnn first", "batch.size="], done.stderr
    for shell in ("zsh", "fish"):
        assert "mbgd train -sc query" in mbgd(installed, project, "completion", shell).stdout
    done = mbgd(installed, project, "trian")
    assert done.returncode == 2
    assert "Did you mean train?" in done.stderr
    done = mbgd(installed, project.parent, "new", "mine")
    assert done.returncode == 2
    assert "is not empty" in done.stderr


def test_the_package_has_its_version_license_and_types(installed: Path) -> None:
    [files] = installed.parent.glob("lib/python*/site-packages")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (files / "mbgd/py.typed").is_file()
    assert (files / f"mbgd-{version}.dist-info/licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    command = [str(installed / "python"), "-c", "import mbgd; print(mbgd.__version__)"]
    environment = environment_of(installed)
    done = subprocess.run(command, cwd=files, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{version}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_its_workers_are_open_to_nobody_start_again_save_and_say_how_to_go_on(installed: Path, project: Path) -> None:
    """A worker is killed; then Ctrl-C; then the command that was printed, and kill -9 of the launcher."""
    command = [str(installed / "mbgd"), "train", "workers=2", "steps=1000000", "--max-restarts=1"]
    command += ["checkpoint.every_steps=50", "log_every_steps=10", "run.dir=long", *FAST]
    log, run = project / "log", project / "long"
    with started_by_user(command, project, environment_of(installed)) as process:
        eventually(lambda: list(run.glob("checkpoints/step-*/manifest.json")), 120)
        processes = marked(project)
        assert len(processes) >= 3
        assert listening(processes) <= LOOPBACK
        assert listening([process.pid]) == set()
        os.kill(max(set(processes) - {process.pid}), signal.SIGKILL)
        eventually(lambda: "restart     1 of 1" in log.read_text(), 60)
        eventually(lambda: "resume      step" in log.read_text(), 120)
        eventually(lambda: "examples/s" in log.read_text().split("resume      step")[1], 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
        eventually(lambda: not marked(project), 60)
    told = log.read_text()
    assert told.count("ended by SIGKILL") == 1
    assert told.splitlines()[-1].startswith("stopped by a signal after step ")
    assert "saved in long. To go on: mbgd train workers=2 --max-restarts=1 steps=1000000" in told
    assert "torch/distributed" not in told
    again = told.splitlines()[-1].split("To go on: ")[1]
    with started_by_user(["bash", "-c", f"exec {again}"], project, environment_of(installed)) as process:
        eventually(lambda: log.read_text().count("resume      step") == 2, 120)
        process.kill()
        process.wait()
        eventually(lambda: not marked(project), 60)
