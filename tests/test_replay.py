"""verify RUN --step N: the recorded bits come out again, or the first step is named at which they do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbgd import Workers
from mbgd.errors import UsageError
from mbgd.files.run_files import seal
from mbgd.verify.replay import Replay, describe, replay

from processes import run_workers
from runs import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "run"
    run(path, "averaging=reproducible", "checkpoint.every_steps=20", "checkpoint.keep=1", "log_every_steps=4")
    return path


def replayed(workers: Workers, folder: Path, step: int) -> dict[str, Any]:
    return vars(replay(folder, step, workers))


def change(folder: Path, edit: Callable[[dict[str, Any]], None], step: int) -> None:
    """Alter what is recorded of a step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == step:
            edit(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_same_bits_come_out_on_any_number_of_workers(folder: Path) -> None:
    alone = replay(folder, 46, Workers())
    assert alone.first_difference is None
    assert alone.conditions == []
    assert alone.num_compared > 10
    assert alone.weights_sha256 == json.loads((folder / "summary.json").read_text())["weights_sha256"]
    assert [one["weights_sha256"] for one in run_workers(replayed, 2, folder, 46)] == [alone.weights_sha256] * 2


def test_it_begins_at_the_newest_checkpoint_before(folder: Path) -> None:
    (newest,) = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
    assert newest == 46
    assert replay(folder, 46, Workers()).from_step == 0  # that of step 46 tells nothing of how it was reached


def test_the_first_step_that_differs_is_named_and_the_conditions(folder: Path) -> None:
    before, summary = (folder / "metrics.jsonl").read_bytes(), (folder / "summary.json").read_bytes()
    try:
        change(folder, lambda line: line.update({"train/loss": line["train/loss"] + 1e-15 * 8}), 12)
        recorded = json.loads(summary)
        recorded["versions"]["torch"] = "1.0"
        (folder / "summary.json").write_text(json.dumps({**recorded, "sha256": seal(recorded)}))
        found = replay(folder, 20, Workers())
        assert found.first_difference is not None
        assert found.first_difference.startswith("step 12: train/loss ")
        assert found.to_step == 12
        (condition,) = found.conditions
        assert condition.startswith("torch: 1.0 then, ")
        assert "different   at step 12" in describe(found, 1)
    finally:
        (folder / "metrics.jsonl").write_bytes(before)
        (folder / "summary.json").write_bytes(summary)


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--step 47; the run has the steps 1 to 46\."):
        replay(folder, 47, Workers())
    with pytest.raises(UsageError, match="is not the folder of a run"):
        replay(tmp_path, 1, Workers())
    run(tmp_path / "other", "steps=2", "averaging=ddp")
    with pytest.raises(UsageError, match="only averaging=reproducible gives the same bits"):
        replay(tmp_path / "other", 1, Workers())


def test_a_replay_says_what_it_compared() -> None:
    same = Replay(0, 4, 3, None, [], "ab")
    assert describe(same, 2) == "replayed    steps 1 to 4 on 2 workers\nsame bits   3 recorded values\nweights     ab"
