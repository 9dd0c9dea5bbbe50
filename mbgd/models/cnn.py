"""A small convolutional network for images."""

from collections.abc import Sequence

from torch import Tensor, nn

from mbgd.errors import UsageError


class CNN(nn.Module):
    """Images (N, channels, height, width) → (N, num_outputs).

    Each stage is a 3 × 3 convolution, BatchNorm if wanted, ReLU, and pooling that halves height and width; then one
    hidden layer.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        *,
        channels: Sequence[int] = (32, 64),
        hidden: int = 128,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < 2 ** len(channels):
            raise UsageError(
                f"input_shape={tuple(input_shape)}; the cnn takes images of shape (channels, height, width), at least "
                f"{2 ** len(channels)} pixels high and wide, because each of its {len(channels)} stages halves them."
            )
        depth, height, width = input_shape
        layers: list[nn.Module] = []
        for num_channels in channels:
            layers.append(nn.Conv2d(depth, num_channels, kernel_size=3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(num_channels))
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            depth, height, width = num_channels, height // 2, width // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(depth * height * width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_outputs),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.classifier(self.features(inputs))
        return outputs
