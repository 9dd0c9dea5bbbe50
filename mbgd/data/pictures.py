"""Examples as people see them: images as PNG, text as text."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbgd.data.text import VOCABULARY

MOST_CHARACTERS = 120
MOST_PIXELS = 96
"""Height and width beyond which an image is made smaller."""


@dataclass(frozen=True)
class Picture:
    """One example."""

    label: str = ""
    """Its target, where that is a class."""
    png: str = ""
    """As a data URI."""
    text: str = ""


def pictures(batch: Any, dataset: Any, size: int, most_pixels: int = MOST_PIXELS) -> list[Picture]:
    """One for each example of the batch; empty ones where they are neither images nor text."""
    inputs, targets = (batch[0], batch[1]) if isinstance(batch, tuple | list) and len(batch) > 1 else (None, None)
    labels = [""] * size
    if isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point():
        labels = [str(value) for value in targets.tolist()]
    if not isinstance(inputs, Tensor):
        return [Picture(label) for label in labels]
    if inputs.is_floating_point() and _is_images(inputs.shape):
        return [Picture(label, png=_png(image, most_pixels)) for label, image in zip(labels, inputs, strict=True)]
    if not inputs.is_floating_point() and inputs.dim() == 2:
        is_bytes = getattr(dataset, "vocabulary", None) == VOCABULARY
        return [Picture(label, text=_text(row, is_bytes)) for label, row in zip(labels, inputs.tolist(), strict=True)]
    return [Picture(label) for label in labels]


def _is_images(shape: Sequence[int]) -> bool:
    if len(shape) == 4:
        return shape[1] in (1, 3) and min(shape[2:]) > 1
    return len(shape) == 3 and min(shape[1:]) > 1


def _png(image: Tensor, most_pixels: int) -> str:
    from PIL import Image

    low, high = image.min(), image.max()
    values = ((image - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    values = values.permute(1, 2, 0) if values.dim() == 3 else values
    pixels = values.squeeze(-1).cpu().numpy() if values.shape[-1] == 1 else values.cpu().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((most_pixels, most_pixels))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _text(tokens: Sequence[int], is_bytes: bool) -> str:
    if is_bytes:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")[:MOST_CHARACTERS]
    return " ".join(map(str, tokens))[:MOST_CHARACTERS]
