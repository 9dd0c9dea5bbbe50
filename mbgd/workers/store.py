"""The store by which the workers of a run find each other.

Under `mbgd.torchrun` on one host it is a file in memory, which the kernel opens to the same user alone. Otherwise it is
torch's TCPStore: a port without a password.
"""

import os
import socket
import sys
import tempfile
import time
import uuid
from datetime import timedelta

from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from mbgd.errors import WorkersLost
from mbgd.workers.place import check_meeting_point

STORE = "MBGD_STORE"
"""Environment variable with the path of the file."""

SECONDS_BETWEEN_LOOKS = 0.005

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def make_store() -> str:
    """A path where only this user's processes can open a store, while this process lives."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("mbgd-store", os.MFD_CLOEXEC)
        os.fchmod(descriptor, 0o600)
        return f"/proc/{os.getpid()}/fd/{descriptor}"
    return os.path.join(tempfile.mkdtemp(prefix="mbgd-"), "store")  # noqa: PTH118 - mkdtemp makes it for this user alone


def join_store(timeout_seconds: float) -> Store:
    """The store that the environment variables describe."""
    timeout = timedelta(seconds=timeout_seconds)
    path = os.environ.get(STORE)
    if path is None:
        check_meeting_point()
        store: Store = next(rendezvous("env://", timeout=timeout))[0]
        return store
    if sys.platform == "linux":  # kept open: the store outlives the process that made it
        path = f"/proc/self/fd/{os.open(path, os.O_RDWR | os.O_CLOEXEC)}"
    store = FileStore(path)
    store.set_timeout(timeout)
    return store


def of_this_round(store: Store, rank: int, num_workers: int, timeout_seconds: float) -> Store:
    """The part of the store that only the workers started together use; waits until all of them have come.

    A store may outlive its workers and then holds the addresses of those that are gone. Launchers do not say which
    start this is: each host counts TORCHELASTIC_RESTART_COUNT for itself, so hosts that joined at different times
    disagree. Therefore the workers agree themselves: each writes a random name of its own, and the main worker answers
    every name with the round's. An answer to a worker that is gone reaches nobody.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        _gather(store, mine, num_workers, timeout_seconds)
        return PrefixStore(mine, store)
    store.set(f"here/{rank}", mine)
    try:
        store.wait([f"round/{mine}"], timedelta(seconds=timeout_seconds))
    except RuntimeError as error:  # too late, or the store is gone
        raise WorkersLost(_not_come([0], timeout_seconds)) from error
    of_round = store.get(f"round/{mine}").decode()
    store.set(f"met/{of_round}/{rank}", "")
    return PrefixStore(of_round, store)


def _gather(store: Store, of_round: str, num_workers: int, timeout_seconds: float) -> None:
    """Answer the other workers with the round's name until all of them have met."""
    answered: dict[int, bytes] = {}
    missing = list(range(1, num_workers))
    deadline = time.monotonic() + timeout_seconds
    while missing:
        for rank in missing:
            if store.check([f"here/{rank}"]) and (name := store.get(f"here/{rank}")) != answered.get(rank):
                store.set(f"round/{name.decode()}", of_round)
                answered[rank] = name
        missing = [rank for rank in missing if not store.check([f"met/{of_round}/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise WorkersLost(_not_come(missing, timeout_seconds))
        time.sleep(SECONDS_BETWEEN_LOOKS if missing else 0.0)


def _not_come(ranks: list[int], timeout_seconds: float) -> str:
    named = f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return (
        f"{named} did not come within backend.timeout_seconds={timeout_seconds:g} of the start. Look at the end of the "
        "output there: not started, ended, or its host cannot be reached."
    )


def stay_on_this_host() -> None:
    """Have gloo listen on loopback only, if the launcher says that all workers are on this host."""
    environment = os.environ
    is_one_host = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE", "")
    if is_one_host and GLOO_INTERFACE not in environment:
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:
            environment[GLOO_INTERFACE] = loopback[0]
