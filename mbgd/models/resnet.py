"""A residual network for small images (He et al. 2016, section 4.2)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mbgd.errors import UsageError

NUM_STAGES = 3


class ResNet(nn.Module):
    """Images (N, channels, height, width), of about 28 × 28 or 32 × 32 pixels → (N, num_outputs).

    A convolution, three stages of (depth − 2) / 6 blocks of two convolutions each, a global average pooling and a
    linear layer. The second and third stage halve height and width and double the channels. Shortcuts that change the
    shape are 1 × 1 convolutions. Every convolution is followed by BatchNorm; the last one's scale in a block starts at
    0, so that the block starts as the identity (Goyal et al. 2017, section 5.1).
    """

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, depth: int = 20, width: int = 16) -> None:
        """depth: number of layers with weights, 6n + 2; width: channels of the first stage."""
        super().__init__()
        if len(input_shape) != 3:
            raise UsageError(
                f"input_shape={tuple(input_shape)}; the resnet takes images of shape (channels, height, width)."
            )
        num_blocks, rest = divmod(depth - 2, 2 * NUM_STAGES)
        if num_blocks < 1 or rest:
            raise UsageError(f"model.depth={depth}; it must be 6n + 2, for example 8, 20, 32, 44, 56.")
        layers: list[nn.Module] = [nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers.append(nn.ReLU())
        channels = width
        for stage in range(NUM_STAGES):
            for number in range(num_blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(Block(channels, width << stage, stride))
                channels = width << stage
        self.features = nn.Sequential(*layers)
        self.output = nn.Linear(channels, num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.output(self.features(inputs).mean((2, 3)))
        return outputs


class Block(nn.Module):
    """Two convolutions with BatchNorm, added to the input: (N, channels_in, H, W) → (N, channels_out, H/s, W/s)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels_out)
        nn.init.zeros_(self.second_norm.weight)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out or stride != 1:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, inputs: Tensor) -> Tensor:
        residual = self.second_norm(self.second(F.relu(self.first_norm(self.first(inputs)))))
        return F.relu(residual + self.shortcut(inputs))
