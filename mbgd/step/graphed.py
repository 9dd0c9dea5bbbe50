"""Micro-batches that are replayed as CUDA graphs where that is possible, with the bits of the eager ones.

A small model's step is many short kernels, and the host takes longer to launch them than the GPU to compute them. A
graph is launched as one. It is recorded once for each shape of micro-batch, after a few eager ones, and then compared
with an eager computation of the next micro-batch; in every step that is logged or measured micro-batches are computed
eagerly, and a replay is compared again. Whatever a graph cannot do is refused by name, and training goes on eagerly.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as of_torch

from mbgd.averaging import Averager
from mbgd.batches.loader import Examples, Shard
from mbgd.batches.plan import MicroBatch
from mbgd.batches.randomness import key_generators, random_state_kept
from mbgd.checks.graphs import HOOKS, hooked, obstacles
from mbgd.checks.setup import Setup
from mbgd.config import CudaGraphsName
from mbgd.errors import UsageError
from mbgd.measuring.clock import FORWARD
from mbgd.measuring.profiling import part
from mbgd.step.graph import CannotRecordError, Graph, Outputs, Recorder, Shape, difference, first_line, shape_of
from mbgd.step.graph_recorder import CudaGraphs
from mbgd.step.one_pass import AfterForward, OnePass, Passes
from mbgd.step.update import Update
from mbgd.task.objective import PerExample
from mbgd.task.precision import autocast

EAGER_FIRST = 3
"""Eager micro-batches of a shape before it is recorded: what torch and the model set up at first is done by then."""

MOST_GRAPHS = 8
"""Shapes that are recorded; micro-batches of others stay eager."""
MOST_COUNTED = 64
"""Shapes whose micro-batches are counted at a time; where more come, the count begins anew."""

_modes = attrgetter("training")
_requires_grad = attrgetter("requires_grad")


class State(NamedTuple):
    """What a recording takes for constant, beside the values in memory."""

    trains: tuple[bool, ...]
    """Each module's mode."""
    requires_grad: tuple[bool, ...]
    """Of each trained parameter."""
    places: tuple[int, ...]
    """Where parameters and buffers lie."""


class Key(NamedTuple):
    """Micro-batches with the same key have the same graph."""

    shape: Shape
    num_examples: int
    state: State


class Graphed:
    """`OnePass` for one worker, whose micro-batches are replayed wherever a graph has been compared with it."""

    def __init__(
        self,
        setup: Setup,
        averaging: Averager,
        update: Update,
        eager: OnePass,
        recorder: Recorder,
        is_eager: Callable[[int], bool],
        lap: Callable[[str], None],
    ) -> None:
        """is_eager(step): whether a step needs more than losses, weights and gradients, such as metrics."""
        self._setup, self._averaging, self._update, self._lap = setup, averaging, update, lap
        self._eager, self._recorder, self._is_eager = eager, recorder, is_eager
        self._autocast = autocast(setup.settings.precision, setup.workers.device)
        self._modules = dict(setup.task.named_modules())
        self._hooks = [getattr(module, hooks) for module in self._modules.values() for hooks in HOOKS]
        self._counts: dict[Key, int] = {}
        self._graphs: dict[Key, Graph] = {}
        self.reason = ""
        """Why nothing is replayed any more; empty as long as it may be."""
        self.num_replayed = 0
        """Micro-batches so far, beside comparisons."""

    def begin(self, shard: Shard) -> None:
        self._eager.begin(shard)

    def end(self) -> None:
        self._eager.end()

    def forward_again(self, step: int, examples: Examples) -> PerExample:
        return self._eager.forward_again(step, examples)

    def gradients_again(self, step: int, examples: Examples) -> dict[Tensor, Tensor]:
        return self._eager.gradients_again(step, examples)

    def forward_backward(self, shard: Shard, examples: Examples, after_forward: AfterForward) -> None:
        key = self._key(shard.step, examples)
        graph = None if key is None else self._graphs.get(key)
        if graph is not None and graph.equal_in is not None and not self._is_eager(shard.step):
            self._replay(graph, shard, examples, after_forward)
            return
        self._eager.forward_backward(shard, examples, after_forward)
        if key is None:
            return
        try:
            if graph is None:
                self._count(key, shard.step, examples)
            elif graph.equal_in != shard.step:
                self._compare(graph, shard.step, examples)
        except CannotRecordError as error:
            self._stop(shard.step, str(error))

    def _replay(self, graph: Graph, shard: Shard, examples: Examples, after_forward: AfterForward) -> None:
        micro_batch = examples.micro_batch
        is_last = self._eager.start(shard, examples)
        with self._averaging.micro_batch(micro_batch, is_last=is_last):
            with part("replay"):
                graph.fill(examples.batch)
                outputs = graph.replay()
            after_forward(PerExample(outputs.losses, outputs.weights), micro_batch)
            if is_last:
                self._lap(FORWARD)
            graph.add_gradients()
        self._setup.buffers.end_micro_batch(micro_batch.number, micro_batch.size, is_stand_in=False)
        self.num_replayed += 1

    def _key(self, step: int, examples: Examples) -> Key | None:
        """None: this micro-batch is eager, and no graph is wanted for it."""
        if self.reason:
            return None
        try:
            if any(self._hooks) or of_torch._has_any_global_hook():  # type: ignore[no-untyped-call]
                raise CannotRecordError(hooked(self._modules))
            shape = shape_of(examples.batch, self._setup.workers.device)
        except CannotRecordError as error:
            self._stop(step, str(error))
            return None
        return Key(shape, examples.micro_batch.size, self._state())

    def _state(self) -> State:
        modules = self._modules.values()
        held = chain.from_iterable((*one._parameters.values(), *one._buffers.values()) for one in modules)
        return State(
            tuple(map(_modes, modules)),
            tuple(map(_requires_grad, self._setup.trained.parameters)),
            tuple(one.data_ptr() for one in held if one is not None),
        )

    def _check_constant(self, before: State) -> None:
        """CannotRecordError if a forward has changed what is constant in a graph."""
        now = self._state()
        if now.trains != before.trains:
            raise CannotRecordError("the forward changes the mode of a module, training or evaluation")
        if now.requires_grad != before.requires_grad:
            raise CannotRecordError("the forward changes which parameters require a gradient")
        if now.places != before.places:
            raise CannotRecordError(
                "the forward assigns a buffer or a parameter another tensor, where a replay needs one place"
            )

    def _count(self, key: Key, step: int, examples: Examples) -> None:
        """Record the shape once it has come often enough."""
        if len(self._graphs) >= MOST_GRAPHS:
            return
        if len(self._counts) >= MOST_COUNTED:
            self._counts.clear()
        self._counts[key] = count = self._counts.get(key, 0) + 1
        if count < EAGER_FIRST:
            return
        if torch.is_autocast_enabled(self._setup.workers.device.type):
            raise CannotRecordError(
                "training runs within torch.autocast, whose cache of casts would outlive a recording"
            )
        try:
            with random_state_kept(self._setup.workers.device):
                self._check_constant(key.state)
                graph = self._record(step, examples)
                self._check_constant(key.state)
        except CannotRecordError:
            raise
        except Exception as error:  # the eager computation has been made, and tells of its own errors
            raise CannotRecordError(f"the recording failed: {first_line(error)}") from None
        self._graphs[key] = graph

    def _record(self, step: int, examples: Examples) -> Graph:
        graph = self._new_graph(examples)
        self._restart(step, examples.micro_batch)
        self._recorder.warm_up(graph.compute)
        self._restart(step, examples.micro_batch)
        graph.record(self._recorder)
        return graph

    def _new_graph(self, examples: Examples) -> Graph:
        trained, buffers = self._setup.trained, self._setup.buffers
        held = {name: one for name, one in trained.by_name.items() if one.requires_grad}
        compute = partial(self._compute, examples.micro_batch.size, list(held.values()))
        return Graph(examples.batch, compute, held, lambda: buffers.tensors(caches=True))

    def _compute(self, num_examples: int, held: Sequence[Tensor], batch: Any) -> Outputs:
        """As `OnePass` does it, but the gradients are handed out instead of added to `.grad`."""
        with self._autocast:
            terms: PerExample = self._averaging.forward(batch, num_examples)
        weights = self._update.backward_weights(terms, is_stand_in=False)
        gradients = torch.autograd.grad(terms.losses, held, weights, allow_unused=True)
        return Outputs(terms.losses.detach(), None if terms.weights is None else terms.weights.detach(), gradients)

    def _compare(self, graph: Graph, step: int, examples: Examples) -> None:
        """Compare a replay with an eager computation, bit by bit.

        CannotRecordError if they differ, or UsageError where the graph has been replayed before.
        """
        with random_state_kept(self._setup.workers.device):
            graph.fill(examples.batch)
            once = partial(self._once, graph, step, examples.micro_batch)
            eager = once(graph.compute)
            wrong = difference(eager, once(graph.replay))
            unsteady = difference(eager, once(graph.compute)) if wrong else ""
        if unsteady:
            raise CannotRecordError(
                f"two eager computations of a micro-batch differ in {unsteady}, so that a replay cannot be compared "
                "with one; with averaging=reproducible they are equal"
            )
        if wrong and graph.equal_in is None:
            raise CannotRecordError(f"a replay has other bits than an eager computation: {wrong}")
        if wrong:
            raise UsageError(_describe_late(wrong, step, graph.equal_in, examples.micro_batch.size))
        graph.equal_in = step

    def _once(self, graph: Graph, step: int, micro_batch: MicroBatch, how: Callable[[], Outputs]) -> dict[str, Tensor]:
        """The outputs and the buffers by name; those of a replay are in its own memory."""
        self._restart(step, micro_batch)
        return graph.named(how())

    def _restart(self, step: int, micro_batch: MicroBatch) -> None:
        """As before an eager micro-batch, which has left its values of the buffers with `Buffers.end_micro_batch`."""
        self._setup.buffers.put_back()
        key_generators(self._setup.workers.device, self._setup.settings.seed, step, micro_batch.number)

    def _stop(self, step: int, reason: str) -> None:
        """Nothing is replayed from now on."""
        self.reason = reason
        self._graphs.clear()
        self._counts.clear()
        self._setup.tell(f"note: no CUDA graphs after step {step + 1}: {reason}.")


def graphed(
    setup: Setup,
    averaging: Averager,
    update: Update,
    eager: Passes,
    is_eager: Callable[[int], bool],
    lap: Callable[[str], None],
    users_observers: Sequence[str],
) -> tuple[Passes, str]:
    """The passes of the run, replayed if the settings ask for it and nothing forbids it; and the plan, in words.

    The words are empty if the settings do not ask for it. users_observers: names of observers of the user's own.
    """
    if setup.settings.cuda_graphs is CudaGraphsName.off:
        return eager, ""
    if found := obstacles(setup, users_observers):
        return eager, f"none: {found[0]}"
    assert isinstance(eager, OnePass)
    recorder = CudaGraphs(setup.workers.device)
    passes = Graphed(setup, averaging, update, eager, recorder, is_eager, lap)
    return passes, f"each shape of micro-batch after {EAGER_FIRST} eager ones, compared with a fourth"


def _describe_late(wrong: str, step: int, equal_in: int | None, num_examples: int) -> str:
    """The error where a graph that had the right bits no longer has them."""
    assert equal_in is not None
    return (
        f"step {step + 1}: a micro-batch of {num_examples} examples, replayed as a CUDA graph, has other bits than "
        f"computed eagerly: {wrong}. In step {equal_in + 1} they were equal. The model or the objective has changed on "
        "the host since, such as a counter or a rate, which a replay does not see; the steps between may be wrong. Set "
        f"cuda_graphs=off, and go on from a checkpoint of step {equal_in + 1} or before."
    )
