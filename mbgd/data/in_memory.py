"""Examples held in memory, and the protocol by which they are read.

A dataset with `gather(indices)`, an int64 tensor of shape (N,) → a batch of N examples, is read without a Python loop
over examples. Every other map-style dataset (`__len__` and `__getitem__`) goes through torch's DataLoader. A model
whose sizes are not configured takes them from `input_shape` and `num_outputs`.
"""

import math

from torch import Tensor

from mbgd.errors import UsageError


class InMemory:
    """A map-style dataset of tensors held in memory; example i is (inputs[i], targets[i])."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        for name, values in (("inputs", inputs), ("targets", targets)):
            if not isinstance(values, Tensor):
                raise UsageError(
                    f"{name} is a {type(values).__name__}; it must be a tensor: torch.as_tensor({name}) makes one."
                )
            if values.dim() == 0:
                raise UsageError(f"{name} is a single value; the first dimension must count the examples.")
        if len(inputs) != len(targets):
            raise UsageError(f"{len(inputs)} inputs and {len(targets)} targets; there must be one target per input.")
        if len(inputs) == 0:
            raise UsageError("inputs and targets hold 0 examples; there must be at least 1.")
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at these indices, copied; `indices` is int64, shape (N,)."""
        return self.inputs.index_select(0, indices), self.targets.index_select(0, indices)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example's input."""
        return tuple(self.inputs.shape[1:])

    @property
    def num_outputs(self) -> int:
        """Integer targets: the number of classes (largest target + 1); floating ones: values per example."""
        if self.targets.is_floating_point():
            return math.prod(self.targets.shape[1:])
        return int(self.targets.max()) + 1
