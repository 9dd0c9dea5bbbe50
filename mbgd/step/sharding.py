"""The owner of a piece of the parameters updates it: `sharding=optimizer`, and where it works."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mbgd.averaging import Averager
from mbgd.averaging.host_memory.memory import CannotShareError
from mbgd.averaging.pieces import OwnedParameters, Piece, cut_by_parameters, cut_in_blocks
from mbgd.checks.replicas import Replicas
from mbgd.checks.setup import Setup
from mbgd.config import ShardingName
from mbgd.errors import UsageError
from mbgd.optimizers import Lamb, Lars, MuonAdamW
from mbgd.step.kept_pieces import KeptPieces
from mbgd.step.norms import NormOfPieces
from mbgd.step.optimizer_trial import has_step_hooks
from mbgd.step.overlaps import overlapping
from mbgd.step.pieces_state import PiecesState
from mbgd.step.scattered_state import ScatteredState
from mbgd.step.sharding_trial import state_bytes, works_in_pieces
from mbgd.step.shared_state import SharedState
from mbgd.text.listing import shown

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD")
"""Optimizers of torch that update each element from its own gradient and state alone."""
BY_PARAMETERS = ("Adafactor", "Muon")
"""Optimizers of torch that update each parameter by itself, but as a whole."""

LEAST_BYTES = 2**20
"""auto does not shard smaller parameters: their updates take microseconds, fewer than telling the others takes."""
LEAST_STATE_BYTES = 2**26
"""auto does not shard smaller state where the others' pieces are sent: that takes longer than updating them."""


@dataclass(frozen=True)
class Sharded:
    """The optimizer's work in pieces, of which this worker has its own."""

    optimizer: Optimizer
    parameters: OwnedParameters
    state: PiecesState
    norm: NormOfPieces
    replicas: Replicas
    averaging: Averager
    names: list[str]
    """Of the trained parameters."""
    strides: list[tuple[int, ...]]
    """Of the trained parameters."""
    compares_before: Callable[[int], bool]
    """compares_before(n): whether the parameters are compared before step number n is made."""
    kept: KeptPieces | None
    """Where each worker keeps its pieces for the others; None where these do not go on without it."""

    @property
    def tensors(self) -> list[Tensor]:
        """This worker's pieces, which its optimizer holds."""
        return self.parameters.owned.tensors

    def begin(self, step: int) -> None:
        """Share the parameters' values of now, which may have been restored or set; ReplicasDiffer if they differ."""
        self._check_strides()
        self.hold()
        self._compare(step)
        self.parameters.adopt()

    def _check_strides(self) -> None:
        """UsageError where a parameter has got another memory format, which would be lost: kernels give other bits."""
        together = zip(self.names, self.parameters.owned.parameters, self.strides, strict=True)
        if changed := [name for name, parameter, strides in together if parameter.stride() != strides]:
            raise UsageError(
                f"since the trainer was made, the order in memory has changed of the parameters {shown(changed)}. With "
                "sharding=optimizer they lie in memory that the trainer has made. Set it before Trainer(…), as with "
                "model.to(memory_format=torch.channels_last), or use sharding=none."
            )

    def hold(self) -> None:
        """Give the optimizer the pieces; UsageError, on every worker alike, if their state has no room."""
        try:
            self.state.hold()
        except CannotShareError as error:
            raise UsageError(f"sharding: for the optimizer's state {error}. Use sharding=none.") from error

    def before_update(self, step: int) -> None:
        """Call before step number `step`; ReplicasDiffer where workers have copies that something else has changed.

        UsageError where the optimizer's step has got hooks, which would see pieces of the parameters and gradients.
        """
        if has_step_hooks(self.optimizer):
            raise UsageError(
                f"before step {step}: since the trainer was made, a hook was registered on the optimizer's step. With "
                "sharding=optimizer it would see pieces of the parameters and gradients alone. Use sharding=none."
            )
        if self.compares_before(step):
            self._compare(step)

    def _compare(self, step: int) -> None:
        self.replicas.compare(step, dict(zip(self.names, self.parameters.owned.parameters, strict=True)), {})

    def share(self) -> None:
        """Let all workers have all pieces; every worker calls this after it has updated its own."""
        self.state.after_update()
        self.parameters.spread()
        try:
            self.state.settle()
        except CannotShareError as error:
            raise UsageError(f"sharding: for the optimizer's state {error}. Use sharding=none.") from error

    def check(self, num_steps: int) -> None:
        """UsageError, on every worker alike, where parameters were written by `num_steps` steps."""
        written = self.replicas.workers.gather_values(self.parameters.written_by_others())
        found = {name for of_worker in written for name in of_worker}
        if names := [name for name in self.names if name in found]:
            raise UsageError(
                f"by step {num_steps} something other than the optimizer has written to parameters, which are among "
                f"{shown(names)}. With sharding=optimizer the owner of a piece alone updates it, in memory that "
                "the trainer has made, and such a change is lost. Use sharding=none."
            )

    def found_inf(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """Let a gradient that overflows on one worker count on all: each has unscaled the gradients of its pieces."""
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        device = self.replicas.workers.device
        mine = torch.stack([torch.zeros((), device=device), *found.values()]).amax().view(1)
        anywhere = torch.cat(list(self.averaging.gather(mine))).amax()
        found.clear()
        found[device] = anywhere


def shard(setup: Setup, averaging: Averager, users_observers: Sequence[str]) -> tuple[Sharded | None, str]:
    """Divide the optimizer's work if the settings ask for it, or may; otherwise None. And the plan, in words.

    users_observers: names of observers of the user's own, which may look at gradients or change parameters.
    UsageError where sharding=optimizer cannot be.
    """
    asked = setup.settings.sharding is ShardingName.optimizer
    if setup.settings.sharding is ShardingName.none or setup.workers.num_workers == 1:
        return None, "none"
    reason = _obstacle(setup)
    if not reason and users_observers and not asked:
        reason = f"the observer {users_observers[0]} may change parameters, or look at gradients"
    of_workers = None if reason else _cut(setup, tries=asked)
    if not reason and of_workers is None:
        kind = type(setup.optimizer).__name__
        reason = f"{kind} in pieces computes something else" if asked else f"{kind} is not known"
    if of_workers is not None and not asked:
        reason = _no_gain(setup, averaging)
    if of_workers is not None and not reason:
        try:
            return _sharded(setup, averaging, of_workers), f"optimizer: {_shares(of_workers)}"
        except CannotShareError as error:
            return None, f"none: {error}"
    if asked:
        raise UsageError(f"sharding=optimizer, but {reason}. Use sharding=none, or one of torch's optimizers.")
    return None, f"none: {reason}"


def _no_gain(setup: Setup, averaging: Averager) -> str:
    """Why auto does not shard, although it could; empty if it does."""
    workers = setup.workers
    if workers.go_on:
        return "with recovery=continue each piece is kept twice; sharding=optimizer asks for it"
    if averaging.shares_memory:
        num_bytes = sum(p.nbytes for p in setup.trained.parameters)
        return f"for parameters of {num_bytes:,} bytes there is nothing to gain" if num_bytes < LEAST_BYTES else ""
    if workers.device.type == "cuda":
        return "it has not run on GPUs yet; sharding=optimizer asks for it"
    num_bytes_of_state = state_bytes(setup.optimizer)
    if num_bytes_of_state is None:
        return f"how much state {type(setup.optimizer).__name__} makes is not known; sharding=optimizer works"
    if num_bytes_of_state <= LEAST_STATE_BYTES:
        return (
            f"over {workers.backend} the optimizer's state must take more than {LEAST_STATE_BYTES:,} bytes, and it "
            f"takes {num_bytes_of_state:,}"
        )
    return ""


def _sharded(setup: Setup, averaging: Averager, of_workers: list[list[Piece]]) -> Sharded:
    """Raises CannotShareError."""
    parameters, workers, optimizer = averaging.own(setup.trained.by_name, of_workers), setup.workers, setup.optimizer
    names, owned = list(setup.trained.by_name), parameters.owned
    setup.trained.pieces = [(names[p.parameter], t) for p, t in zip(owned.pieces, owned.tensors, strict=True)]
    kept = KeptPieces(optimizer, owned, workers) if workers.go_on else None
    state: PiecesState
    if parameters.allocate is None:
        state = ScatteredState(optimizer, owned, workers)
    else:
        stays_in_place = _stays_in_place(optimizer)
        state = SharedState(optimizer, owned, parameters.allocate, workers, stays_in_place=stays_in_place)
    return Sharded(
        optimizer,
        parameters,
        state,
        NormOfPieces(setup.trained.parameters, of_workers, workers.rank, averaging.gather),
        Replicas(workers),
        averaging,
        names,
        [parameter.stride() for parameter in owned.parameters],
        compares_before=(lambda step: False) if averaging.shares_memory else _Compares(setup),
        kept=kept,
    )


class _Compares:
    """Before the first step that is made, and those after which the state is compared.

    Afterwards all workers have the owners' pieces, and would not see what something else has written to their own.
    """

    def __init__(self, setup: Setup) -> None:
        self._compares_after, self._is_first = setup.compares_after, True

    def __call__(self, step: int) -> bool:
        is_first, self._is_first = self._is_first, False
        return is_first or self._compares_after(step + 1)


def _shares(of_workers: Sequence[Sequence[Piece]]) -> str:
    """For example: each worker updates at most 52 % of the parameters."""
    sizes = [sum(piece.stop - piece.start for piece in pieces) for pieces in of_workers]
    return f"each worker updates at most {math.ceil(100 * max(sizes) / max(sum(sizes), 1))} % of the parameters"


def _obstacle(setup: Setup) -> str:
    """What forbids sharding; empty if nothing does."""
    optimizer, parameters = setup.optimizer, setup.trained.parameters
    kind = type(optimizer)
    if not optimizer.state.keys() <= set(parameters):
        return "the optimizer has state that belongs to no parameter"
    if has_step_hooks(optimizer) or "step" in vars(optimizer):
        return "the optimizer's step has hooks or was replaced"
    if kind.state_dict is not Optimizer.state_dict or kind.load_state_dict is not Optimizer.load_state_dict:
        return f"{kind.__name__} has a state_dict of its own"
    if any(p.is_complex() for p in parameters):
        return "some parameters are complex"
    if names := overlapping(setup.task, setup.trained.by_name):
        return f"{names[0]} and {names[1]} lie in the same memory, which the parameters would leave"
    return ""


def _cut(setup: Setup, *, tries: bool) -> list[list[Piece]] | None:
    """Every worker's pieces; None if the optimizer is not known to work in pieces, nor found to, if that is tried."""
    optimizer, parameters, num_workers = setup.optimizer, setup.trained.parameters, setup.workers.num_workers
    kind = type(optimizer)
    in_blocks = cut_in_blocks(parameters, num_workers)
    if kind in _of_torch(ELEMENTWISE):
        return in_blocks
    by_parameters = cut_by_parameters(parameters, _costs(optimizer, parameters), num_workers)
    if kind in (*_of_torch(BY_PARAMETERS), Lamb, Lars, MuonAdamW):
        return by_parameters
    if tries:
        for cut in (in_blocks, by_parameters):
            if works_in_pieces(optimizer, parameters, cut):
                return cut
    return None


def _stays_in_place(optimizer: Optimizer) -> bool:
    """See `SharedState`."""
    return type(optimizer) in (*_of_torch(ELEMENTWISE), *_of_torch(BY_PARAMETERS), MuonAdamW)


def _costs(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[int]:
    """An estimate of each parameter's work: its elements, and for Muon the products of an orthogonalisation."""
    is_muon = type(optimizer) in _of_torch(("Muon",))
    of_muon = {p for group in optimizer.param_groups if group.get("use_muon", is_muon) for p in group["params"]}
    return [p.numel() * (min(p.shape) if p in of_muon else 1) for p in parameters]


def _of_torch(names: Sequence[str]) -> list[type]:
    return [getattr(torch.optim, name) for name in names if hasattr(torch.optim, name)]
