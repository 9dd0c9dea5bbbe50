"""torch's process group of a run's workers, from their meeting at the store to its end."""

import importlib
import os
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout, _world

from mbgd.errors import GroupChanged, WorkersLost
from mbgd.workers import flight_recorder
from mbgd.workers.connections import Connections
from mbgd.workers.membership import Membership
from mbgd.workers.roll_call import RollCall, describe
from mbgd.workers.store import join_store, of_this_round, stay_on_this_host
from mbgd.workers.under_way import let_end

SECONDS_TO_CONNECT_AGAIN = 30.0
"""Workers that go on have met just before, so one that does not connect is lost, whatever an exchange may take."""
SECONDS_FOR_THREADS_TO_END = 0.1


def is_of_exchange(error: BaseException) -> bool:
    """Whether an exchange failed, because others are lost or do not come: nothing that this worker did is wrong."""
    return isinstance(error, dist.DistError | WorkersLost) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class ProcessGroup:
    """The group that one worker is in with the others."""

    def __init__(
        self,
        rank: int,
        num_workers: int,
        backend: str,
        device: torch.device,
        timeout_seconds: float,
        membership: Membership | None,
    ) -> None:
        """For the arguments see `start_workers`."""
        self._rank, self._num_workers, self._backend, self._device = rank, num_workers, backend, device
        self._timeout_seconds, self._membership = timeout_seconds, membership
        self._is_later = membership is not None and membership.generation.number > 0
        self._connects_again = False
        self._connections = Connections()
        self._roll_call: RollCall | None = None

    def form(self) -> None:
        """Meet the other workers at the store and connect with them."""
        stay_on_this_host()
        store = self._meet()
        flight_recorder.turn_on()
        self._roll_call = RollCall(
            store,
            self._rank,
            self._num_workers,
            self._timeout_seconds,
            # torch's recorder does not tell this group's exchanges from those of the groups before it.
            exchanges=_unknown if self._is_later else partial(flight_recorder.exchanges, self._backend),
            ends_unheard=self._backend == "nccl",
        )
        timeout = max(self._timeout_seconds - self._roll_call.seconds, 1.0)
        to_connect = min(timeout, SECONDS_TO_CONNECT_AGAIN) if self._is_later else timeout
        self._connects_again = self._is_later
        # The names of groups, under which workers find each other in the store, count those that failed to form, too.
        _world.group_count = 0
        with self._connections.noted():
            dist.init_process_group(
                self._backend,
                store=store,
                rank=self._rank,
                world_size=self._num_workers,
                timeout=timedelta(seconds=to_connect),
                device_id=self._device if self._backend == "nccl" else None,  # makes nccl connect, and fail, at once
            )
        self._connects_again = False
        if to_connect < timeout:
            _set_pg_timeout(timedelta(seconds=timeout))

    def explain(self, error: RuntimeError) -> None:
        """Raise what a failed exchange means: others go on, or workers are missing. Returns where it was none."""
        if not (is_of_exchange(error) or self._connects_again):
            return
        if self._membership is not None and self._others_go_on(self._membership):
            raise GroupChanged from error
        if self._roll_call is not None and not isinstance(error, WorkersLost):
            told = describe(self._roll_call.missing(), self._timeout_seconds, str(error))
            raise WorkersLost(told) from error

    def leave(self) -> None:
        """With others going on, make room for a new group."""
        if self._membership is not None and dist.is_initialized():
            self._connections.shut_down()  # wakes the others that wait for this worker
            let_end()
            dist.destroy_process_group()
        if self._roll_call is not None:
            self._roll_call.end()
            # The group's threads still release tensors, for which they need the GIL. If the interpreter is shutting
            # down by then, they abort the process.
            time.sleep(SECONDS_FOR_THREADS_TO_END)

    def _meet(self) -> Store:
        """The store of this group alone."""
        if self._membership is None:
            of_run = PrefixStore(os.environ.get("TORCHELASTIC_RUN_ID", ""), join_store(self._timeout_seconds))
            return of_this_round(of_run, self._rank, self._num_workers, self._timeout_seconds)
        # Its functions keep the group that there is when it is imported, as default arguments. Then the group's
        # connections would stay open, and the others would wait for this worker after it has left.
        importlib.import_module("torch.distributed.nn.functional")
        self._membership.meet(self._timeout_seconds)
        return self._membership.store

    def _others_go_on(self, membership: Membership) -> bool:
        """After a failed exchange: whether the launcher says that a worker is lost, or one is that does not answer."""
        if membership.wait_for_change():
            return True
        if self._roll_call is None:
            return False
        if lost := self._roll_call.missing().lost:
            membership.tell_silent(lost)
        return bool(lost) and membership.wait_for_change()


def _unknown(*, named: bool) -> None:
    """In place of the exchanges that the recorder has."""
