"""Images, decoded when they are read: resized, augmented by a key for training, skipped if broken."""

import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbgd.batches.order import mix
from mbgd.errors import UsageError

Pixels = NDArray[np.uint8]
"""Height × width × channels."""

MODES = {1: "L", 3: "RGB"}
DRAFT_FACTOR = 2
SCALED_TO_16_BITS = ("PNG", "PPM")
"""Formats whose values Pillow scales to 16 bits, though it may hold them in 32."""


class Images:
    """Example i is (pixels, target) of the i-th image, which is read on access.

    Pixels are float32, shape (channels, size, size): the image upright by EXIF, its shorter side scaled to `size`,
    centre-cropped, each value as (value / 255 − mean) / std. `augmented` takes a random crop of the image padded with a
    black border, and a horizontal flip with probability 1/2, as `crop_padding` and `flip` say.
    """

    def __init__(
        self,
        source: Callable[[int], tuple[str, str | BytesIO]],
        targets: Tensor,
        num_outputs: int,
        *,
        size: int,
        channels: int = 3,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        crop_padding: int = 0,
        flip: bool = False,
        on_error: str = "raise",
        ignore_index: int | None = None,
    ) -> None:
        """source: maps an index to the image's name and its file; targets: one per image.

        size: height and width in pixels. channels: 1 (grey) or 3. mean, std: one value, or one per channel.
        crop_padding: width of the border, in pixels. on_error: for an image that cannot be read; "raise" ends training
        and names the image; "skip" leaves it out with a warning: it becomes black, with the target `ignore_index`, to
        which the objective gives weight 0.
        """
        if channels not in MODES:
            raise UsageError(f"data.channels={channels}; it must be 1 (grey) or 3 (red, green, blue).")
        for name, value, least in (("size", size, 1), ("crop_padding", crop_padding, 0)):
            if value < least:
                raise UsageError(f"data.{name}={value}; it must be ≥ {least}.")
        self._source, self.targets, self._num_outputs = source, targets, num_outputs
        self._size, self._channels, self._crop_padding, self._flip = size, channels, crop_padding, flip
        self._mean, self._std = (_of_channels(*one, channels) for one in (("mean", mean), ("std", std)))
        if not (self._std > 0).all():
            raise UsageError(f"data.std={std}; a standard deviation must be > 0.")
        self.skipped_target = _skipped_target(on_error, ignore_index, num_outputs)
        # In memory that a worker shares with its loader processes, so that each broken image is reported once.
        self._broken = torch.zeros(0 if self.skipped_target is None else len(targets), dtype=torch.bool)
        self._broken.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, target = self._read(index)
        return self._normalised(pixels), target

    def augmented(self, index: int, key: int) -> tuple[Tensor, Tensor]:
        """Example `index`, augmented by `key`, which differs from epoch to epoch."""
        pixels, target = self._read(index)
        if border := self._crop_padding:
            top, left = mix(key, 0) % (2 * border + 1), mix(key, 1) % (2 * border + 1)
            pixels = np.pad(pixels, ((border, border), (border, border), (0, 0)))
            pixels = pixels[top : top + self._size, left : left + self._size]
        mirrored = self._flip and mix(key, 2) % 2
        return self._normalised(pixels[:, ::-1] if mirrored else pixels), target

    def _read(self, index: int) -> tuple[Pixels, Tensor]:
        name, file = self._source(index)
        try:
            return decode(file, self._size, self._channels), self.targets[index]
        except Exception as error:  # decoders raise exceptions of all types
            problem = f"{name} is not an image that can be read ({type(error).__name__}: {error})."
            if self.skipped_target is None:
                raise UsageError(
                    f"{problem} Fix or remove it, or leave such images out: data.on_error=skip data.ignore_index=-100."
                ) from error
            self._report(index, problem)
            black = np.zeros((self._size, self._size, self._channels), np.uint8)
            return black, torch.full_like(self.targets[index], self.skipped_target)

    def _report(self, index: int, problem: str) -> None:
        if not self._broken[index]:
            self._broken[index] = True
            print(
                f"warning: left out: {problem} This worker has left out {self.num_skipped} of {len(self):,} images.",
                file=sys.stderr,
                flush=True,
            )

    @property
    def num_skipped(self) -> int:
        """Images that this worker and its loader processes have left out so far, each counted once."""
        return int(self._broken.sum())

    def _normalised(self, pixels: Pixels) -> Tensor:
        values = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))
        return values.div_(255).sub_(self._mean).div_(self._std)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example's input."""
        return (self._channels, self._size, self._size)

    @property
    def num_outputs(self) -> int:
        """The number of classes."""
        return self._num_outputs


def decode(file: str | BytesIO, size: int, channels: int) -> Pixels:
    """The first image of a file: upright by EXIF, scaled, centre-cropped, with `channels` channels."""
    from PIL import Image, ImageOps  # only where there are images

    with Image.open(file) as opened:
        image: Any = opened
        # Decode a JPEG at 1/2, 1/4 or 1/8 of its size if that leaves enough pixels: several times as fast.
        image.draft(None, (DRAFT_FACTOR * size, DRAFT_FACTOR * size))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or (image.mode == "I" and opened.format not in SCALED_TO_16_BITS):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            raise ValueError(f"its pixels are {kind} numbers of unknown range")
        if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode != MODES[channels]:
            image = image.convert(MODES[channels])
        return np.asarray(ImageOps.fit(image, (size, size))).reshape(size, size, channels)


def _of_channels(name: str, values: float | Sequence[float], channels: int) -> Tensor:
    """The values as a tensor of shape (1 or channels, 1, 1)."""
    of_channels = torch.tensor([values] if isinstance(values, int | float) else list(values), dtype=torch.float32)
    if len(of_channels) not in (1, channels):
        raise UsageError(f"data.{name}={values} for {channels} channels; give one value, or one for each channel.")
    return of_channels.view(-1, 1, 1)


def _skipped_target(on_error: str, ignore_index: int | None, num_outputs: int) -> int | None:
    """The target of images that are left out; None with on_error="raise"."""
    if on_error == "raise":
        return None
    if on_error != "skip":
        raise UsageError(f"data.on_error={on_error}; it must be raise or skip.")
    if ignore_index is None or 0 <= ignore_index < num_outputs:
        raise UsageError(
            f"data.on_error=skip with data.ignore_index={ignore_index}; an image that is left out needs a target that "
            f"is no class (0 to {num_outputs - 1}). Set data.ignore_index=-100; objective=cross_entropy follows it."
        )
    return ignore_index
