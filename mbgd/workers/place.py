"""A worker's place among the others, as a launcher's environment variables tell it."""

import os
from collections.abc import Mapping
from typing import NamedTuple

from mbgd.errors import UsageError
from mbgd.text.escaping import plain

REMEDY = "Start workers with mbgd train workers=N or torchrun, which set RANK, WORLD_SIZE and the others, or set none."


class Place(NamedTuple):
    rank: int = 0
    num_workers: int = 1
    local_rank: int = 0
    local_num_workers: int = 1


def place(variables: Mapping[str, str] = os.environ) -> Place:
    """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without a launcher, one worker.

    UsageError where they contradict each other: workers would wait for one that cannot come.
    """
    num_workers = _count(variables, "WORLD_SIZE", 1)
    if num_workers > 1 and "RANK" not in variables:
        raise UsageError(f"WORLD_SIZE={num_workers}, but RANK, this worker's number, is not set. {REMEDY}")
    rank, local_rank = _number(variables, "RANK", 0), _number(variables, "LOCAL_RANK", 0)
    local_num_workers = _count(variables, "LOCAL_WORLD_SIZE", num_workers)
    for number, name, size, of in (
        (rank, "RANK", num_workers, "WORLD_SIZE"),
        (local_rank, "LOCAL_RANK", local_num_workers, "LOCAL_WORLD_SIZE"),
    ):
        if not 0 <= number < size:
            raise UsageError(f"{name}={number} with {of}={size}; it must be from 0 to {size - 1}. {REMEDY}")
    if local_num_workers > num_workers:
        raise UsageError(
            f"LOCAL_WORLD_SIZE={local_num_workers} with WORLD_SIZE={num_workers}; a part is at most the whole. {REMEDY}"
        )
    return Place(rank, num_workers, local_rank, local_num_workers)


def check_meeting_point(variables: Mapping[str, str] = os.environ) -> None:
    """UsageError where MASTER_ADDR and MASTER_PORT do not say at which host and port the workers meet."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]:
        raise UsageError(
            f"WORLD_SIZE={variables.get('WORLD_SIZE')}, but {' and '.join(missing)}, where the workers meet, "
            f"{'are' if len(missing) > 1 else 'is'} not set. {REMEDY}"
        )
    if not 0 < _number(variables, "MASTER_PORT", 0) < 2**16:
        raise UsageError(f"MASTER_PORT={variables['MASTER_PORT']}; it must be from 1 to 65535. {REMEDY}")


def _count(variables: Mapping[str, str], name: str, otherwise: int) -> int:
    if (number := _number(variables, name, otherwise)) < 1:
        raise UsageError(f"{name}={number}; there is at least 1 worker. {REMEDY}")
    return number


def _number(variables: Mapping[str, str], name: str, otherwise: int) -> int:
    try:
        return int(variables.get(name, otherwise))
    except ValueError:
        raise UsageError(f"{name}={plain(variables[name])}; it must be a whole number. {REMEDY}") from None
