"""What forbids replaying micro-batches as CUDA graphs, by name."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules import module as of_torch

from mbgd.checks.setup import Setup
from mbgd.config import CompileName
from mbgd.config.duration import whole
from mbgd.task.extra_state import extra_state
from mbgd.task.task import plain_name
from mbgd.text.listing import shown

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""A module's hooks; those of parameters are taken off before a step's forwards (`GradientHooks`)."""


def obstacles(setup: Setup, users_observers: Sequence[str]) -> list[str]:
    """What forbids graphs in this run, each by name."""
    settings, workers = setup.settings, setup.workers
    varies = settings.averaging.find_unused_parameters or setup.findings.unused_parameters
    kept = shown(extra_state(setup.task))
    of_modules = hooked(dict(setup.task.named_modules()))
    rules = (
        (workers.device.type != "cuda", "the workers compute on a CPU"),
        (workers.num_workers > 1, f"{workers.num_workers} workers exchange gradients by hooks within the backward"),
        (setup.task.pair is not None, "the objective looks at several examples at once (encode and losses)"),
        (
            settings.compile is not CompileName.none,
            f"compile={settings.compile.value}, and compiled parts are not recorded",
        ),
        (
            settings.activation_checkpointing.layers,
            "activation_checkpointing.layers draws random numbers again in the backward",
        ),
        (varies, "which parameters take part may differ from step to step"),
        (
            settings.check.recompute_every_steps is not None,
            "check.recompute_every_steps would blame the hardware for a replay's bits",
        ),
        (whole(settings.log_every_steps) == 1, "log_every_steps=1, and a logged step is eager"),
        (kept, f"modules keep extra state on the host ({kept})"),
        (users_observers, f"the observer {shown(users_observers, most=1)} may change what a forward does"),
        (of_modules, of_modules),
    )
    return [reason for holds, reason in rules if holds]


def hooked(modules: Mapping[str, nn.Module]) -> str:
    """In words: a module with hooks, which a replay would not call; empty if there is none."""
    for name, module in modules.items():
        if any(getattr(module, hooks) for hooks in HOOKS):
            named = f"{plain_name(name) or 'task'} ({type(module).__name__})"
            return f"the module {named} has hooks, which a replay would not call"
    if of_torch._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "all modules have a hook (register_module_forward_hook), which a replay would not call"
    return ""
