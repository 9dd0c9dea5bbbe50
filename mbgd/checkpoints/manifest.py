"""The schema of a checkpoint's manifest. It is checked because the hash proves only that the manifest is unchanged."""

from typing import Annotated, Any

import msgspec

from mbgd.files.reading import convert
from mbgd.files.run_files import Count, Node, Sha256, seal

FORMAT = 1

Number = float | None
"""null stands for a number that is not finite."""
Finite = Annotated[float, msgspec.Meta(ge=-1.7e308, le=1.7e308)]


class File(msgspec.Struct):
    bytes: Count
    sha256: Sha256


class Optimizer(msgspec.Struct):
    """The state is checked further by step/optimizer_state.py, which knows the optimizer."""

    state: Node | list[Any] = {}
    groups: list[Node] = []
    parameters: list[Any] = []
    more: Node = {}
    skipped_steps: Count = 0
    scaler: Node | None = None


class Values(msgspec.Struct):
    """Other parts may be there; whoever wrote them checks them."""

    optimizer: Optimizer | None = None
    metrics: dict[str, Number] = {}
    noise_scale: Annotated[list[Finite], msgspec.Meta(min_length=3, max_length=3)] | None = None
    run: dict[str, str | int | float | bool | None] | None = None
    tracking: dict[str, str] = {}
    examples: dict[str, str] = {}
    evaluation: dict[str, Number] = {}
    extra_state: dict[str, Any] = {}
    export: dict[str, str] = {}


class Manifest(msgspec.Struct):
    format: int
    step: Count
    identity: Node
    values: Values
    files: dict[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors$")], File]


NEEDED_VALUES = ("optimizer", "metrics", "noise_scale", "run")
NEEDED_FILES = ("model.safetensors", "optimizer.safetensors")


def check(manifest: Any, step: int | None, *, whole_run: bool) -> dict[str, Any]:
    """The manifest, unchanged; ValueError says what is wrong with it.

    step: the one in its folder's name, if any. whole_run: it must hold everything that a trainer resumes from.
    """
    if not isinstance(manifest, dict):
        raise ValueError("the manifest is not an object")
    if manifest.get("format") != FORMAT or isinstance(manifest["format"], bool):
        raise ValueError(f"format {manifest.get('format')!r}, not {FORMAT}")
    if manifest.get("sha256") != seal(manifest):
        raise ValueError("the manifest has other content than was written")
    for name in manifest["files"] if isinstance(manifest.get("files"), dict) else ():
        if "/" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{name!r} is not the name of a file of a checkpoint")
    known = convert(manifest, Manifest)
    if step is not None and known.step != step:
        raise ValueError(f"it holds step {known.step}, but its folder is named for step {step}")
    if whole_run:
        lacking = [name for name in NEEDED_FILES if name not in known.files]
        lacking += [f"values.{name}" for name in NEEDED_VALUES if manifest["values"].get(name) is None]
        if lacking:
            raise ValueError(f"it is not the checkpoint of a run: it has no {' and no '.join(lacking)}")
    return manifest
