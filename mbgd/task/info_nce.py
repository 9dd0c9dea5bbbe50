"""The contrastive objective that ships: an example's two encodings find each other among those of the minibatch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbgd.batches.randomness import key_generators, random_state_kept
from mbgd.errors import UsageError
from mbgd.task.objective import PerExample

LEAST_TEMPERATURE = 0.01
"""Of a learned temperature, as in CLIP."""

NEGATIVES = ("all", "other")


class InfoNCE(nn.Module):
    """−log of the softmax probability, by cosine / temperature, of an example's other encoding; coupled.

    A pair comes from two views of an example (SimCLR; Chen et al. 2020, arXiv:2002.05709, eq. 1) or from two towers
    (CLIP; Radford et al. 2021, arXiv:2103.00020, fig. 3). An example's loss is the mean of its two directions. Metric:
    accuracy, the share of encodings whose most similar one is their pair's.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        learn_temperature: bool = False,
        negatives: str = "all",
        two_towers: bool = False,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """negatives: all, every encoding of the other examples, or other, those on the other side of the pair.

        two_towers: `model(a, b)` gives both encodings; otherwise it is called for each. augment: makes a view of a
        batch's inputs, with draws from torch's default generators; None: the batch begins with the pair (a, b).
        """
        super().__init__()
        if not temperature > 0 or (learn_temperature and temperature < LEAST_TEMPERATURE):
            least = f"at least {LEAST_TEMPERATURE}" if learn_temperature else "greater than 0"
            raise UsageError(f"temperature={temperature}; it divides cosines, so it must be {least}.")
        if negatives not in NEGATIVES:
            raise UsageError(f"negatives={negatives}; it must be one of {', '.join(NEGATIVES)}.")
        self.negatives, self.two_towers, self.augment = negatives, two_towers, augment
        scale = -math.log(temperature)
        self.log_scale = nn.Parameter(torch.tensor(scale)) if learn_temperature else None
        self._scale = 1 / temperature

    def encode(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Unit vectors, two for each example, of shape (N, D)."""
        first, second = self._pair(batch)
        encodings = model(first, second) if self.two_towers else (model(first), model(second))
        if not isinstance(encodings, tuple | list) or len(encodings) != 2:
            raise UsageError(
                f"two_towers=true, but the model returned a {type(encodings).__name__} for two inputs; it must return "
                "two tensors of shape (N, D)."
            )
        one, other = (F.normalize(encoding.flatten(1), dim=1) for encoding in encodings)
        return one, other

    def _pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        if self.augment is None:
            first, second, *_ = batch
            return first, second
        inputs = batch[0]
        if self.training:
            return self.augment(inputs), self.augment(inputs)
        with random_state_kept(inputs.device):  # an evaluation draws alike at any time and on any number of workers
            key_generators(inputs.device, 0)
            return self.augment(inputs), self.augment(inputs)

    def losses(self, *encodings: Tensor) -> PerExample:
        first, second = encodings
        num_examples = len(first)
        numbers = torch.arange(num_examples, device=first.device)
        with torch.autocast(first.device.type, enabled=False):  # 16 bits are too few for cosines over a temperature
            dtype = torch.promote_types(first.dtype, torch.float32)
            first, second = first.to(dtype), second.to(dtype)
            if self.negatives == "all":
                both, targets = torch.cat([first, second]), torch.cat([numbers + num_examples, numbers])
                logits = both @ both.T * self.scale()
                logits = logits.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -math.inf)
            else:
                cosines = first @ second.T * self.scale()
                logits, targets = torch.cat([cosines, cosines.T]), torch.cat([numbers, numbers])
            losses = F.cross_entropy(logits, targets, reduction="none")
        return PerExample(_mean_of_sides(losses), metrics={"accuracy": partial(_found, logits.detach(), targets)})

    def scale(self) -> Tensor | float:
        """1 / temperature."""
        if self.log_scale is None:
            return self._scale
        return self.log_scale.clamp(max=-math.log(LEAST_TEMPERATURE)).exp()


def _mean_of_sides(values: Tensor) -> Tensor:
    first, second = values.chunk(2)
    return (first + second) / 2


def _found(logits: Tensor, targets: Tensor) -> Tensor:
    return _mean_of_sides((logits.argmax(1) == targets).to(logits.dtype))


class RandomCrops:
    """Views of images (N, channels, height, width): a random crop, scaled back to the image's size, and its contrast.

    All draws come from torch's default generator of the images' device.
    """

    def __init__(self, *, least_area: float = 0.3, flip: bool = True, contrast: float = 0.4) -> None:
        """least_area: of the crop, as a share of the image. flip: mirror half of the views. contrast: the most by
        which a view's values are scaled, up or down."""
        if not 0 < least_area <= 1 or not 0 <= contrast < 1:
            raise UsageError(
                f"least_area={least_area}, contrast={contrast}; the area must be above 0 and at most 1, the contrast "
                "at least 0 and below 1."
            )
        self.least_area, self.flip, self.contrast = least_area, flip, contrast

    def __call__(self, images: Tensor) -> Tensor:
        if images.dim() != 4:
            raise UsageError(
                f"RandomCrops got inputs of shape {tuple(images.shape)}; it takes images (N, channels, height, width). "
                "Set objective.augment to a function of your own, or to null where the data gives pairs."
            )
        draws = torch.rand(5, len(images), dtype=images.dtype, device=images.device)
        side = (self.least_area + (1 - self.least_area) * draws[0]).sqrt()
        across, down = (1 - side) * (2 * draws[1] - 1), (1 - side) * (2 * draws[2] - 1)
        mirrored = torch.where(draws[3] < 0.5, -side, side) if self.flip else side
        zeros = torch.zeros_like(side)
        rows = torch.stack([torch.stack([mirrored, zeros, across], 1), torch.stack([zeros, side, down], 1)], 1)
        grid = F.affine_grid(rows, list(images.shape), align_corners=False)
        views = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        return views * (1 + self.contrast * (2 * draws[4] - 1)).view(-1, 1, 1, 1)
