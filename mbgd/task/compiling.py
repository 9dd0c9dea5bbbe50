"""torch.compile for a run: each shape has a static graph of its own, so the bits depend on the shape alone."""

import torch
from torch import nn

from mbgd.config import CompileName
from mbgd.errors import UsageError

MOST_SHAPES = 256
"""torch compiles 8 shapes by default and then silently goes on uncompiled, with other bits."""
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def compile_(model: nn.Module, how: CompileName, device: torch.device) -> None:
    """Compile the model, or each of its blocks, in place; names and classes stay as they are.

    UsageError if there is no C++ compiler, or nothing that is a block.
    """
    if how is CompileName.none:
        return
    import torch._dynamo
    import torch._inductor.cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    if device.type == "cpu":
        try:
            torch._inductor.cpp_builder.get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UsageError(
                f"compile={how.value} on CPU workers needs a C++ compiler, and torch finds none. Install g++ or clang, "
                "name one in the variable CXX, or set compile=none."
            ) from error
    parts = [model] if how is CompileName.model else blocks(model)
    if not parts:
        raise UsageError(
            "compile=blocks: the model has no blocks, which are modules with parts of their own in a ModuleList, "
            "ModuleDict or Sequential. Use compile=model."
        )
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = MOST_SHAPES * max(len(parts), 16)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for part in parts:
        # Automatic dynamic shapes would make the bits depend on the shapes that came before.
        part.compile(dynamic=False)


def num_graphs() -> int:
    """Graphs that this process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules in a ModuleList, ModuleDict or Sequential that have parts of their own."""
    found: list[nn.Module] = []
    for child in model.children():
        is_block = (
            isinstance(model, CONTAINERS) and not isinstance(child, CONTAINERS) and any(True for _ in child.children())
        )
        found += [child] if is_block else blocks(child)
    return found
