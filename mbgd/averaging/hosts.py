"""Averaging for CPU workers of several hosts, some of them on the same one: within each host, then between hosts."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from mbgd.averaging.bucket_exchange import nodes_of_workers
from mbgd.averaging.ddp import sum_here
from mbgd.averaging.host_memory.between_hosts import BetweenHosts
from mbgd.averaging.host_memory.hosts_exchange import HostsExchange, TwoFolds
from mbgd.averaging.host_memory.memory import CannotShareError, HostMemory
from mbgd.averaging.host_memory.rows import MOVED_ON, Row
from mbgd.averaging.pieces import Piece
from mbgd.averaging.reproducible import Reproducible
from mbgd.averaging.sent_parameters import SentParameters
from mbgd.averaging.shared_memory import SharedMemory, in_order
from mbgd.averaging.tree import Counter, fold, worker_nodes
from mbgd.batches.plan import Plan
from mbgd.task.trained import Trained
from mbgd.workers.group import Workers


class SharedMemoryOnHosts(SharedMemory):
    """Sums gradients in the memory of each host in rank order, and then over the hosts in their order.

    What a step needs of the others beside gradients goes from host to host with the workers' notes: which gradients
    are there, and the sums of weights and losses.
    """

    def __init__(self, task: nn.Module, trained: Trained, workers: Workers, memory: HostMemory) -> None:
        """Raises CannotShareError, on all workers alike, if there is too little memory to share."""
        self._between = BetweenHosts(memory)
        hosts = self._between.hosts
        self._folds = TwoFolds(lambda rows: [in_order(rows)], in_order, (1,) * len(hosts))
        self._riders: list[_Rider] = []
        super().__init__(task, trained, workers, memory)

    def _make_exchange(self) -> list[Tensor]:
        self._over_hosts = HostsExchange(self._parameters, 1, self._between)
        return self._over_hosts.places[0]

    def own(self, parameters: Mapping[str, nn.Parameter], of_workers: list[list[Piece]]) -> SentParameters:
        sent = SentParameters(parameters, of_workers, self._workers)
        self._owned = sent.owned
        self._prepare()  # strides may have changed
        return sent

    @property
    def shares_memory(self) -> bool:
        return False

    def _add_up(self, gradients: Row, note: int, *, whole: bool) -> list[int]:
        riders, self._riders = self._riders, []
        notes, total = self._over_hosts(
            [gradients], self._num_rows, self._folds, note, rider=lambda: _together([one.of_host() for one in riders])
        )
        for rider, part in zip(riders, torch.split(total, [one.num_values for one in riders]), strict=True):
            rider.total = part
        if self._owned is not None and MOVED_ON not in notes:
            self._owned.take_gradients(whole=whole)
        return notes

    def sum(self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int) -> Tensor:
        return self._between.sum(sum_here(leaves, num_values, self._workers.device))

    def start_sum(
        self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int
    ) -> Callable[[], Tensor]:
        rider = _Rider(self._memory.put(sum_here(leaves, num_values, self._workers.device)), num_values)
        self._riders.append(rider)
        return rider.sum

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        return self._between.gather(values)

    def describe(self) -> str:
        return self._between.describe()


class ReproducibleOnHosts(Reproducible):
    """The tree of `Reproducible`: each host folds the nodes of its workers, and the hosts fold theirs to the root.

    A host's workers have consecutive ranks, hence consecutive leaves. So the nodes that it is left with are subtrees,
    and all additions are those of the tree. Sums of vectors go through messages of all workers.
    """

    def __init__(
        self,
        task: nn.Module,
        trained: Trained,
        workers: Workers,
        plan: Plan,
        memory: HostMemory,
        *,
        find_unused_parameters: bool,
    ) -> None:
        """Raises CannotShareError, on all workers alike, if there is too little memory to share, or ranks are mixed."""
        if [rank for host in memory.hosts for rank in host] != list(range(workers.num_workers)):
            raise CannotShareError("the ranks of a host's workers do not follow each other")
        self._between = BetweenHosts(memory)
        super().__init__(task, trained, workers, plan, memory, find_unused_parameters=find_unused_parameters)

    def _make_exchange(self, memory: HostMemory) -> None:
        self._over_hosts = HostsExchange(self._parameters, self._most_nodes, self._between)

    def _exchange(self, rows: Sequence[Row], note: int, *, whole: bool) -> tuple[list[int], bool]:
        num_leaves = self._last.num_micro_batches
        nodes = nodes_of_workers(num_leaves, self._workers.num_workers)
        folds = _folds_of_tree(num_leaves, self._between)
        notes, _ = self._over_hosts(rows, [len(held) for held in nodes], folds, note)
        return notes, self._over_hosts.everywhere

    @property
    def _in_messages(self) -> bool:
        return True

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        return self._between.gather(values)

    def describe(self) -> str:
        return f"reproducible over {self._between.describe()}"


def _folds_of_tree(num_leaves: int, between: BetweenHosts) -> TwoFolds:
    num_workers = sum(map(len, between.hosts))
    of_workers = [node for rank in between.memory.members for node in worker_nodes(num_leaves, num_workers, rank)]
    of_hosts = [worker_nodes(num_leaves, num_workers, ranks[0], len(ranks)) for ranks in between.hosts]
    order = [node for held in of_hosts for node in held]

    def within(rows: Sequence[Tensor]) -> list[Tensor]:
        counter = Counter[Tensor](Tensor.add_)
        for node, row in zip(of_workers, rows, strict=True):
            counter.push_node(node, row)
        return [term for _, term in counter.nodes]

    return TwoFolds(
        within,
        lambda terms: fold(dict(zip(order, terms, strict=True)), num_leaves, Tensor.add_),
        tuple(len(held) for held in of_hosts),
    )


class _Rider:
    """A sum that is exchanged with the workers' notes."""

    def __init__(self, of_workers: Sequence[Tensor], num_values: int) -> None:
        """of_workers: the values of this host's workers, to be read after a barrier."""
        self._of_workers, self.num_values = of_workers, num_values
        self.total: Tensor | None = None

    def of_host(self) -> Tensor:
        return reduce(torch.add, self._of_workers)

    def sum(self) -> Tensor:
        assert self.total is not None, "the sum is there after `finish`"
        return self.total


def _together(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.float64), *values])
