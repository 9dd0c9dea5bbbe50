"""torch's elastic agent, as in torchrun, but in this process: quiet, and with the workers' own exit code."""

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from typing import Any

from torch.distributed import DistError, DistNetworkError, DistStoreError
from torch.distributed import run as torchrun
from torch.distributed.elastic import rendezvous
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api

from mbgd.cli.rest import Rest
from mbgd.errors import FAILED, USAGE
from mbgd.torchrun import DEFAULT_PORT, ONE_HOST
from mbgd.workers.membership import LAUNCHER
from mbgd.workers.preemption import EXIT_CODE as PREEMPTED

OF_TORCHRUN = "torch.distributed"
"""torchrun's loggers, which would repeat the workers' errors."""

SECONDS_FOR_MAIN_HOST = 600

NO_FILE = "<N/A>"
"""torch's placeholder for the error file of a worker that has reported nothing."""


class Agent(LocalElasticAgent):  # type: ignore[misc, unused-ignore]
    """torch's agent, which also prints restarts, and does not restart where that cannot help."""

    last: "Agent | None" = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        Agent.last = self
        self._rest: Rest | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        if LAUNCHER in os.environ:
            restarts = worker_group.spec.max_restarts - self._remaining_restarts
            self._rest = Rest(self._pcontext, worker_group.spec.rdzv_handler.get_run_id(), restarts)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        first = self._ended()  # these ended by themselves; the agent ends the rest
        if self._rest is not None and self._rest.goes_on():
            self._remaining_restarts -= self._rest.look(self._remaining_restarts)
            result = _result(self._rest.ended())
        else:
            result = super()._monitor_workers(worker_group)
        if result.is_failed():
            _tell({rank: one for rank, one in result.failures.items() if one.pid in first} or result.failures)
            if {USAGE, PREEMPTED} & {failure.exitcode for failure in result.failures.values()}:
                self._remaining_restarts = 0
            if self._remaining_restarts > 0:
                most = worker_group.spec.max_restarts
                number = most - self._remaining_restarts + 1
                print(f"restart     {number} of {most}: all workers are started again", flush=True)
        return result

    def _shutdown(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """death_sig: the signal by which the user stops the run; None where the run ends by itself."""
        if death_sig is not None and self._rest is not None and self._rest.goes_on():
            self._rest.stop(death_sig, timeout)
            death_sig = signal.SIGKILL  # the others have had their time
        super()._shutdown(death_sig or signal.SIGTERM, timeout)

    def exit_codes(self) -> list[int]:
        """Exit codes of the workers of this host that have ended."""
        return list(self._ended().values())

    def _ended(self) -> dict[int, int]:
        """The exit codes of the workers of this host that have ended, by process id."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {}).values()
        return {one.proc.pid: code for one in handlers if (code := one.proc.poll()) is not None}


def _result(ended: Any) -> RunResult:
    """torch's result of the workers of the only host, where local ranks are ranks."""
    if not ended:
        return RunResult(state=WorkerState.HEALTHY)
    if ended.is_failed():
        return RunResult(state=WorkerState.FAILED, failures=ended.failures)
    return RunResult(state=WorkerState.SUCCEEDED, return_values=ended.return_values)


def run(arguments: argparse.Namespace) -> int:
    """Start the workers as `mbgd.torchrun.prepare` describes them; the exit code for the shell."""
    if "LOGLEVEL" not in os.environ:  # with it torch's users ask for its log
        for name in [one for one in logging.root.manager.loggerDict if one.startswith(OF_TORCHRUN)]:
            logging.getLogger(name).disabled = True
    if arguments.rdzv_backend == ONE_HOST:
        os.environ[LAUNCHER] = "1"
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="mbgd-", ignore_cleanup_errors=True) as folder:
        arguments.log_dir = folder
        try:
            _run(arguments)
        except rendezvous.RendezvousClosedError:
            return _fail("the run has ended on another host. Look at the end of the output there.")
        except (rendezvous.RendezvousError, DistError) as error:
            return _fail(f"this host could not meet the others: {str(error).splitlines()[0]}")
        except ChildFailedError as error:
            return _exit_code([failure.exitcode for failure in error.failures.values()])
        except SignalException as stop:
            return _after_signal(stop.sigval)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
    return 0


def _run(arguments: argparse.Namespace) -> None:
    """Run torch's agent; if the host with the rendezvous is lost, wait for it, as often as workers may restart."""
    for left in reversed(range(arguments.max_restarts + 1)):
        try:
            torchrun.run(arguments)  # type: ignore[no-untyped-call]
        except (rendezvous.RendezvousConnectionError, DistNetworkError, DistStoreError):
            if not left or not _comes_back(arguments.rdzv_endpoint):
                raise
        else:
            return


def _comes_back(endpoint: str) -> bool:
    """Wait for the host with the rendezvous."""
    print(
        f"restart     MAIN_HOST {endpoint} does not answer: ended, or cut off. This host waits for it for "
        f"{SECONDS_FOR_MAIN_HOST} s: start the same command there again",
        flush=True,
    )
    address = parse_rendezvous_endpoint(endpoint, DEFAULT_PORT)
    deadline = time.monotonic() + SECONDS_FOR_MAIN_HOST
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=5).close()
            return True
        time.sleep(1)
    return False


def _fail(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    return FAILED


def _tell(failures: Mapping[int, Any]) -> None:
    """Report workers that could not do so themselves: killed, or ended outside Python."""
    for rank, one in sorted(failures.items()):
        if one.error_file != NO_FILE or one.exitcode in (FAILED, USAGE, PREEMPTED):
            continue
        how = _name(-one.exitcode) if one.exitcode < 0 else f"exit code {one.exitcode}"
        remedy = "; the kernel does so when memory runs out (see dmesg)" if one.exitcode == -signal.SIGKILL else ""
        host = socket.gethostname()
        print(f"error on worker {rank}: process {one.pid} on host {host} ended by {how}{remedy}.", file=sys.stderr)


def _name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _exit_code(codes: Collection[int]) -> int:
    """One exit code for all workers: from workers that exited themselves, not from those killed as a consequence."""
    said = [code for code in codes if code > 0]
    if said and set(said) == {PREEMPTED}:
        return PREEMPTED
    return next((code for code in said if code != PREEMPTED), FAILED)


def _after_signal(number: signal.Signals) -> int:
    codes = Agent.last.exit_codes() if Agent.last is not None else []
    if codes and set(codes) <= {0, PREEMPTED}:
        return max(codes)
    if said := [code for code in codes if code > 0 and code != PREEMPTED]:
        return said[0]
    print(f"error: stopped by {number.name}; the workers have not saved their state since.", file=sys.stderr)
    return 128 + number
