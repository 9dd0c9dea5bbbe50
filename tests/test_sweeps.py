"""Sweeps as a user runs them: real jobs on real workers, what is left of them, and what ends them."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hydra_plugins.mbgd_torchrun import processes
from hydra_plugins.mbgd_torchrun.jobs import Job, refuse_another_sweeps
from hydra_plugins.mbgd_torchrun.launcher import hand_out_gpus
from hydra_plugins.mbgd_torchrun.processes import Command, marked, run_all
from mbgd.cli.launching import num_cores, quoted
from mbgd.cli.tools.sweep import _header, show
from mbgd.cli.tools.sweep_plot import is_geometric, plot
from mbgd.config import Direction
from mbgd.errors import UsageError
from mbgd.files.job_file import JobRecord
from mbgd.runs.sweeps import read_jobs, read_ranking
from mbgd.text.numbers import short

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def start(folder: Path, *overrides: str, gpus: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"CUDA_VISIBLE_DEVICES": gpus}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A sweep of two jobs on two workers and one that fails: its folder, exit code and output."""
    folder = tmp_path_factory.mktemp("sweep")
    process = start(
        folder,
        "hydra.launcher.nproc_per_node=2",
        "hydra.launcher.max_parallel=2",
        "+hydra.job.env_set.ATEN_CPU_CAPABILITY=default",
        "batch.size=32,64,2000",
        "batch.drop_last=true",  # so that the third has no whole minibatch
        "steps=30",
        "evaluation.every_steps=10",
        "sweep.target=1.9",
    )
    output, _ = process.communicate(timeout=300)
    [made] = (folder / "runs/sweeps").iterdir()
    return made, process.returncode, output


def test_a_failed_job_is_reported_and_the_rest_go_on(sweep: tuple[Path, int, str]) -> None:
    folder, exit_code, output = sweep
    assert exit_code == 1
    assert "3 jobs of 2 workers, 2 at once" in output
    assert "job 2 · batch.size=2000 · failed with exit code 2" in output
    assert "    error: batch.drop_last=true with batch.size=2000 leaves none" in output
    first, second, failed = read_jobs(folder)
    assert [job.state for job in (first, second, failed)] == ["complete", "complete", "failed (2)"]
    assert [job.folder.name for job in (first, second, failed)] == ["0", "1", "2"]
    for job, size in ((first, 32), (second, 64)):
        assert f"batch.size={size} · eval/loss {job.metrics['eval/loss']:.4g}" in output
        assert job.config["batch"]["size"] == size
        assert job.summary["num_workers"] == 2
        assert job.summary["conditions"]["threads_per_worker"] == max(1, num_cores() // 4)
        assert job.summary["conditions"]["processor"].endswith("(DEFAULT)")  # env_set
    assert all((job.folder / f"logs/worker-{rank}.log").exists() for job in (first, second) for rank in (0, 1))


def test_the_result_is_ranked_and_remade_from_the_folders_alone(
    sweep: tuple[Path, int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, output = sweep
    written = (folder / "sweep.csv").read_text()
    (folder / "sweep.csv").unlink()
    (folder / "sweep.svg").unlink()
    show(folder)
    table = capsys.readouterr().out
    assert table.split("job 2 failed")[0] in output

    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    before = list(csv.DictReader(written.splitlines()))
    assert [{**row, "folder": ""} for row in rows] == [{**row, "folder": ""} for row in before]
    by_loss = sorted(rows[:2], key=lambda row: float(row["eval/loss"]))
    assert rows == [*by_loss, rows[2]]
    assert rows[2]["job"] == "2"
    assert rows[2]["eval/loss"] == ""
    for row in rows[:2]:
        history = [json.loads(line) for line in (folder / row["job"] / "metrics.jsonl").read_text().splitlines()]
        reached = [line["step"] for line in history if line.get("eval/loss", 99) <= 1.9]
        assert row["steps_to_target"] == str(min(reached))
        assert row["examples_to_target"] == str(min(reached) * int(row["batch.size"]))  # less than an epoch

    picture = ElementTree.parse(folder / "sweep.svg")
    told = [f"eval/loss {short(float(row['eval/loss']))}" for row in rows[:2]]
    for what in ("steps", "examples"):
        told += [f"{what} to eval/loss of 1.9 {short(float(row[f'{what}_to_target']))}" for row in rows[:2]]
    assert sorted(str(point.text) for point in picture.iter(f"{SVG}title")) == sorted(told)
    crosses = [path for path in picture.iter(f"{SVG}path") if path.get("class") == "cross"]
    assert len(crosses) == 2 * 3, "the failed job, in each panel and its legend"

    best = read_ranking(folder, "eval/accuracy", "maximize", None).jobs[0]
    assert best.metrics["eval/accuracy"] == max(float(row["eval/accuracy"]) for row in rows[:2])


def test_a_metric_that_no_job_has_is_refused_with_those_there_are(sweep: tuple[Path, int, str]) -> None:
    with pytest.raises(UsageError, match=r"eval/loss.*Did you mean eval/accuracy"):
        read_ranking(sweep[0], "eval/acuracy", None, None)


def test_examples_are_counted_with_short_last_minibatches(sweep: tuple[Path, int, str]) -> None:
    job = read_jobs(sweep[0])[0]
    # 1437 examples in minibatches of 32: drop makes 44 of an epoch.
    assert [job.examples_after(steps) for steps in (0, 1, 43, 44, 45)] == [0, 32, 43 * 32, 1408, 1440]
    assert job.steps_to("eval/loss", -1.0, Direction.minimize) is None


def write_jobs(folder: Path, swept: list[dict[str, str]], losses: list[float]) -> None:
    """What sweeps leave of jobs that are complete."""
    for number, (values, loss) in enumerate(zip(swept, losses, strict=True)):
        JobRecord(number, values, [], 0).write(folder / str(number))
        (folder / str(number) / "summary.json").write_text(json.dumps({"metrics": {"eval/loss": loss}, "steps": 1}))


@pytest.mark.parametrize(
    ("values", "losses", "labels"),
    [
        (["16", "32", "64"], [1.0, 0.5, 0.2], ["0.2", "0.4", "0.6", "0.8", "1", "16", "32", "64"]),
        (["0.1"], [1e-3], ["0.00095", "0.001", "0.00105", "0.0011", "0.1", "0.0009"]),
        (["relu", "a name that is much too long for the place that there is for it", "1"], [1.0] * 3, ["relu", "1"]),
        ([str(n) for n in range(20)], [10.0**-n for n in range(20)], ["5", "10", "15", "1e-13"]),
        (["1", "2"], [0.0, -3.0], ["1", "2", "0", "-1", "-2", "-3"]),
        (["1", "2"], [math.nan, math.inf], ["1", "2"]),
        (["1", "2", "3"], [1.0, 1.1, 1e9], ["1", "2", "3"]),
    ],
    ids=["numbers", "one", "names", "many", "negative", "not finite", "far off"],
)
def test_whatever_the_values_every_job_is_in_the_picture(
    tmp_path: Path, values: list[str], losses: list[float], labels: list[str]
) -> None:
    write_jobs(tmp_path, [{"optimizer.lr": value} for value in values], losses)
    plot(read_ranking(tmp_path, None, None, None), tmp_path / "sweep.svg")
    picture = ElementTree.parse(tmp_path / "sweep.svg")
    texts = [str(text.text) for text in picture.iter(f"{SVG}text")]
    assert set(labels) <= set(texts), texts
    points = list(picture.iter(f"{SVG}circle"))
    crosses = [path for path in picture.iter(f"{SVG}path") if path.get("class") == "cross"]
    assert len(points) + max(0, len(crosses) - 1) == len(values), "a cross is in the legend"
    for point in points:
        assert 0 < float(point.attrib["cx"]) < 520
        assert 0 < float(point.attrib["cy"]) < 290


def test_the_table_of_a_terminal_fits_and_names_what_it_leaves_out(
    sweep: tuple[Path, int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    seen = {}
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        show(sweep[0])
        text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        table = text.split("job 2 failed")[0].splitlines()
        assert max(map(len, table)) <= columns
        assert "…" not in "".join(table)
        seen[columns] = text
    assert "no room for" not in seen[200]
    assert "examples/s" in seen[200]
    [left_out] = re.findall(r"no room for ([^:]*): see", seen[60])
    assert "examples/s" in left_out
    assert "eval/loss" not in left_out
    assert "failed (2)" in seen[60]


@pytest.mark.parametrize(
    ("name", "lines"),
    [("job", 1), ("examples/s", 1), ("eval/loss", 2), ("steps to target", 2), ("a.very.long.name.of.a.key", 2)],
)
def test_a_long_name_of_a_column_is_cut_at_its_parts(name: str, lines: int) -> None:
    cut = _header(name)
    assert cut.count("\n") == lines - 1
    assert cut.replace(" \n", "").replace("\n", "").replace(" ", "") == name.replace(" ", "")
    assert max(map(len, cut.split("\n"))) <= max(10, len(name) * 2 // 3)


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        "hydra.launcher.nproc_per_node=2",
        "hydra.sweep.dir=made",
        "seed=0,1",
        "steps=1000000",
        "backend=gloo",
        gpus="6,7,8",
    )
    metrics = tmp_path / "made/0/metrics.jsonl"
    deadline = time.monotonic() + 180
    while not metrics.exists() or not metrics.stat().st_size:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    ours = [pid for pid in marked() if f"{process.pid}." in variable(pid, processes.MARK)]
    assert len(ours) >= 3  # torchrun and its workers
    assert {variable(pid, "CUDA_VISIBLE_DEVICES") for pid in ours} == {"6,7"}
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT" in output
    assert "hydra.sweep.dir=made goes on" in output
    assert not [pid for pid in marked() if f"{process.pid}." in variable(pid, processes.MARK)]
    assert [job.state for job in read_jobs(tmp_path / "made")] == ["not ended"]
    assert list((tmp_path / "made/0/checkpoints").glob("step-*"))  # it has saved its state


def variable(pid: int, name: str) -> str:
    """What an environment variable of another process is."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return ""
    return next((entry.partition("=")[2] for entry in entries if entry.startswith(f"{name}=")), "")


def test_an_optimising_sweeper_is_told_what_each_job_came_to(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra 'optuna' is not installed")
    process = start(
        tmp_path,
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1",
        "hydra.sweep.dir=made",
        "optimizer.lr=tag(log,interval(0.001,0.1))",
        "steps=5",
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    jobs = read_jobs(tmp_path / "made")
    assert len({job.record.swept["optimizer.lr"] for job in jobs}) == 3
    best = min(jobs, key=lambda job: job.metrics["eval/loss"])
    found = (tmp_path / "made/optimization_results.yaml").read_text()
    assert f"best_value: {best.metrics['eval/loss']}" in found
    assert f"optimizer.lr: {best.record.swept['optimizer.lr']}" in found
    assert len(list(ElementTree.parse(tmp_path / "made/sweep.svg").iter(f"{SVG}title"))) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch.sizes=32,64"], "Did you mean batch.size"),
        (["optimizer.lr=interval(0,1)"], "hydra/sweeper=optuna"),
        (["run.dir=a,b"], "Set hydra.sweep.dir"),
        (["hydra.launcher.max_parallel=0", "seed=0,1"], "must be a whole number ≥ 1"),
        (["hydra.sweep.dir=taken", "seed=0,1"], "taken/0 holds a run that no sweep has started"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_any_job_starts(tmp_path: Path, overrides: list[str], message: str) -> None:
    (tmp_path / "taken/0").mkdir(parents=True)
    (tmp_path / "taken/0/config.yaml").touch()
    process = start(tmp_path, *overrides)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in output
    assert not list(tmp_path.glob("**/job.log"))


def test_a_folder_of_another_sweeps_job_is_refused(tmp_path: Path) -> None:
    JobRecord(0, {"seed": "1"}, ["seed=1"]).write(tmp_path)
    refuse_another_sweeps(Job(JobRecord(0, {"seed": "1"}, ["seed=1"]), None, tmp_path))  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="holds the job seed=1, not seed=2"):
        refuse_another_sweeps(Job(JobRecord(0, {"seed": "2"}, ["seed=2"]), None, tmp_path))  # type: ignore[arg-type]


def shell(folder: Path, script: str) -> Command:
    return Command(["sh", "-c", script], folder / "log", dict(os.environ))


def test_jobs_run_so_many_at_once_each_in_a_slot_of_its_own(tmp_path: Path) -> None:
    busy: set[int] = set()
    slot_of: dict[int, int] = {}
    exit_codes: dict[int, int] = {}

    def begin(index: int, slot: int) -> Command:
        assert slot not in busy
        busy.add(slot)
        slot_of[index] = slot
        return shell(tmp_path, f"sleep 0.{index % 3}; exit {index}")

    def end(index: int, exit_code: int, seconds: float) -> None:
        busy.remove(slot_of[index])
        exit_codes[index] = exit_code

    assert run_all(6, begin, end, max_parallel=2, timeout_seconds=None) is None
    assert exit_codes == {index: index for index in range(6)}
    assert set(slot_of.values()) == {0, 1}


def test_a_job_that_takes_too_long_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SECONDS_TO_STOP", 0.3)
    # Neither listens to SIGTERM, and the inner one is in a session of its own, as torchrun's workers are.
    script = "trap '' TERM; setsid sh -c \"trap '' TERM; touch ready; while :; do sleep 0.1; done\" & wait"
    ended = []
    run_all(
        1,
        lambda index, slot: shell(tmp_path, f"cd {tmp_path}; {script}"),
        lambda index, exit_code, seconds: ended.append(exit_code),
        max_parallel=1,
        timeout_seconds=1.5,
    )
    assert ended == [processes.TIMED_OUT]
    assert (tmp_path / "ready").exists()
    assert not [pid for pid in marked() if f"{os.getpid()}." in variable(pid, processes.MARK)]


def test_sigterm_ends_the_jobs_and_the_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    stopped = run_all(
        3, lambda index, slot: shell(tmp_path, "exec sleep 60"), lambda *_: None, max_parallel=2, timeout_seconds=None
    )
    assert stopped is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert not [pid for pid in marked() if f"{os.getpid()}." in variable(pid, processes.MARK)]


def test_gpus_are_handed_out_without_overlap() -> None:
    assert hand_out_gpus(["0", "1", "2", "3", "4"], 2, 2) == ["0,1", "2,3"]
    assert hand_out_gpus(["GPU-a", "GPU-b"], 1, 2) == ["GPU-a", "GPU-b"]
    assert hand_out_gpus([], 2, 3) == [None, None, None]
    assert hand_out_gpus(["0"], 2, 2) == [None, None]  # not one for each worker: they train on the CPU
    with pytest.raises(SystemExit, match="max_parallel=3 jobs of 2 workers need 6 GPUs; there are 4"):
        hand_out_gpus(["0", "1", "2", "3"], 2, 3)


def test_values_spread_by_factors_get_a_logarithmic_axis() -> None:
    assert is_geometric([32, 64, 128])
    assert is_geometric([0.001, 0.0013, 0.02, 0.09])
    assert is_geometric([0.1, 0.3])
    assert not is_geometric([1, 2, 3, 4, 5])
    assert not is_geometric([0, 1, 10])
    assert not is_geometric([7])


def test_a_folder_with_quotes_and_commas_is_taken_literally() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for name in ("it's, [odd] = {x}", "back\\slash", "ends with \\"):
        [override] = OverridesParser.create().parse_overrides([f"run.dir={quoted(name)}"])
        assert override.value() == name
