"""Finds out whether an optimizer computes the same in pieces, by steps of copies of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mbgd.averaging.pieces import Owned, Piece, in_memory_order
from mbgd.errors import UsageError
from mbgd.files.state_tree import Flattening
from mbgd.step.optimizer_trial import copy_holding, copy_with, parameters_of
from mbgd.step.pieces_state import NOT_COPIED, hold_pieces, state_of_pieces

NUM_STEPS = 2


def works_in_pieces(optimizer: Optimizer, parameters: Sequence[Tensor], of_workers: Sequence[Sequence[Piece]]) -> bool:
    """Whether steps of every worker's pieces leave the same bits as steps of the whole parameters.

    In the parameters, and in all that the optimizer keeps, from which later steps may compute. Needs memory for two
    copies of parameters, gradients and state meanwhile.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that all workers find the same
        gradients = [[torch.randn_like(p, requires_grad=False) for p in parameters] for _ in range(NUM_STEPS)]
        for gradient in gradients[0]:
            in_memory_order(gradient)[1:] = 0  # some optimizers make state once there is another value
        try:
            return all(
                _works(optimizer, parameters, of_workers, gradients[:num_steps])
                for num_steps in range(1, NUM_STEPS + 1)
            )
        except Exception:  # it needs something of the parameters that pieces do not have
            return False


def _works(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    of_workers: Sequence[Sequence[Piece]],
    gradients: list[list[Tensor]],
) -> bool:
    whole, copies = copy_with(optimizer, parameters)
    _step(whole, copies, gradients)
    kept = _beside_state(whole, copies)
    for rank in range(len(of_workers)):
        in_pieces, memory = copy_with(optimizer, parameters)
        owned, expected = Owned(memory, of_workers, memory, rank), Owned(copies, of_workers, copies, rank)
        state = state_of_pieces(in_pieces.state, owned)
        hold_pieces(in_pieces, owned)
        in_pieces.state.clear()
        in_pieces.state.update(state)
        _step(in_pieces, memory, gradients, owned)
        wanted, got = state_of_pieces(whole.state, expected), dict(in_pieces.state)
        pairs = list(zip(owned.tensors, expected.tensors, strict=True))
        states = [(_told(got.pop(one, None)), _told(wanted.get(other))) for one, other in pairs]
        is_same = (
            all(_same(one, other) for one, other in pairs)
            and all(_alike(one, other) for one, other in states)
            and not got  # state that belongs to no parameter
            and _alike(_beside_state(in_pieces, [*memory, *owned.tensors]), kept)
        )
        if not is_same:
            return False
    return True


def state_bytes(optimizer: Optimizer) -> int | None:
    """Bytes of the state that the optimizer has, or makes in its first step, alone; None if that is not known."""
    made = made_state(optimizer)
    if made is None:
        return None
    return sum(one.nbytes for p, tensors in made.items() if p.requires_grad or p in optimizer.state for one in tensors)


def made_state(optimizer: Optimizer, *, from_values: bool = False) -> dict[Tensor, list[Tensor]] | None:
    """The tensors of each parameter's state, or tensors like them where it has none; None if that is not known.

    The first step is made with tensors that have shapes and no memory, by the slowest kernels, which compute on these,
    too. from_values: with copies of the parameters, for optimizers that look at values.
    """
    parameters = parameters_of(optimizer)
    held: Sequence[Tensor] = parameters
    if not optimizer.state:
        copies = [
            nn.Parameter(p.detach().clone() if from_values else torch.empty_like(p, device="meta")) for p in parameters
        ]
        held, optimizer = copies, copy_holding(optimizer, parameters, copies)
        for group in optimizer.param_groups:
            group.update({kernel: False for kernel in ("foreach", "fused") if kernel in group})
        for copy in copies:
            copy.grad = torch.zeros_like(copy)  # also where it is frozen, which may end
        try:
            type(optimizer).step(optimizer)
        except Exception:  # it looks at values
            return None
    states = [optimizer.state.get(one, {}).values() for one in held]
    tensors = [[one for one in state if isinstance(one, Tensor)] for state in states]
    return dict(zip(parameters, tensors, strict=True))


def _step(
    optimizer: Optimizer, parameters: list[Tensor], gradients: list[list[Tensor]], owned: Owned | None = None
) -> None:
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        if owned is not None:
            owned.take_gradients(whole=False)
        type(optimizer).step(optimizer)


_Told = tuple[Any, dict[str, Tensor]]
"""A value as JSON, and its tensors by path."""


def _told(value: Any, forbidden: Mapping[int, str] | None = None) -> _Told:
    flattening = Flattening(forbidden)
    return flattening(value, "value"), flattening.tensors


def _alike(one: _Told, other: _Told) -> bool:
    (tree, tensors), (others_tree, others) = one, other
    return (
        tree == others_tree
        and tensors.keys() == others.keys()
        and all(tensor.dtype is others[path].dtype and _same(tensor, others[path]) for path, tensor in tensors.items())
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether shapes and values are equal; NaN is equal to NaN."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _beside_state(optimizer: Optimizer, parameters: Sequence[Tensor]) -> _Told:
    """What the optimizer keeps beside the state of parameters: options of groups, and attributes of its own.

    Without what a checkpoint could not hold, and without what refers to parameters.
    """
    attributes = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    options = [{k: v for k, v in group.items() if k not in NOT_COPIED} for group in optimizer.param_groups]
    forbidden = {id(parameter): "a parameter" for parameter in parameters}
    values = {
        f"{number}.{name}": value for number, one in enumerate([attributes, *options]) for name, value in one.items()
    }
    trees, tensors = {}, {}
    for name, value in values.items():
        try:
            trees[name], found = _told(value, forbidden)
        except UsageError:
            continue
        tensors.update({f"{name}.{path}": tensor for path, tensor in found.items()})
    return trees, tensors
