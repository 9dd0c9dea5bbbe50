"""Who is in a run that goes on without lost workers (recovery=continue).

The launcher decides: it is the parent of all workers, so the kernel tells it who has ended, and all workers read the
same answer in the store. Each answer is a generation: the seats of the workers that train, by rank. A seat is a
process; one that takes the place of a lost one has a seat of its own. Workers that find an exchange failed wait for the
next generation and form a new group.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
from torch.distributed.distributed_c10d import PrefixStore, Store

from mbgd.errors import GroupChanged, RunComplete, UsageError, WorkersLost
from mbgd.workers.store import join_store

LAUNCHER = "MBGD_LAUNCHER_GOES_ON"
"""Environment variable, set by a launcher that keeps the other workers running when one is lost."""
SEAT = "MBGD_SEAT"
"""Environment variable with this process's seat, where it takes the place of a lost one."""

SECONDS_FOR_THE_LAUNCHER = 2.0
"""A lost worker is in the store this soon: the launcher looks ten times a second."""
SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_BETWEEN_QUESTIONS = 0.2
"""Between steps, a worker asks the store this often."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a newcomer that a signal has stopped: it has no state to save."""

ON, NOW, SILENT, COMPLETE, PROGRAM = "goes_on", "now", "silent", "complete", "program"


class Generation(msgspec.Struct, frozen=True):
    """The workers that train, from one change to the next."""

    number: int
    seats: list[int]
    """By rank."""


def common_store(store: Store, num_restarts: int) -> Store:
    """The part of the launcher's store for the workers of one start."""
    return PrefixStore(f"members-{num_restarts}", store)


class Roster:
    """The launcher's side: it names the workers."""

    def __init__(self, store: Store, num_workers: int) -> None:
        self._store = store
        self.generation = Generation(0, list(range(num_workers)))

    def goes_on(self) -> bool:
        """Whether the workers train, and go on without lost ones."""
        return bool(self._store.check([ON]))

    def silent(self) -> list[int]:
        """Seats that do not answer the others, though they have not ended."""
        seats: list[int] = json.loads(self._store.get(SILENT)) if self._store.check([SILENT]) else []
        return seats

    def has_come(self, seat: int) -> bool:
        """Whether a new worker is ready to join."""
        return bool(self._store.check([f"come/{seat}"]))

    def publish(self, seats: Sequence[int]) -> None:
        self.generation = Generation(self.generation.number + 1, list(seats))
        self._store.set(NOW, msgspec.json.encode(self.generation).decode())

    def complete(self) -> None:
        """Tell workers that wait for the others that the run is complete."""
        self._store.set(COMPLETE, "")


class Membership:
    """A worker's side: whether the workers have changed, and its rank among them."""

    def __init__(self, store: Store, seat: int, num_workers: int) -> None:
        self._store, self._seat = store, seat
        self.generation = Generation(0, list(range(num_workers)))
        self._asked, self._has_changed = 0.0, False
        self._has_just_joined = False

    @property
    def is_newcomer(self) -> bool:
        """Whether this worker takes the place of a lost one, and has not joined yet."""
        return self._seat not in self.generation.seats

    @property
    def rank(self) -> int:
        return self.generation.seats.index(self._seat)

    @property
    def num_workers(self) -> int:
        return len(self.generation.seats)

    def environment(self) -> dict[str, str]:
        """This generation in the variables by which launchers tell a worker its place, all on this host."""
        rank, size = str(self.rank), str(self.num_workers)
        return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}

    @property
    def store(self) -> Store:
        """The part of the store that this generation uses."""
        return PrefixStore(f"generation-{self.generation.number}", self._store)

    def begin(self, backend: str) -> None:
        """Tell the launcher that from now on the others go on where a worker is lost; UsageError over nccl."""
        if backend == "nccl":
            raise UsageError(
                "recovery=continue over nccl, whose watchdog ends a process whose exchange fails. Use backend=gloo "
                "backend.device=cuda, or recovery=restart."
            )
        self._store.set(ON, "")

    def describe(self, program: Mapping[str, str]) -> None:
        """Tell newcomers what the workers run."""
        self._store.set(PROGRAM, json.dumps(program))

    def program(self) -> dict[str, str] | None:
        """What the workers run; None where they have not begun."""
        return json.loads(self._store.get(PROGRAM)) if self._store.check([PROGRAM]) else None

    def join(self, timeout_seconds: float, stops: Callable[[], bool]) -> None:
        """As a newcomer: wait until the others take this worker in; RunComplete where they are done.

        stops(): whether a signal has asked this worker to stop. It ends then, unless it is taken in already: the others
        count on it from there on, and stop together with it.
        """
        self._store.set(f"come/{self._seat}", "")
        deadline = time.monotonic() + timeout_seconds
        while self.is_newcomer:
            self._check_complete()
            if time.monotonic() > deadline:
                raise WorkersLost("the other workers did not take this one in; they may have ended.")
            time.sleep(SECONDS_BETWEEN_LOOKS)
            asked = stops()  # before the look, so that a worker that ends has not been taken in before the signal
            if self._store.check([NOW]):
                self.generation = self._newest()
            if asked and self.is_newcomer:
                sys.exit(STOPPED)
        self._has_just_joined = True

    def move_on(self) -> None:
        """Take over the newest generation."""
        self.generation, self._has_changed = self._newest(), False
        if self.is_newcomer:
            raise WorkersLost("the other workers go on without this one, because it did not answer.")

    def has_changed(self) -> bool:
        """Whether there is a newer generation, as of at most SECONDS_BETWEEN_QUESTIONS ago."""
        if not self._has_changed and time.monotonic() - self._asked > SECONDS_BETWEEN_QUESTIONS:
            self._asked = time.monotonic()
            self._has_changed = self._is_over()
        return self._has_changed

    def wait_for_change(self, seconds: float = SECONDS_FOR_THE_LAUNCHER) -> bool:
        """Whether the launcher names another generation in this time."""
        deadline = time.monotonic() + seconds
        while not self._is_over():
            if time.monotonic() > deadline:
                return False
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return True

    def tell_silent(self, ranks: Sequence[int]) -> None:
        """Have the launcher end workers that do not answer, so that they cannot come back later."""
        self._tell_silent([self.generation.seats[rank] for rank in ranks])

    def meet(self, timeout_seconds: float) -> None:
        """Wait until all workers of this generation are here; GroupChanged where one is lost on the way.

        The launcher ends those that do not come in time, for they may be stopped. A worker that has just joined waits
        as long as the others take: they come after a step and what follows it. RunComplete where they have ended
        with the run's results.
        """
        store, deadline = self.store, time.monotonic() + timeout_seconds
        store.set(f"here/{self._seat}", "")
        missing = list(self.generation.seats)
        while missing := [seat for seat in missing if not store.check([f"here/{seat}"])]:
            if self._is_over():
                raise GroupChanged
            self._check_complete()
            if time.monotonic() > deadline and not self._has_just_joined:
                self._tell_silent(missing)
                if self.generation.number and self.wait_for_change():
                    raise GroupChanged
                raise WorkersLost(f"{len(missing)} of the workers that go on did not come.")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._has_just_joined = False

    def _tell_silent(self, seats: Sequence[int]) -> None:
        self._store.set(SILENT, json.dumps(seats))

    def _check_complete(self) -> None:
        if self._store.check([COMPLETE]):
            raise RunComplete

    def _is_over(self) -> bool:
        return bool(self._store.check([NOW])) and self._newest().number > self.generation.number

    def _newest(self) -> Generation:
        return msgspec.json.decode(self._store.get(NOW), type=Generation)


def members_of_launcher(timeout_seconds: float) -> Membership:
    """This worker's membership; UsageError where the launcher ends all workers when one is lost."""
    environment = os.environ
    num_workers = int(environment["WORLD_SIZE"])
    if LAUNCHER not in environment:
        raise UsageError(
            "recovery=continue, but the launcher of these workers ends all when one is lost. Start them with "
            "`mbgd train workers=N …` on one host, or use recovery=restart."
        )
    seat = int(environment.get(SEAT, environment["LOCAL_RANK"]))
    of_run = PrefixStore(environment["TORCHELASTIC_RUN_ID"], join_store(timeout_seconds))
    store = common_store(of_run, int(environment["TORCHELASTIC_RESTART_COUNT"]))
    return Membership(store, seat, num_workers)
