"""torch's flight recorder: how many exchanges this worker has begun, so that errors can name the worker behind."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch

BUFFER_SIZE = "TORCH_FR_BUFFER_SIZE"
DUMP_ON_TIMEOUT = "TORCH_NCCL_DUMP_ON_TIMEOUT"


@dataclass(frozen=True)
class Exchanges:
    """Sequence numbers of this worker's last exchanges; all workers number them alike."""

    begun: int
    done: int
    """Meaningful with nccl only: gloo's recorder counts a begun exchange as done."""


def turn_on() -> None:
    """Call before the process group is made; the user's own settings stay."""
    os.environ.setdefault(BUFFER_SIZE, "2000")
    os.environ.setdefault(DUMP_ON_TIMEOUT, "1")


def exchanges(backend: str) -> Exchanges | None:
    """This worker's exchanges; None where nothing is recorded."""
    # As JSON: torch's dump files are pickles, and unpickling can run code.
    name = "_dump_nccl_trace_json" if backend == "nccl" else "_dump_fr_trace_json"
    dump = getattr(torch._C._distributed_c10d, name, None)
    return None if dump is None else read(dump(includeCollectives=False, onlyActive=True))


def read(dumped: bytes | str) -> Exchanges | None:
    """The exchanges of the default process group in torch's dump."""
    status: dict[str, Any] = json.loads(dumped).get("pg_status", {}).get("0", {})
    try:
        return Exchanges(int(status["last_enqueued_collective"]), int(status["last_completed_collective"]))
    except (KeyError, ValueError):
        return None
