"""`python -m mbgd.torchrun [torchrun's options] train.py …`: torchrun with a store that others cannot access.

torchrun's own store listens on every interface of the host, asks for no password, and holds a state that is unpickled:
whoever reaches the port can run code as the user. Here, on one host, there is no port: the store is a file in memory.
On several hosts the stores listen only on the address of --local-addr, and only the classes that torch writes there are
unpickled. A private network is still needed (docs/clusters.md).
"""

import argparse
import hashlib
import io
import os
import pickle
import signal
import socket
import stat
import sys
import types
import uuid
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from mbgd.workers.parent import PARENT, end_with_parent

ONE_HOST, SEVERAL_HOSTS = "mbgd-host", "mbgd-hosts"
"""The names of the rendezvous below."""

KEY_FILE = "MBGD_KEY_FILE"
"""Environment variable: a file with a secret of all hosts of a run, so that nobody can guess the rendezvous' name."""

DEFAULT_PORT = 29400  # torchrun's
SECONDS_FOR_THE_STORE = 60

OF_THE_ROUND = ("_bootstrap_store_info", "_shared_tcp_store_server")
"""Attributes of torch's rendezvous: the workers' store, its address and its server."""

OPENS_PORTS = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable with which torch's workers open a store of their own, on every interface."""

UNPICKLED = {
    ("torch.distributed.elastic.rendezvous.dynamic_rendezvous", "_RendezvousState"),
    ("torch.distributed.elastic.rendezvous.dynamic_rendezvous", "_NodeDesc"),
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
}
"""All classes in a rendezvous' state, beside Python's containers and numbers."""


def main() -> None:
    end_with_parent()
    # torch takes a second to import.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import record

    record(run.run)(prepare(sys.argv[1:]))


def prepare(options: Sequence[str]) -> argparse.Namespace:
    """torchrun's parsed arguments, changed to use the stores described above."""
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    from mbgd.workers.store import STORE, make_store

    os.environ[PARENT] = str(os.getpid())
    arguments: argparse.Namespace = run.parse_args(  # type: ignore[no-untyped-call]
        ["--signals-to-handle", ",".join(signals()), *options]
    )
    rendezvous_handler_registry.register(ONE_HOST, _one_host)
    rendezvous_handler_registry.register(SEVERAL_HOSTS, _several_hosts)
    if run.parse_min_max_nnodes(arguments.nnodes)[1] == 1:
        os.environ[STORE] = make_store()
        arguments.standalone, arguments.rdzv_backend, arguments.rdzv_endpoint = False, ONE_HOST, "none"
        if arguments.rdzv_id == "none":
            arguments.rdzv_id = str(uuid.uuid4())
    elif arguments.rdzv_backend != "c10d" or arguments.local_addr is None:
        sys.exit("error: several hosts need --rdzv-backend c10d, and --local-addr: the address to listen on")
    else:
        arguments.rdzv_backend = SEVERAL_HOSTS
    return arguments


def signals() -> list[str]:
    """The signals that torchrun handles and passes on to its workers; an ignored SIGHUP (nohup) stays ignored."""
    closed_terminal = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else ["SIGHUP"]
    return ["SIGTERM", "SIGINT", "SIGUSR1", *closed_terminal]


def _one_host(parameters: Any) -> Any:
    """A rendezvous of one host: it has all workers, and only this process uses the rendezvous' store."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

    class OneHost(RendezvousHandler):
        use_agent_store = False

        def get_backend(self) -> str:
            return ONE_HOST

        def next_rendezvous(self) -> RendezvousInfo:
            return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            pass

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return str(parameters.run_id)

        def shutdown(self) -> bool:
            return True

    return OneHost()


def _several_hosts(parameters: Any) -> Any:
    """torchrun's c10d rendezvous, whose stores listen on the local address alone."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

    host, port = parse_rendezvous_endpoint(parameters.endpoint, DEFAULT_PORT)
    is_host = parameters.get_as_bool("is_host")
    if _matches_machine_hostname(host) if is_host is None else is_host:
        store = serve(parameters.local_addr, port)
    else:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SECONDS_FOR_THE_STORE))
    name, parameters.run_id = parameters.run_id, parameters.run_id + _key()
    handler = dynamic_rendezvous.create_handler(store, C10dRendezvousBackend(store, parameters.run_id), parameters)
    # These names in torch are replaced below. If a torch lacks one, its own insecure version would run unnoticed.
    for owner, names in ((dynamic_rendezvous, ("pickle",)), (handler, ("_create_tcp_store_server", *OF_THE_ROUND))):
        for name in names:
            if not hasattr(owner, name):
                sys.exit(f"error: this torch's rendezvous has no {name}, which mbgd must replace. Use torch 2.13.")
    os.environ.pop(OPENS_PORTS, None)
    restricted = types.SimpleNamespace(dumps=pickle.dumps, loads=load_state, PickleError=pickle.PickleError)
    dynamic_rendezvous.pickle = restricted  # type: ignore[attr-defined, assignment]
    handler._create_tcp_store_server = serve  # type: ignore[method-assign, assignment]
    handler.next_rendezvous = partial(_next_round, handler)  # type: ignore[method-assign]
    handler.get_backend = lambda: parameters.backend  # type: ignore[method-assign]
    handler.get_run_id = lambda: name  # type: ignore[method-assign]  # names the run; the key stays here
    return handler


def _next_round(handler: Any) -> Any:
    """The next round of hosts, whose workers meet at a store of their own.

    torch keeps the first round's store and announces it in that round only, so a host that joins later waits for it
    until it gives up; and the old store holds the addresses of workers that are gone.
    """
    before = [getattr(handler, name) for name in OF_THE_ROUND]
    for name in OF_THE_ROUND:
        setattr(handler, name, None)
    joined = type(handler).next_rendezvous(handler)
    del before  # the old store serves until here: until all hosts have joined, workers may still ask it who is missing
    return joined


def serve(address: str, port: int) -> Any:
    """A TCPStore's server that listens on one address; port 0: a free one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((address, port), family=family)
    return TCPStore(
        address,
        listener.getsockname()[1],
        is_master=True,
        multi_tenant=True,
        timeout=timedelta(seconds=SECONDS_FOR_THE_STORE),
        master_listen_fd=listener.detach(),
    )


def load_state(state: bytes) -> Any:
    """Unpickle a rendezvous' state; UnpicklingError for any class that torch does not write there."""
    return _StateUnpickler(io.BytesIO(state)).load()


class _StateUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in UNPICKLED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a rendezvous' state")
        return super().find_class(module, name)


def _key() -> str:
    """The suffix of the rendezvous' name; empty without a key file."""
    if KEY_FILE not in os.environ:
        return ""
    path = Path(os.environ[KEY_FILE])
    try:
        with path.open("rb") as file:
            status, key = os.fstat(file.fileno()), file.read(4096)
    except OSError as error:
        sys.exit(f"error: KEY_FILE={path} cannot be read: {error.strerror}")
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        sys.exit(f"error: KEY_FILE={path} must be yours and closed to others: chmod 600 {path}")
    if len(key) < 16:
        sys.exit(f"error: KEY_FILE={path} holds {len(key)} bytes; a key needs 16 or more: openssl rand -hex 32")
    return "." + hashlib.sha256(key).hexdigest()


if __name__ == "__main__":
    main()
