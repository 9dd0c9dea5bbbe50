"""A multilayer perceptron."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from mbgd.errors import UsageError


class MLP(nn.Module):
    """Inputs of any shape (N, …), flattened → (N, num_outputs), with ReLU and dropout after each hidden layer."""

    def __init__(
        self, input_shape: Sequence[int], num_outputs: int, *, hidden: Sequence[int] = (128,), dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.is_floating_point():
            raise UsageError(
                f"the mlp got inputs of dtype {inputs.dtype}; it takes floating-point numbers. "
                "For token ids use model=gpt; an objective of your own casts the bytes of images."
            )
        outputs: Tensor = self.layers(inputs.flatten(1))
        return outputs
