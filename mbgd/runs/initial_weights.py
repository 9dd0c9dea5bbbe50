"""Weights to start from, without the state of an optimizer: of a file, a run or a checkpoint."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mbgd.averaging.start import start_alike
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints.task_state import exported_tensors
from mbgd.config import Init
from mbgd.errors import UsageError
from mbgd.files.reading import Unreadable, check_regular
from mbgd.files.run_files import MODEL
from mbgd.task.task import plain_name
from mbgd.text.escaping import plain
from mbgd.text.listing import shown
from mbgd.text.suggestions import nearest
from mbgd.trainer import Trainer

MOST_NAMES = 10


def start_from(trainer: Trainer, init: Init, *, quiet: bool) -> None:
    """Give the model the weights that `init.from` names; UsageError, on every worker, if they do not fit."""
    if init.from_ is None:
        return
    setup, problem = trainer.setup, ""
    if setup.workers.is_main:
        try:
            note = load_weights(setup.model, Path(init.from_), strict=init.strict, rename=init.rename)
            if not quiet:
                print(note, flush=True)
        except UsageError as error:
            problem = str(error)
    if problem := str(setup.workers.broadcast(problem)):
        raise UsageError(problem)
    start_alike(setup.task, setup.workers)


def load_weights(model: nn.Module, source: Path, *, strict: bool, rename: Mapping[str, str]) -> str:
    """Copy the tensors of a .safetensors file, a run's folder or a checkpoint's into the model; returns a note.

    strict: UsageError if a name is only in the file or only in the model; otherwise such names are in the note. A shape
    that differs is always an error. rename: names in the file → names in the model; * stands for any part.
    """
    tensors = _renamed(_read(source), rename)
    wanted = {plain_name(name): t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    common = [name for name in wanted if name in tensors]
    given = {name: _as(tensors[name], wanted[name]) for name in common}
    shapes = [
        f"{plain(name)} {tuple(given[name].shape)} in the file, {tuple(wanted[name].shape)} in the model"
        for name in common
        if given[name].shape != wanted[name].shape
    ]
    found = [f"other shapes: {shown(shapes, MOST_NAMES, '; ')}"] if shapes else []
    left_out = [f"not in the file: {shown(sorted(missing), MOST_NAMES)}"] if missing else []
    left_out += [f"not in the model: {shown(sorted(map(plain, unexpected)), MOST_NAMES)}"] if unexpected else []
    if found or (strict and left_out) or not common:
        if found:
            remedy = (
                "Use another file, or train a model of these shapes. To load the others alone, init.rename takes these "
                "to names that the model does not have, with init.strict=false."
            )
        elif common:
            remedy = "Use another file, init.rename for names that differ, or init.strict=false to load what fits."
        else:
            remedy = "Use another file, or init.rename for names that differ."
        raise UsageError(
            f"init.from={plain(source)}: the weights do not fit the model. {'; '.join(found + left_out)}. {remedy}"
        )
    with torch.no_grad():
        for name in common:
            wanted[name].copy_(given[name])
    note = f"init        {len(common)} of {len(wanted)} tensors from {plain(source)}"
    return "; ".join([note, *left_out])


def _read(source: Path) -> dict[str, Tensor]:
    try:
        file = source / MODEL if source.is_dir() else source
        if source.is_dir() and (os.path.lexists(source / checkpoint.MANIFEST) or not file.exists()):
            found = checkpoint.named(source, "init.from")
            if found is None:
                raise UsageError(
                    f"init.from={plain(source)}: the folder holds neither {MODEL} nor a checkpoint. Name a run's "
                    "folder, a checkpoint's folder, or a .safetensors file."
                )
            snapshot, _ = checkpoint.read(found)
            return exported_tensors(snapshot)
        check_regular(file)
        return load_file(file)
    except (OSError, Unreadable, SafetensorError) as error:
        raise UsageError(
            f"init.from={plain(source)} cannot be read ({plain(error)}). Name a run's folder, a checkpoint's folder, "
            "or a .safetensors file."
        ) from error


def _renamed(tensors: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    """The first pattern that matches a name counts; UsageError for a pattern that matches none."""
    used: set[str] = set()
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in rename.items():
            if match := re.fullmatch(re.escape(pattern).replace(r"\*", "(.*)"), name):
                used.add(pattern)
                parts = iter(match.groups())
                new = re.sub(r"\*", lambda _, parts=parts: next(parts, ""), str(replacement))  # type: ignore[misc]
                break
        if new in renamed:
            raise UsageError(f"init.rename makes two tensors of the file {plain(new)}. Make the patterns narrower.")
        renamed[new] = tensor
    for pattern in rename.keys() - used:
        meant = nearest(pattern.strip("*."), list(tensors)) or list(tensors)[:5]
        raise UsageError(
            f"init.rename: no name in the file matches {pattern!r}. Names there are {', '.join(map(plain, meant))}, …"
        )
    return renamed


def _as(tensor: Tensor, wanted: Tensor) -> Tensor:
    """The tensor in the form that it has in the model: complex128 is stored as pairs of float64."""
    is_pairs = wanted.dtype is torch.complex128 and not tensor.is_complex() and tensor.shape[-1:] == (2,)
    return torch.view_as_complex(tensor) if is_pairs else tensor
