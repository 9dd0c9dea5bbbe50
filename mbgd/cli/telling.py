"""Reports each error once: of the workers of this host that fail with the same error, the first prints it.

They find each other's errors in the files that torchrun makes each worker write its error to.
"""

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from mbgd.errors import UsageError
from mbgd.workers import log as worker_log
from mbgd.workers.place import place

SECONDS_FOR_THE_OTHERS = 3.0
"""How long a worker that has failed waits for the others of its host to fail with the same error."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
OURS = "mbgd"
"""Key of our own part of the file."""


def tell(text: str, *, is_consequence: bool = False) -> None:
    """Print the error that ended this worker, unless another worker of this host prints the same.

    is_consequence: the error is that another worker was lost; printed only if no worker reports a cause.
    """
    environment = os.environ
    try:
        rank, num_workers, _, size = place()
    except UsageError:  # the text says so, or comes before anything depends on it
        _print(text, [])
        return
    file = environment.get(ERROR_FILE)
    if file is None or size == 1:
        _print(text, [] if num_workers == 1 else [rank])
        return
    with suppress(OSError):
        temporary = Path(file + ".tmp")  # so that nobody reads an incomplete file
        temporary.write_text(json.dumps(_record(text, is_consequence=is_consequence)))
        temporary.replace(file)
    told = _wait_for_the_others(Path(file), size)
    mine = rank
    if is_consequence:
        others = [one for of_rank, one in told.items() if of_rank != mine]
        if any(not one["is_consequence"] for one in others) or min(told, default=mine) < mine:
            worker_log.write_to_log_alone(text)
            return
    alike = sorted({mine, *(of_rank for of_rank, one in told.items() if _comparable(one["text"]) == _comparable(text))})
    if mine == alike[0]:
        _print(text, [] if len(alike) == size else alike)
    else:
        worker_log.write_to_log_alone(text)


def _print(text: str, ranks: list[int]) -> None:
    """ranks: the workers with this error; empty: all."""
    if not ranks:
        print(f"error: {text}", file=sys.stderr, flush=True)
        return
    named = f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    where = f"({named} of {os.environ['WORLD_SIZE']}, host {socket.gethostname()})"
    print(f"error on {named}: {text}\n{where}", file=sys.stderr, flush=True)


def _record(text: str, *, is_consequence: bool) -> dict[str, Any]:
    """The error in torchrun's format, whose table has room for one line."""
    first = text.splitlines()[0]
    extra = {"py_callstack": first, "timestamp": str(int(time.time()))}
    ours = {"text": text, "is_consequence": is_consequence, "rank": int(os.environ["RANK"])}
    return {"message": {"message": first, "extraInfo": extra}, OURS: ours}


def _wait_for_the_others(file: Path, size: int) -> Mapping[int, Any]:
    """The errors of the workers of this host, by rank, once all have reported or no more reports can be expected."""
    ended: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        ended.append(number)

    before = signal.signal(signal.SIGTERM, note)  # torchrun ends the rest as soon as one has ended
    deadline = time.monotonic() + SECONDS_FOR_THE_OTHERS
    while len(told := read(file.parent.parent)) < size and time.monotonic() < deadline and not ended:
        time.sleep(0.02)
    signal.signal(signal.SIGTERM, before)
    return told


def read(folder: Path) -> dict[int, Any]:
    """The errors that workers have reported, by rank. folder: it has a folder for each worker."""
    found = {}
    for path in folder.glob("*/error.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            ours = json.loads(path.read_bytes())[OURS]
            found[int(ours["rank"])] = ours
    return found


def _comparable(text: str) -> str:
    """The text without addresses and process ids, which differ between processes."""
    return re.sub(r"0x[0-9a-f]+|\bpid \d+|\bprocess \d+", "", text)
