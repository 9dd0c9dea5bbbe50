"""Processes that a test has started as a user would, found by a mark in their environment, and what they have open."""

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "MBGD_TEST_MARK"
LISTENS = "0A"  # TCP_LISTEN of linux/tcp_states.h


@contextmanager
def started_by_user(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, in `folder`, with its output in `folder`/log; all its processes are killed in the end."""
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    inherited |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", MARK: str(folder)}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=inherited | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    except BaseException:
        print(*(folder / "log").read_text(errors="replace").splitlines()[-60:], sep="\n")  # pytest shows it
        raise
    finally:
        for pid in marked(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def marked(folder: Path) -> list[int]:
    """All living processes that carry the folder's mark."""
    entry, found = f"{MARK}={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # ended, or not this user's
            if entry in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def listening(pids: Sequence[int]) -> set[str]:
    """Addresses on which these processes listen, and no others."""
    found = set()
    for pid in pids:
        inodes = set()
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == LISTENS and fields[9] in inodes:
                        found.add(_address(fields[1].split(":")[0], family))
    return found


def _address(written: str, family: socket.AddressFamily) -> str:
    """What /proc writes as words in the processor's order of bytes."""
    words = [int(written[at : at + 8], 16) for at in range(0, len(written), 8)]
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
