"""Finds out whether an optimizer computes the same in pieces, by steps of copies of it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mbgd.averaging.pieces import Owned, Piece
from mbgd.step.optimizer_trial import copy_holding, copy_with, parameters_of
from mbgd.step.pieces_state import hold_pieces

NUM_STEPS = 2


def works_in_pieces(optimizer: Optimizer, parameters: Sequence[Tensor], of_workers: Sequence[Sequence[Piece]]) -> bool:
    """Whether steps of every worker's pieces leave the same bits as steps of the whole parameters.

    Needs memory for two copies of parameters, gradients and state meanwhile.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that all workers find the same
        gradients = [[torch.randn_like(p, requires_grad=False) for p in parameters] for _ in range(NUM_STEPS)]
        try:
            whole, copies = copy_with(optimizer, parameters)
            _step(whole, copies, gradients)
            for rank in range(len(of_workers)):
                in_pieces, memory = copy_with(optimizer, parameters)
                owned = Owned(memory, of_workers, memory, rank)
                hold_pieces(in_pieces, owned)
                _step(in_pieces, memory, gradients, owned)
                expected = Owned(copies, of_workers, copies, rank)
                if not {id(key) for key in in_pieces.state} <= {id(tensor) for tensor in owned.tensors}:
                    return False
                if not all(map(torch.equal, owned.tensors, expected.tensors)):
                    return False
        except Exception:  # it needs something of the parameters that pieces do not have
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
            owned.take_gradients()
        type(optimizer).step(optimizer)
