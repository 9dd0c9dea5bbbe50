"""The store by which the workers of a run find each other.

Under `mbgd.torchrun` on one host it is a file in memory, which the kernel opens to the same user alone. Otherwise it is
torch's TCPStore: a port without a password.
"""

import os
import socket
import sys
import tempfile
from datetime import timedelta

from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

STORE = "MBGD_STORE"
"""Environment variable with the path of the file."""

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
        store: Store = next(rendezvous("env://", timeout=timeout))[0]
        return store
    if sys.platform == "linux":  # kept open: the store outlives the process that made it
        path = f"/proc/self/fd/{os.open(path, os.O_RDWR | os.O_CLOEXEC)}"
    store = FileStore(path)
    store.set_timeout(timeout)
    return store


def stay_on_this_host() -> None:
    """Have gloo listen on loopback only, if the launcher says that all workers are on this host."""
    environment = os.environ
    is_one_host = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE", "")
    if is_one_host and GLOO_INTERFACE not in environment:
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:
            environment[GLOO_INTERFACE] = loopback[0]
