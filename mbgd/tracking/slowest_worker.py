"""Names the worker that the others wait for."""

import socket

from torch import Tensor

from mbgd.workers.group import Workers

MUCH = 1.5
"""Ratio to the median from which on a worker is warned of."""
MUCH_SECONDS = 0.001
"""Shorter delays are not warned of: the scheduling of a busy host makes them."""
FOR_STEPS = 100


class SlowestWorker:
    """Compares the workers' own times per micro-batch: loading and forwards, without waiting for each other."""

    def __init__(self, workers: Workers) -> None:
        self._hosts = workers.gather_values(socket.gethostname())
        self._tells = workers.is_main
        self._rank, self._since = -1, 0
        self._warned: set[int] = set()

    def metrics(self, step: int, by_rank: Tensor | None) -> dict[str, float]:
        """The slowest worker's time by the median's, and its rank; empty while times are unknown. Waits for the device.

        step: number of steps completed; by_rank: seconds of each worker, 0 if unknown. Of two workers the median is the
        faster.
        """
        if by_rank is None or not bool((by_rank > 0).any()):
            return {}
        median, slowest = by_rank[by_rank > 0].median().item(), by_rank.max()
        rank, ratio = int(by_rank.argmax()), slowest.item() / median
        self._watch(step, rank, ratio, slowest.item() - median)
        return {"slowest_worker": ratio, "slowest_worker_rank": rank}

    def host(self, rank: float) -> str:
        return str(self._hosts[int(rank)])

    def _watch(self, step: int, rank: int, ratio: float, seconds: float) -> None:
        is_slow = ratio > MUCH and seconds > MUCH_SECONDS
        if not is_slow or rank != self._rank:
            self._rank, self._since = rank if is_slow else -1, step
        if is_slow and step - self._since >= FOR_STEPS and rank not in self._warned:
            self._warned.add(rank)
            if self._tells:
                print(
                    f"warning: worker {rank} on host {self.host(rank)} has been the slowest for {step - self._since} "
                    f"steps: it needs {ratio:.1f} times the median worker's time to load its examples and compute "
                    f"their losses, and the others wait {seconds * 1000:.3g} ms per micro-batch. Look there for other "
                    "programs, slow storage, a throttled processor.",
                    flush=True,
                )
