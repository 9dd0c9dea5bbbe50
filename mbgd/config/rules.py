"""The rules between the settings of a run."""

import math
import re

from mbgd.config.duration import Duration, is_less_than_one_step, problem
from mbgd.config.settings import (
    AveragingName,
    BatchNormOver,
    CompileName,
    Config,
    Precision,
    Settings,
)


def profiled_steps(profile: str) -> range:
    """The steps that `profile` names, counted from 1; empty if it does not have the form."""
    named = re.fullmatch(r"steps:([1-9]\d*)-(\d+)", profile)
    return range(int(named[1]), int(named[2]) + 1) if named else range(0)


def validate(settings: Settings) -> list[str]:
    """One text for each broken rule: what, got, rule, remedy."""
    batch = settings.batch
    found = []
    if not 0 <= settings.seed < 2**63:
        found.append(f"seed={settings.seed}; it must be from 0 to 2^63 − 1.")
    if batch.size < 1:
        found.append(f"batch.size={batch.size}; a minibatch has at least 1 example.")
    if batch.micro_batch_size is not None and not 1 <= batch.micro_batch_size <= max(batch.size, 1):
        found.append(
            f"batch.micro_batch_size={batch.micro_batch_size} with batch.size={batch.size}; a micro-batch has from 1 "
            "example to the whole minibatch. Make it smaller, or null to give each worker one micro-batch."
        )
    num_threads = settings.averaging.num_threads
    if num_threads is not None and num_threads < 1:
        found.append(f"averaging.num_threads={num_threads}; a worker has at least 1 thread; null: torch's choice.")
    found += _problems_of_the_length(settings.steps, settings.epochs)
    evaluation, noise = settings.evaluation, settings.noise_scale
    found += _too_small(
        ("log_every_steps", settings.log_every_steps, ""),
        ("evaluation.every_steps", evaluation.every_steps, ", or null to evaluate after each epoch"),
        ("evaluation.batch_size", evaluation.batch_size, ""),
        ("check.replicas_every_steps", settings.check.replicas_every_steps, ", or null for each evaluation alone"),
        ("check.recompute_every_steps", settings.check.recompute_every_steps, ", or null for never"),
        ("noise_scale.every_steps", noise.every_steps, ", or null not to measure it"),
        ("noise_scale.smoothing", noise.smoothing, " (1: each measurement by itself)"),
    )
    found += _do_not_go_together(settings)
    found += _not_positive(
        ("max_grad_norm", settings.max_grad_norm, ", or null to leave gradients as they are"),
        ("max_grad_value", settings.max_grad_value, ", or null to leave gradients as they are"),
    )
    if isinstance(settings, Config):
        found += _problems_of_a_run(settings)
    elif settings.schedule is not None and not callable(settings.schedule):
        found.append(
            f"schedule={settings.schedule!r}; it must be a function of the step, such as "
            "mbgd.schedule.Cosine(num_steps=1000), or None."
        )
    return found


def _problems_of_the_length(steps: Duration | None, epochs: int | None) -> list[str]:
    if steps is None and epochs is None:
        return ["steps=null and epochs=null; set one of them."]
    negative = [(name, one) for name, one in (("steps", steps), ("epochs", epochs)) if isinstance(one, int) and one < 0]
    malformed = "" if steps is None else problem("steps", steps)
    return [f"{name}={value}; it must be ≥ 0." for name, value in negative] + ([malformed] if malformed else [])


def _do_not_go_together(settings: Settings) -> list[str]:
    found, is_reproducible = [], settings.averaging.name is AveragingName.reproducible
    is_compiled = settings.compile is not CompileName.none
    over_minibatch = settings.batch_norm is BatchNormOver.minibatch
    if settings.precision is Precision.bf16_true and is_compiled:
        found.append(
            f"precision=bf16-true with compile={settings.compile.value}; the compiler would start again in every step. "
            "Use precision=bf16, which the compiler makes as fast, or compile=none."
        )
    if over_minibatch and is_compiled:
        found.append(
            f"batch_norm=minibatch with compile={settings.compile.value}; its layers exchange sums within the "
            "forward, which cannot be compiled. Use compile=none, or batch_norm=micro_batch."
        )
    recompute = settings.check.recompute_every_steps
    if recompute is not None and not is_reproducible:
        found.append(
            f"check.recompute_every_steps={recompute} with averaging={settings.averaging.name.value}; a micro-batch's "
            "gradient has the same bits on every worker only with averaging=reproducible. Use that, or null."
        )
    if over_minibatch and is_reproducible:
        found.append(
            "batch_norm=minibatch with averaging=reproducible; its workers compute their micro-batches one after "
            "another, so no layer sees the whole minibatch at once. Use averaging=auto, or batch_norm=micro_batch, "
            "whose statistics do not depend on the number of workers."
        )
    return found


def _problems_of_a_run(config: Config) -> list[str]:
    checkpoint, wandb = config.checkpoint, config.tracking.wandb
    found = _too_small(
        ("checkpoint.every_steps", checkpoint.every_steps, ", or null to go by time alone"),
        ("checkpoint.memory_every_steps", checkpoint.memory_every_steps, ", or null for none"),
        ("checkpoint.keep", checkpoint.keep, ": the newest checkpoint is kept"),
    )
    found += _not_positive(
        ("checkpoint.every_seconds", checkpoint.every_seconds, ", or null to go by steps alone"),
        ("backend.timeout_seconds", config.backend.timeout_seconds, ""),
        ("tracking.wandb.init_timeout_seconds", wandb.init_timeout_seconds, ""),
        ("tracking.wandb.finish_seconds", wandb.finish_seconds, ""),
    )
    if config.sweep.target is not None and not math.isfinite(config.sweep.target):
        found.append(f"sweep.target={config.sweep.target}; it must be a finite number, or null for none.")
    if config.profile is not None and not profiled_steps(config.profile):
        found.append(
            f"profile={config.profile}; it must name the first and the last of some optimizer steps, counted "
            "from 1, such as steps:10-20, or be null."
        )
    texts = {f"run.{name}": value for name, value in vars(config.run).items()}
    texts |= {"checkpoint.best": checkpoint.best, "sweep.metric": config.sweep.metric}
    texts |= {"resume.from": config.resume.from_, "init.from": config.init.from_}
    return found + [f"{name} is empty; leave it out, or give a value." for name, text in texts.items() if text == ""]


def _too_small(*numbers: tuple[str, Duration | None, str]) -> list[str]:
    found = []
    for name, value, otherwise in numbers:
        if value is not None and (malformed := problem(name, value)):
            found.append(malformed)
        elif value is not None and is_less_than_one_step(value):
            found.append(f"{name}={value}; it must be ≥ 1{otherwise}.")
    return found


def _not_positive(*numbers: tuple[str, float | None, str]) -> list[str]:
    return [
        f"{name}={value}; it must be a finite number > 0{otherwise}."
        for name, value, otherwise in numbers
        if value is not None and not 0 < value < math.inf
    ]
