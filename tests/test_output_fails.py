"""Standard output and error that fail end nothing: given up once, said elsewhere, and the exit code stays."""

import fcntl
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import eventually

ROOT = Path(__file__).parent.parent
FULL = Path("/dev/full")
"""Linux's own full disk: whatever is written there fails with ENOSPC."""

PRINTING = """
import sys, time
from pathlib import Path
from mbgd.workers.log import guard_output, start_log, write_to_log

guard_output()
print("before the log")
if len(sys.argv) > 1:
    start_log(Path(sys.argv[1]), 3, 4)
for number in range(200):
    print(f"line {number} " + "x" * 1000, flush=number % 2 == 0)
    print(f"warning {number}", file=sys.stderr)
write_to_log("details")
print("not flushed", end="")
"""


def start(folder: Path, *, log: bool = True, **streams: Any) -> subprocess.Popen[bytes]:
    path = [str(folder / "logs/worker-3.log")] if log else []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", PRINTING, *path], env=environment, cwd=folder, **streams)


def read_log(folder: Path) -> str:
    text = (folder / "logs/worker-3.log").read_text()
    assert [f"line {number} x" in text for number in range(200)] == [True] * 200
    assert [f"warning {number}\n" in text for number in range(200)] == [True] * 200
    assert "details" in text
    return text


def test_a_pipe_whose_reader_ends(tmp_path: Path) -> None:
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"before the log\n"
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert errors.count("stdout cannot be written to ([Errno 32] Broken pipe)") == 1
    assert read_log(tmp_path).count("stdout cannot be written to") == 1
    assert "Exception ignored" not in errors


@pytest.mark.parametrize("log", [True, False])
def test_both_pipes(tmp_path: Path, log: bool) -> None:
    process = start(tmp_path, log=log, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    if log:
        text = read_log(tmp_path)
        assert text.count("stdout cannot be written to") == text.count("stderr cannot be written to") == 1


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_full_disk_under_output_and_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/worker-3.log").symlink_to(FULL)
    with FULL.open("w") as full:
        process = start(tmp_path, stdout=full, stderr=subprocess.PIPE)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert errors.count("stdout cannot be written to ([Errno 28] No space left on device)") == 1
    assert errors.count("\nwarning 199\n") == 1
    assert errors.count("worker-3.log") == 1, "said once"


def test_streams_that_are_closed_from_the_start(tmp_path: Path) -> None:
    """Files that are opened later must not get their numbers, and with them what C libraries and children print."""
    code = PRINTING + "import os\nos.system('echo of a child; echo of a child >&2')\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = 'exec "$0" -c "$1" "$2" >&- 2>&- <&-'
    arguments = ["sh", "-c", command, sys.executable, code, str(tmp_path / "logs/worker-3.log")]
    assert subprocess.run(arguments, env=environment, cwd=tmp_path, timeout=60).returncode == 0
    text = read_log(tmp_path)
    assert "of a child" not in text
    assert "cannot be written to" not in text


def test_a_pipe_that_does_not_block(tmp_path: Path) -> None:
    """What it cannot take is lost, at the end too; training does not wait for who reads."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, fcntl.fcntl(writer, fcntl.F_GETFL) | os.O_NONBLOCK)
    try:
        process = start(tmp_path, stdout=writer, stderr=subprocess.DEVNULL)
        assert process.wait(60) == 0
    finally:
        os.close(writer)
        os.close(reader)
    read_log(tmp_path)


def test_a_terminal_that_goes_away(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    while not seen.endswith(b"\n"):  # a terminal hands on parts of a line; what fails before the log is in no file
        seen += os.read(ours, 1)
    os.close(ours)
    assert process.wait(60) == 0
    assert "stdout cannot be written to ([Errno 5]" in read_log(tmp_path)


def test_a_terminal_without_the_character(tmp_path: Path) -> None:
    code = "from mbgd.workers.log import guard_output\nguard_output()\nprint('2 × 3 → 6')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"2 \\xd7 3 \\u2192 6\n", b"")


def test_a_run_whose_output_nobody_reads_any_more_ends_well(tmp_path: Path) -> None:
    """python train.py … | head: trained to the end, saved, exit code 0, and the log says what happened."""
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), f"run.dir={run}", "epochs=30", "evaluation.every_steps=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout is not None
        assert p.stderr is not None
        p.stdout.readline()
        p.stdout.close()
        errors = p.stderr.read().decode()
        assert p.wait(120) == 0, errors
    log = (run / "logs/worker-0.log").read_text()
    assert log.count("stdout cannot be written to") == errors.count("stdout cannot be written to") == 1
    assert "is left out" not in log, "the terminal's tracker goes on into the log"
    assert "result  " in log
    assert (run / "summary.json").exists()
    assert eventually(lambda: list(run.glob("checkpoints/step-*")))
