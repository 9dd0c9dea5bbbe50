"""Images in a folder per class, decoded where they are read."""

import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbgd.errors import UsageError
from mbgd.order import mix

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MODES = {1: "L", 3: "RGB"}


class ImageFolder:
    """Example i is (pixels, class number): image files under folder/split/CLASS, in the order of their names.

    Pixels are float32, shape (channels, size, size): the image scaled so that its shorter side fits, cut to the middle
    square, each value as (value / 255 − mean) / std. The classes are the folders of the split "train", by name, so that
    every split numbers them alike. `augmented` cuts a random square out of the image with a black border, and mirrors
    every other one.
    """

    def __init__(
        self,
        folder: str,
        split: str,
        *,
        size: int,
        channels: int = 3,
        mean: float = 0.5,
        std: float = 0.5,
        crop_padding: int = 0,
        flip: bool = False,
        on_error: str = "raise",
        ignore_index: int = -100,
    ) -> None:
        """size: pixels, height and width; crop_padding: width of the border, in pixels.

        on_error: a file that cannot be read ends training with its name ("raise"), or counts as a black image whose
        target is `ignore_index`, which gives it weight 0 ("skip"), with a warning.
        """
        if find_spec("PIL") is None:
            raise UsageError("data=image_folder needs Pillow, which is not installed: pip install pillow")
        if channels not in MODES:
            raise UsageError(f"data.channels={channels}; it must be 1 (grey) or 3 (red, green, blue).")
        if on_error not in ("raise", "skip"):
            raise UsageError(f"data.on_error={on_error}; it must be raise or skip.")
        for name, value, least in (("size", size, 1), ("crop_padding", crop_padding, 0)):
            if value < least:
                raise UsageError(f"data.{name}={value}; it must be ≥ {least}.")
        self.size, self.channels, self.mean, self.std = size, channels, mean, std
        self.crop_padding, self.flip, self.on_error, self.ignore_index = crop_padding, flip, on_error, ignore_index
        self.folder = Path(folder, split).expanduser()
        self.classes = _folders(Path(folder, "train").expanduser())
        if unknown := [name for name in _folders(self.folder) if name not in self.classes]:
            raise UsageError(f"{self.folder} holds the class {unknown[0]}, which the training images do not have.")
        names, targets = [], []
        for number, name in enumerate(self.classes):
            images = _images(self.folder / name)
            if not images and split == "train":
                raise UsageError(
                    f"{self.folder / name} holds no image ({', '.join(sorted(SUFFIXES))}); a class needs at least 1. "
                    "Delete the folder or put images into it."
                )
            names += [os.fsencode(f"{name}/{image}") for image in images]
            targets += [number] * len(images)
        if not names:
            raise UsageError(f"{self.folder} holds no image in the folder of any class.")
        # One block of bytes: a list of strings would be copied into every loader process, bit by bit.
        self._names = np.array(names)
        self.targets = torch.tensor(targets)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, target = self._read(index)
        return self._normalised(pixels), target

    def augmented(self, index: int, key: int) -> tuple[Tensor, int]:
        """Example `index` as altered in one epoch, for which `key` stands."""
        pixels, target = self._read(index)
        border = self.crop_padding
        top, left, mirrored = mix(key, 0) % (2 * border + 1), mix(key, 1) % (2 * border + 1), mix(key, 2) % 2
        pixels = np.pad(pixels, ((border, border), (border, border), (0, 0)))
        pixels = pixels[top : top + self.size, left : left + self.size]
        return self._normalised(pixels[:, ::-1] if self.flip and mirrored else pixels), target

    def _read(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Height × width × channels, and the class number."""
        from PIL import Image, ImageOps  # only where there are images

        path = self.folder / os.fsdecode(self._names[index])
        try:
            with Image.open(path) as image:
                square = ImageOps.fit(image.convert(MODES[self.channels]), (self.size, self.size))
        except Exception as error:  # decoders raise of every kind
            problem = f"{path} is not an image that can be read ({type(error).__name__}: {error})."
            if self.on_error == "raise":
                raise UsageError(
                    f"{problem} Mend or delete it, or leave such files out: data.on_error=skip."
                ) from error
            warnings.warn(f"left out: {problem}", stacklevel=2)
            return np.zeros((self.size, self.size, self.channels), np.uint8), self.ignore_index
        return np.asarray(square).reshape(self.size, self.size, self.channels), int(self.targets[index])

    def _normalised(self, pixels: NDArray[np.uint8]) -> Tensor:
        values = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))
        return values.div_(255).sub_(self.mean).div_(self.std)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example's input."""
        return (self.channels, self.size, self.size)

    @property
    def num_outputs(self) -> int:
        """The number of classes."""
        return len(self.classes)


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder of images. Set data.folder, or data.evaluation=null.")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UsageError(f"{folder} is empty: it must hold a folder of images for each class.")
    return names


def _images(folder: Path) -> list[str]:
    """Names of the image files, in subfolders too, hidden ones aside."""
    if not folder.is_dir():
        return []
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(str(name) for name in files if not any(part.startswith(".") for part in name.parts))
