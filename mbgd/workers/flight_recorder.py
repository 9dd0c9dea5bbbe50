"""torch's flight recorder: what exchanges this worker has begun, so that the one that is missing can be named."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch

BUFFER_SIZE = "TORCH_FR_BUFFER_SIZE"
DUMP_ON_TIMEOUT = "TORCH_NCCL_DUMP_ON_TIMEOUT"


@dataclass(frozen=True)
class Exchanges:
    """Numbers of the last ones, which are the same on all workers."""

    begun: int
    done: int
    """Known of nccl alone: to gloo's recorder what has begun is done."""


def turn_on() -> None:
    """Before the process group is made; what the user has set stays."""
    os.environ.setdefault(BUFFER_SIZE, "2000")
    os.environ.setdefault(DUMP_ON_TIMEOUT, "1")


def exchanges(backend: str) -> Exchanges | None:
    """None where nothing is recorded."""
    # As JSON: torch's files are pickles, and reading one runs what it says.
    name = "_dump_nccl_trace_json" if backend == "nccl" else "_dump_fr_trace_json"
    dump = getattr(torch._C._distributed_c10d, name, None)
    return None if dump is None else read(dump(includeCollectives=False, onlyActive=True))


def read(dumped: bytes | str) -> Exchanges | None:
    """What torch's dump says of the group of all workers."""
    status: dict[str, Any] = json.loads(dumped).get("pg_status", {}).get("0", {})
    try:
        return Exchanges(int(status["last_enqueued_collective"]), int(status["last_completed_collective"]))
    except (KeyError, ValueError):
        return None
