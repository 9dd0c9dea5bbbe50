"""A linear model."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mbgd.errors import UsageError


class Linear(nn.Module):
    """Inputs of any shape (N, …), flattened → (N, num_outputs), by one matrix and a bias."""

    def __init__(self, input_shape: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        self.output = nn.Linear(math.prod(input_shape), num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.is_floating_point():
            raise UsageError(
                f"the linear model got inputs of dtype {inputs.dtype}; it takes floating-point numbers. "
                "For token ids use model=gpt; an objective of your own casts the bytes of images."
            )
        outputs: Tensor = self.output(inputs.flatten(1))
        return outputs
