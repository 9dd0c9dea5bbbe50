"""Gradients of single examples: for a few chosen weights, or for all weights one example at a time."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from mbgd.batches.nested import each_tensor
from mbgd.batches.plan import cut
from mbgd.task.objective import PerExample
from mbgd.task.task import Task, plain_name

NUM_CHOSEN = 5
MOST_VALUES_AT_ONCE = 2**22
"""Most values (size of the chosen weights' parameters × examples) in one call of vmap."""


class Chosen(NamedTuple):
    """One weight: an element of a parameter."""

    name: str
    """Of the parameter."""
    position: int
    """In the flattened parameter."""
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        indices = []
        position = self.position
        for size in reversed(self.shape):
            position, index = divmod(position, size)
            indices.append(str(index))
        return f"{self.name}[{','.join(reversed(indices))}]" if indices else self.name


def choose(gradient: Mapping[str, Tensor], number: int = NUM_CHOSEN) -> list[Chosen]:
    """Weights from parameters spread over the model; in each parameter those with the largest gradient."""
    names = [name for name, g in gradient.items() if g.any()] or list(gradient)
    spread = [names[cut(len(names), number, part)] for part in range(number)]
    chosen = []
    for name in dict.fromkeys(spread):
        flat = gradient[name].abs().flatten()
        wanted = min(spread.count(name), flat.numel())
        positions = sorted(flat.topk(wanted).indices.tolist())
        chosen += [Chosen(name, position, tuple(gradient[name].shape)) for position in positions]
    return chosen


def values_at(tensors: Mapping[str, Tensor], chosen: Sequence[Chosen]) -> list[float]:
    return [float(tensors[one.name].detach().reshape(-1)[one.position]) for one in chosen]


def sums(terms: PerExample) -> tuple[Tensor, Tensor]:
    """(Σ w L, Σ w) of each example over its elements, both of shape (N,)."""
    losses = terms.losses
    weights = torch.ones_like(losses) if terms.weights is None else terms.weights.to(losses.dtype)
    losses = torch.where(weights != 0, losses, 0.0) * weights
    if losses.dim() > 1:
        losses, weights = losses.flatten(1).sum(1), weights.flatten(1).sum(1)
    return losses, weights.detach()


def part(batch: Any, start: int, stop: int) -> Any:
    """Examples [start, stop) of a batch."""
    return each_tensor(batch, lambda tensor: tensor[start:stop])


def by_vmap(task: Task, batch: Any, size: int, chosen: Sequence[Chosen]) -> Tensor:
    """Gradients of each example's Σ w L for the chosen weights, shape (size, chosen); raises the model's errors."""
    held = {plain_name(name): (name, parameter.detach()) for name, parameter in task.named_parameters()}
    names = list(dict.fromkeys(one.name for one in chosen))
    of_name = {name: [n for n, one in enumerate(chosen) if one.name == name] for name in names}
    places = {name: torch.tensor([chosen[n].position for n in of_name[name]]) for name in names}
    start = torch.stack([held[one.name][1].reshape(-1)[one.position] for one in chosen])

    def loss(weights: Tensor, example: Any) -> Tensor:
        parameters = {}
        for name in names:
            full_name, values = held[name]
            flat = values.reshape(-1).index_put((places[name].to(values.device),), weights[of_name[name]])
            parameters[full_name] = flat.view(values.shape)
        one = each_tensor(example, lambda tensor: tensor.unsqueeze(0))
        return sums(functional_call(task, parameters, (one, 1)))[0].sum()

    values = sum(held[name][1].numel() for name in names)
    chunk = max(1, min(size, MOST_VALUES_AT_ONCE // values))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        gradients: Tensor = vmap(grad(loss), in_dims=(None, 0), chunk_size=chunk)(start, batch)
    return gradients.detach()


def one_at_a_time(task: Task, batch: Any, size: int) -> Iterator[tuple[dict[str, Tensor], float, float]]:
    """For each example the gradient of Σ w L for all parameters, Σ w L and Σ w; only one is in memory at a time."""
    held = {plain_name(name): p for name, p in task.named_parameters() if p.requires_grad}
    for number in range(size):
        losses, weights = sums(task(part(batch, number, number + 1), 1))
        found = torch.autograd.grad(losses.sum(), list(held.values()), allow_unused=True)
        gradient = {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(held.items(), found, strict=True)
        }
        yield gradient, float(losses.detach().sum()), float(weights.sum())
