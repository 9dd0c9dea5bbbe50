"""torch's flight recorder: which exchange this worker has begun last, so that errors can name the worker behind."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch

BUFFER_SIZE = "TORCH_FR_BUFFER_SIZE"
DUMP_ON_TIMEOUT = "TORCH_NCCL_DUMP_ON_TIMEOUT"
DEFAULT_GROUP = "0"
"""torch's name for the group of all workers."""

MOST_TENSORS = 3
"""Tensors of an exchange that are named."""


@dataclass(frozen=True)
class Exchanges:
    """Sequence numbers of this worker's last exchanges; all workers number them alike."""

    begun: int
    done: int
    """Meaningful with nccl only: gloo's recorder counts a begun exchange as done."""
    last: str = ""
    """The exchange begun last, such as "all_reduce of Float [1000]"; empty if the dump does not tell."""


def turn_on() -> None:
    """Call before the process group is made; the user's own settings stay."""
    os.environ.setdefault(BUFFER_SIZE, "2000")
    os.environ.setdefault(DUMP_ON_TIMEOUT, "1")


def exchanges(backend: str, *, named: bool) -> Exchanges | None:
    """This worker's exchanges; None where nothing is recorded. named: with `last`, which takes milliseconds."""
    # As JSON: torch's dump files are pickles, and unpickling can run code.
    name = "_dump_nccl_trace_json" if backend == "nccl" else "_dump_fr_trace_json"
    dump = getattr(torch._C._distributed_c10d, name, None)
    return None if dump is None else read(dump(includeCollectives=named, onlyActive=not named))


def read(dumped: bytes | str) -> Exchanges | None:
    """The exchanges of the default process group in torch's dump."""
    dump: dict[str, Any] = json.loads(dumped)
    status = dump.get("pg_status", {}).get(DEFAULT_GROUP, {})
    try:
        begun, done = int(status["last_enqueued_collective"]), int(status["last_completed_collective"])
    except (KeyError, ValueError):
        return None
    entries = [one for one in dump.get("entries", []) if _is_collective(one)]
    last = max(entries, key=lambda one: int(one["collective_seq_id"]), default=None)
    return Exchanges(begun, done, _name(last) if last and int(last["collective_seq_id"]) == begun else "")


def _is_collective(entry: dict[str, Any]) -> bool:
    return entry["process_group"][0] == DEFAULT_GROUP and not entry["is_p2p"]


def _name(entry: dict[str, Any]) -> str:
    operation = entry["profiling_name"].partition(":")[2]
    tensors = [f"{dtype} {size}" for dtype, size in zip(entry["input_dtypes"], entry["input_sizes"], strict=False)]
    more = [f"{len(tensors) - MOST_TENSORS} more"] if len(tensors) > MOST_TENSORS else []
    return " of ".join(filter(None, [operation, ", ".join(tensors[:MOST_TENSORS] + more)]))
