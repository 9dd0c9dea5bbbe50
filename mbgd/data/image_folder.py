"""Images in a folder per class."""

# ruff: noqa: PTH118, PTH122  (there may be a million files: os.path is ten times as fast as pathlib)

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbgd.data.images import Images
from mbgd.errors import UsageError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SPLITS = ("train", "val")


class ImageFolder(Images):
    """The image files under folder/split/CLASS, sorted by class name, then by file name.

    split: "train" or "val". The classes are the folders of "train", so that both splits number them alike. With
    `held_out`, both splits are mixed under folder/CLASS: that share of the files, chosen by their names alone, is
    "val". For further arguments see `Images`. UsageError if a folder is missing, unreadable or empty.
    """

    def __init__(self, folder: str, split: str, *, held_out: float | None = None, **options: Any) -> None:
        if split not in SPLITS:
            raise UsageError(f"image_folder has no split {split!r}; it must be train or val.")
        if held_out is not None and not 0 < held_out < 1:
            raise UsageError(
                f"data.held_out={held_out}; it is the share of the images that evaluation uses and must lie between 0 "
                "and 1, or null where FOLDER holds `train` and `val`."
            )
        top = Path(folder).expanduser()
        train, self._folder = (top, top) if held_out is not None else (top / "train", top / split)
        self.classes = _folders(train)
        if unknown := sorted(set(_folders(self._folder)) - set(self.classes)):
            raise UsageError(f"{self._folder} holds the class {unknown[0]}, which the training images do not have.")
        names, targets = [], []
        for number, name in enumerate(self.classes):
            images = sorted(_images(self._folder / name)) if (self._folder / name).is_dir() else []
            if not images and self._folder == train:
                raise UsageError(
                    f"{train / name} holds no image ({', '.join(sorted(SUFFIXES))}); a class needs at least 1. "
                    "Delete the folder or put images into it."
                )
            if held_out is not None:
                images = [image for image in images if _is_held_out(name, image, held_out) == (split == "val")]
            names += [os.fsencode(os.path.join(name, image)) for image in images]
            targets += [number] * len(images)
        if not names:
            share = f" for {split} with data.held_out={held_out}" if held_out is not None else ""
            raise UsageError(f"{self._folder} holds no image in the folder of any class{share}.")
        # One block of bytes: a list of strings would gradually be copied into every loader process.
        self._names = np.array(names)
        super().__init__(self._file, torch.tensor(targets), len(self.classes), **options)

    def _file(self, index: int) -> tuple[str, str]:
        path = os.path.join(self._folder, os.fsdecode(self._names[index]))
        return path, path


def _folders(folder: Path) -> list[str]:
    """Names of the folders in it, without hidden ones."""
    if not folder.is_dir():
        remedy = (
            " to a folder that holds `train` and `val`, each with a folder for each class; or to one that holds the "
            "classes' folders alone, and data.held_out=0.1 to keep a tenth for evaluation, or data.evaluation=null"
        )
        raise UsageError(f"{folder}: there is no such folder of images. Set data.folder{remedy}.")
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UsageError(f"{folder} cannot be listed: {error}.") from error
    if not names:
        raise UsageError(f"{folder} holds no folders: it must hold one for each class, with that class's images in it.")
    return names


def _images(folder: Path) -> Iterator[str]:
    """Names of the image files relative to `folder`, in subfolders too, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be listed: {error}.") from error

    for inner, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = inner[len(os.fspath(folder)) :].lstrip(os.sep)
        for name in files:
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                yield os.path.join(below, name)


def _is_held_out(name_of_class: str, image: str, share: float) -> bool:
    """A function of the names alone: adding or removing images moves no other image to the other split."""
    digest = hashlib.sha256(os.fsencode(os.path.join(name_of_class, image))).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
