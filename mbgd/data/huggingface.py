"""Columns of numbers or images from files that Hugging Face's `datasets` reads: saved folders, parquet, csv, json."""

import math
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbgd.data.dataset_files import name_of, open_dataset
from mbgd.data.images import Images
from mbgd.errors import UsageError


class HuggingFace:
    """Example i is (inputs, targets): row i of columns, memory-mapped; the dtypes are the columns' own.

    A column holds numbers, or lists of numbers of one shape. Several columns of inputs, of one number each, become
    one vector. Whole numbers become int64.
    """

    def __init__(self, dataset: Any, inputs: str | Sequence[str], targets: str, *, name: str = "the dataset") -> None:
        """dataset: a `datasets.Dataset`; name: its name in errors."""
        inputs = [inputs] if isinstance(inputs, str) else list(inputs)
        if len(dataset) == 0:
            raise UsageError(f"{name} has no rows; there must be at least 1.")
        for column in (*inputs, targets):
            _check(_column(dataset, column, name), f"{name}: column {column!r}")
        self._inputs, self._rows = inputs, dataset.select_columns(inputs).with_format("arrow")
        first = self._rows[[0]]
        if len(inputs) > 1 and (lists := [column for column in inputs if _array(first.column(column)).ndim > 1]):
            raise UsageError(f"{name}: column {lists[0]!r} holds lists; several inputs must be one number each.")
        feature = dataset.features[targets]
        self._num_classes: int | None = getattr(feature, "num_classes", None)
        whole = dataset.select_columns([targets]).with_format("arrow")[:]
        self.targets = torch.from_numpy(_array(whole.column(targets)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather(torch.tensor([index]))
        return inputs[0], targets[0]

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at these indices: int64, shape (N,)."""
        rows = self._rows[indices.tolist()]
        columns = [_array(rows.column(column)) for column in self._inputs]
        inputs = columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
        return torch.from_numpy(inputs), self.targets.index_select(0, indices)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example's input."""
        return tuple(self[0][0].shape)

    @property
    def num_outputs(self) -> int:
        """Integer targets: the number of classes; floating ones: values per example."""
        if self.targets.is_floating_point():
            return math.prod(self.targets.shape[1:])
        return self._num_classes or int(self.targets.max()) + 1


def huggingface(
    path: str | Sequence[str] | None, split: str, inputs: str | Sequence[str], targets: str
) -> HuggingFace | None:
    """Columns of numbers of the dataset at `path`; None if the path is None.

    path: a folder made by `save_to_disk`; a .parquet, .arrow, .csv, .json or .jsonl file; a folder of such files; a
    glob; or a list of these (`open_dataset`). split: selects one if a folder or a glob has several. Nothing is
    downloaded; `datasets` keeps converted files in its own cache. UsageError if `datasets` is not installed, or the
    path or its columns cannot be used.
    """
    return None if path is None else HuggingFace(open_dataset(path, split), inputs, targets, name=name_of(path))


def huggingface_images(
    path: str | Sequence[str] | None, split: str, inputs: str, targets: str, **options: Any
) -> Images | None:
    """A column of images, stored as `datasets`' Image type or as file bytes, and a column of class numbers.

    path, split: see `huggingface`; options: see `Images`.
    """
    if path is None:
        return None
    dataset = open_dataset(path, split)
    name = name_of(path)
    rows = HuggingFace(dataset, targets, targets, name=name)
    if rows.targets.is_floating_point() or rows.targets.dim() > 1:
        raise UsageError(f"{name}: column {targets!r} must hold a class number in each row.")
    images = _column(dataset, inputs, name)
    if not _holds_files(images.type):
        raise UsageError(
            f"{name}: column {inputs!r} is of type {images.type}; it must hold images: files' bytes, or the type Image "
            "of `datasets`. Columns of numbers are read by data=huggingface."
        )
    source = partial(_image, dataset.select_columns([inputs]).with_format("arrow"), name)
    return Images(source, rows.targets, rows.num_outputs, **options)


def _image(rows: Any, path: str, index: int) -> tuple[str, str | BytesIO]:
    """The name of a row's image, and its file (a path or its bytes)."""
    value = rows[[index]].column(0)[0].as_py()
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    return f"{path}: row {index}", BytesIO(value) if isinstance(value, bytes) else value


def _holds_files(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {field.name for field in kind}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _column(dataset: Any, name: str, path: str) -> Any:
    if name not in dataset.column_names:
        raise UsageError(f"{path} has no column {name!r}; it has {', '.join(dataset.column_names)}.")
    return dataset.data.column(name)


def _check(column: Any, name: str) -> None:
    """Raise UsageError unless the whole column holds numbers, or lists of numbers of one shape."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values: Any = column
    while True:
        if values.null_count:
            raise UsageError(f"{name} has {values.null_count} missing values; fill them or leave the rows out.")
        if isinstance(values.type, pa.BaseExtensionType):
            values = pa.chunked_array([chunk.storage for chunk in values.chunks], values.type.storage_type)
        if not _is_list(values.type):
            break
        lengths = pc.min_max(pc.list_value_length(values)).as_py()
        if lengths["min"] != lengths["max"]:
            raise UsageError(
                f"{name} holds lists of {lengths['min']} to {lengths['max']} values; they must be of one length. Pad "
                "them, or write texts to files for data=text."
            )
        values = pc.list_flatten(values)
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise UsageError(
            f"{name} is of type {kind}; it must hold numbers, or lists of numbers. Texts are read by data=text, images "
            "by data=huggingface_images; datasets' `map` turns them into numbers."
        )


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _array(column: Any) -> NDArray[Any]:
    """A checked column as one array, copied: shape (rows, …)."""
    values = column.combine_chunks()
    shape = [len(values)]
    while True:
        values = getattr(values, "storage", values)
        if not _is_list(values.type):
            break
        flat = values.flatten()
        shape.append(len(flat) // len(values))
        values = flat
    array = values.to_numpy(zero_copy_only=False)
    return np.array(array if array.dtype.kind == "f" else array.astype(np.int64)).reshape(shape)
