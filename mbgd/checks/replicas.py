"""Compares the workers' copies of the state during the run, to find differences that no other check expects.

Each worker computes a checksum of the state on its device, an integer sum over its bytes, and the workers exchange it.
Equal copies have equal sums; a copy in which one element differs has another sum, whatever the value. If the sums
differ, the workers find out which tensor differs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mbgd.errors import ReplicasDiffer
from mbgd.workers.group import Workers

AT_ONCE_BYTES = 2**16
"""Smaller tensors are added up together: one call for each would take longer than the additions."""


class _Part(Protocol):
    """The members of `checkpoints.parts.Part` that are compared."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]: ...

    def values(self) -> Mapping[str, Any]: ...


@dataclass
class Replicas:
    """Compares the state of this worker with that of the others."""

    workers: Workers
    last_alike: int | None = None
    """Number of optimizer steps after which all copies were last found equal; None: not compared yet."""

    def compare_parts(self, step: int, parts: Sequence[_Part]) -> None:
        """`compare` for parts of a checkpoint."""
        files = [(file, of_file) for part in parts for file, of_file in part.tensors().items()]
        tensors = {f"{file}.{name}": tensor for file, of_file in files for name, tensor in of_file.items()}
        self.compare(step, tensors, {name: value for part in parts for name, value in part.values().items()})

    def compare(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Raise ReplicasDiffer, on every worker alike, where the workers' state differs after `step` steps.

        values: the state that is not tensors, by name.
        """
        if self.workers.num_workers == 1:
            return
        total = checksum(list(tensors.values()), self.workers.device)
        names = torch.tensor(_of_value([*tensors, *values.items()]), device=total.device)
        mine = torch.stack([total, names])
        # ~x reverses the order, so max(~x) = ~min(x). The maximum equals the minimum only if all workers agree.
        largest, smallest = self.workers.max_(torch.cat([mine, ~mine])).chunk(2)
        if torch.equal(largest, ~smallest):
            self.last_alike = step
            return
        sums = {name: int(checksum([tensor], self.workers.device)) for name, tensor in tensors.items()}
        of_workers = self.workers.gather_values({**sums, **{name: _of_value(value) for name, value in values.items()}})
        raise ReplicasDiffer(_describe(of_workers, step, self.last_alike))


def checksum(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """One number, int64, shape (), that changes if one element of one tensor changes, whatever its new value."""
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}  # torch keeps some optimizer state on the host
    flat = []
    for tensor in tensors:
        values = tensor.detach().contiguous().view(-1)
        if values.nbytes < AT_ONCE_BYTES:
            small.setdefault((values.dtype, values.device), []).append(values)
        else:
            flat.append(values)
    flat += [torch.cat(alike) for alike in small.values()]
    total = torch.zeros((), dtype=torch.int64, device=device)
    for values in flat:
        total += _words(values).sum().to(device)
    return total


def _words(values: Tensor) -> Tensor:
    """The bytes as 64-bit integers. All bytes of an element are in one word, so that a change cannot cancel out."""
    flat = values.view(torch.uint8)
    if len(flat) % 8:
        flat = torch.nn.functional.pad(flat, (0, 8 - len(flat) % 8))
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def _of_value(value: Any) -> int:
    """A hash of `repr(value)`, from 0 to 2^63 − 1."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8]) >> 1


def _describe(of_workers: Sequence[Mapping[str, int]], step: int, last_alike: int | None) -> str:
    names = list(dict.fromkeys(name for of_worker in of_workers for name in of_worker))
    lines = []
    for name in names:
        sums = [of_worker.get(name) for of_worker in of_workers]
        if len(set(sums)) > 1:
            usual = max(set(sums), key=lambda one: (sums.count(one), one == sums[0]))
            others = [str(rank) for rank, one in enumerate(sums) if one != usual]
            lines.append(f"{name} on worker {', '.join(others)}")
    shown = "\n".join(f"  - {line}" for line in lines[:10]) + ("\n  - …" if len(lines) > 10 else "")
    alike = f"they were last found alike after step {last_alike}" if last_alike is not None else "not compared before"
    return (
        f"the workers' copies of the state differ after step {step}; {alike}. What differs from most workers:\n"
        f"{shown}\n"
        "They must be the same bits. Usual causes: code that depends on the rank changes the state, faulty memory or "
        "hardware. Checkpoints up to the last comparison are good: the same command goes on from the newest."
    )
