"""A worker's place, told by environment variables that may contradict each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mbgd
from mbgd.workers.place import Place, check_meeting_point, place

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, Place()),
        ({"RANK": "0"}, Place()),
        ({"RANK": "2", "WORLD_SIZE": "3"}, Place(2, 3, 0, 3)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Place(rank=5, num_workers=8, local_rank=1, local_num_workers=4),
        ),
    ],
)
def test_a_launchers_variables_are_a_place(variables: dict[str, str], wanted: Place) -> None:
    assert place(variables) == wanted


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 with WORLD_SIZE=2; it must be from 0 to 1"),
        ({"RANK": "1"}, "RANK=1 with WORLD_SIZE=1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 with WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK, this worker's number, is not set"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0; there is at least 1 worker"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x; it must be a whole number"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK=2 with LOCAL_WORLD_SIZE=2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 with WORLD_SIZE=2"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(mbgd.UsageError) as refused:
        place(variables)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT, where the workers meet, are not set"),
        ({"MASTER_PORT": "29500"}, "MASTER_ADDR, where the workers meet, is not set"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "abc"}, "MASTER_PORT=abc; it must be a whole number"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "MASTER_PORT=70000; it must be from 1 to 65535"),
    ],
)
def test_a_meeting_point_that_is_none_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        check_meeting_point(variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "3", "WORLD_SIZE": "2"}, "error: RANK=3 with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "x"}, "error: WORLD_SIZE=x"),
    ],
)
def test_the_command_says_so_in_a_line(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    """It waited for workers that could not come, or ended with a traceback."""
    command = [sys.executable, "-m", "mbgd", "train", "model=linear", "steps=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
