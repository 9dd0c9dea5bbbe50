"""The examples of a micro-batch → one batch."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import default_collate

from mbgd.batches.randomness import has_drawn_since, key_reading, undisturbed
from mbgd.errors import UsageError

Collate = Callable[[list[Any]], Any]
"""A list of examples → a batch: tensors in dicts, lists and tuples, with all the examples in their order."""


def collated(examples: list[Any], collate: Collate | None) -> Any:
    """The batch; collate: None stacks equal shapes, as torch does. UsageError for unequal shapes, or if it draws."""
    if collate is None:
        try:
            return default_collate(examples)
        except Exception as error:  # torch raises several kinds for examples that differ
            if difference := _first_difference(examples):
                raise UsageError(
                    f"examples cannot be stacked into one batch: {difference}. Set data.collate to a function that "
                    "pads them (and give the padding weight 0 in the objective), or let the dataset return equal "
                    "shapes."
                ) from error
            if unknown := _unknown(examples[0], ""):
                raise UsageError(
                    f"examples cannot be stacked into one batch: {unknown}. Set data.collate to a function that makes "
                    "a batch of such examples, or leave this out of the dataset's examples."
                ) from error
            raise
    with undisturbed():
        key_reading(0)
        batch = collate(examples)
        if has_drawn_since(0):
            raise UsageError(
                "data.collate draws random numbers; they would depend on how the minibatch is cut, and so on the "
                "number of workers. Draw in the dataset's __getitem__, which is seeded by (seed, epoch, example), or "
                "in augmented(index, key)."
            )
    return batch


def _unknown(example: Any, path: str) -> str:
    """Where an example has a value that torch does not stack, and its type; empty if there is none."""
    if isinstance(example, Mapping):
        return next((found for key in example if (found := _unknown(example[key], f"{path}.{key}"))), "")
    if isinstance(example, list | tuple):
        return next((found for n, one in enumerate(example) if (found := _unknown(one, f"{path}[{n}]"))), "")
    try:
        default_collate([example])
    except Exception:
        return f"{path.lstrip('.') or 'an example'} is a {type(example).__name__}"
    return ""


def _first_difference(examples: list[Any]) -> str:
    first, *others = examples
    return next((found for other in others if (found := _difference(first, other, ""))), "")


def _difference(one: Any, other: Any, path: str) -> str:
    """Where and how two examples differ; empty if they can be stacked."""
    name = path.lstrip(".") or "an example"
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return f"{name} has the keys {', '.join(map(str, one))} in one and {', '.join(map(str, other))} in another"
        return next((found for key in one if (found := _difference(one[key], other[key], f"{path}.{key}"))), "")
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{name} has {len(one)} values in one and {len(other)} in another"
        pairs = enumerate(zip(one, other, strict=True))
        return next((found for number, (a, b) in pairs if (found := _difference(a, b, f"{path}[{number}]"))), "")
    shapes = tuple(getattr(one, "shape", ())), tuple(getattr(other, "shape", ()))
    if shapes[0] != shapes[1]:
        return f"{name} has shape {shapes[0]} in one and {shapes[1]} in another"
    if type(one) is not type(other):
        return f"{name} is a {type(one).__name__} in one and a {type(other).__name__} in another"
    return ""
