"""The typed settings of a run, and the rules that hold between them. Pure: no Hydra, no torch.distributed.

`conf/` gives the values and comments; these classes give types, units and rules.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Precision(Enum):
    """Parameters' dtype and the dtype of the forward computation."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"  # parameters fp32, forward under autocast
    fp16 = "fp16"  # parameters fp32, forward under autocast, loss scaling


class Last(Enum):
    """What happens to an epoch's short last minibatch."""

    keep = "keep"
    drop = "drop"


class AveragingName(Enum):
    auto = "auto"  # shared_memory where the workers are CPU workers that can share it, otherwise ddp
    ddp = "ddp"
    shared_memory = "shared_memory"
    reproducible = "reproducible"


class BackendName(Enum):
    auto = "auto"
    gloo = "gloo"
    nccl = "nccl"


@dataclass(frozen=True)
class Batch:
    size: int = 64
    """Examples of one optimizer step, all workers together."""
    micro_batch_size: int | None = None
    """Largest number of examples in one forward/backward; None: each worker's share in one."""
    last: Last = Last.keep


@dataclass(frozen=True)
class Averaging:
    name: AveragingName = AveragingName.auto
    find_unused_parameters: bool | None = None
    """Whether the parameters that take part may differ from step to step; None: found out at the start."""
    num_threads: int | None = None
    """Threads of each CPU worker; None: 1 with reproducible, whose bits depend on it, otherwise as torch finds it."""


@dataclass(frozen=True)
class Evaluation:
    every_steps: int | None = None
    """Optimizer steps between evaluations; None: at the end of each epoch. There is always one at the end."""
    batch_size: int = 256
    """Largest number of examples in one forward."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the whole evaluation set by name: what has update(outputs, targets), compute() and reset()."""


@dataclass(frozen=True)
class NoiseScale:
    every_steps: int | None = 50
    """Optimizer steps between measurements of the gradient's noise; None: not measured."""
    smoothing: int = 20
    """Measurements over which it is averaged: the weight of older ones falls exponentially."""


@dataclass(frozen=True)
class Check:
    replicas_every_steps: int | None = None
    """Optimizer steps between comparisons of the workers' copies of the state; None: before each evaluation alone."""


@dataclass(frozen=True)
class Settings:
    """What training depends on beside the model, the data, the objective and the optimizer."""

    seed: int = 0
    epochs: int | None = 1
    steps: int | None = None
    """Optimizer steps; None: `epochs` passes over the training examples."""
    batch: Batch = field(default_factory=Batch)
    precision: Precision = Precision.fp32
    averaging: Averaging = field(default_factory=Averaging)
    clip_norm: float | None = None
    """Largest Euclidean norm of the mean gradient; None: not clipped."""
    schedule: Any = None
    """A function of the step (counted from 0) that gives a factor for the learning rate; None: 1."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    log_every_steps: int = 50
    noise_scale: NoiseScale = field(default_factory=NoiseScale)
    check: Check = field(default_factory=Check)


@dataclass(frozen=True)
class Backend:
    name: BackendName = BackendName.auto
    timeout_seconds: float = 600.0
    """How long a collective waits for a worker before the run ends with an error."""


@dataclass(frozen=True)
class Run:
    dir: str | None = None
    """The run's folder; None: a new one under `root`."""
    name: str | None = None
    """What the name of a new folder contains; None: the experiment, or model and data."""
    id: str | None = None
    """Names the folder; None: made from the time, the name, and the id of torchrun or SLURM or a random one."""
    root: str = "runs"


class Direction(Enum):
    """Which values of a metric are better."""

    minimize = "minimize"
    maximize = "maximize"


@dataclass(frozen=True)
class Sweep:
    metric: str = "eval/loss"
    """What a sweep's jobs are ranked by."""
    direction: Direction = Direction.minimize
    target: float | None = None
    """Value of the metric whose steps and examples the result tells; None: it does not."""


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int | None = None
    """Optimizer steps between checkpoints; None: by time alone. There is always one at the end."""
    every_seconds: float | None = 300.0
    """Seconds between checkpoints; None: by steps alone."""
    keep: int = 2
    """How many of the newest are kept."""
    best: str | None = None
    """A metric of the evaluation whose best checkpoint is kept too, such as eval/accuracy; None: the newest alone."""
    direction: Direction = Direction.minimize
    """Which of its values are better."""
    memory_every: int | None = None
    """Optimizer steps between snapshots in the host's memory, for workers that restart there; None: none."""
    required: bool = False
    """End the run where a checkpoint cannot be written."""


class WandbMode(Enum):
    auto = "auto"  # online where there is a key, offline elsewhere; WANDB_MODE decides where it is set
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(frozen=True)
class Wandb:
    mode: WandbMode = WandbMode.disabled
    project: str = "mbgd"
    entity: str | None = None
    """The user or team; None: the key's own."""
    group: str | None = None
    """Runs of one name are shown together, such as a sweep's."""
    name: str | None = None
    """What the run is called; None: as its folder."""
    tags: list[str] = field(default_factory=list)
    log_checkpoints: bool = False
    """Upload the last and the best checkpoint at the end."""
    init_timeout_seconds: float = 30.0
    """How long a server may take to answer at the start before the run goes on offline."""
    finish_seconds: float = 20.0
    """How long the end of training waits for uploads."""


@dataclass(frozen=True)
class Tracking:
    quiet: bool = False
    """Print nothing but warnings and errors."""
    report: bool = True
    """Write `report.html` at the end."""
    tensorboard: bool = False
    wandb: Wandb = field(default_factory=Wandb)


@dataclass(frozen=True)
class Config(Settings):
    """The whole configuration of `train.py`. Fields of type Any are nodes with a `_target_` of the user's choice."""

    backend: Backend = field(default_factory=Backend)
    run: Run = field(default_factory=Run)
    sweep: Sweep = field(default_factory=Sweep)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    resume: str = "auto"
    """auto: go on where the run's own folder ends; never; or the path of another run or checkpoint to go on from."""
    resume_force: bool = False
    """Go on even if what alters the course of training has changed."""
    profile: str | None = None
    """steps:10-20: a trace of these optimizer steps, counted from 1; None: none."""
    data: Any = None
    model: Any = None
    objective: Any = None
    optimizer: Any = None


SAME_COURSE = ("seed", "precision", "clip_norm", "model", "objective", "optimizer", "schedule")
"""Keys of the configuration that must not change when a run goes on, beside parts of `batch` and `data`."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the course of training depends on, of a whole configuration as plain values, by key.

    Not in it: the number of workers, the cut into micro-batches, averaging, backend, logging, evaluation. How long
    training lasts is in it only where the learning rate depends on it.
    """
    data = {key: value for key, value in config["data"].items() if key not in ("evaluation", "num_workers")}
    course = {key: config[key] for key in SAME_COURSE}
    course |= {"data": data, "batch": {key: config["batch"][key] for key in ("size", "last")}}
    if not str((config["schedule"] or {}).get("_target_", "")).endswith(("Constant", "Step")):
        course |= {key: config[key] for key in ("epochs", "steps")}
    return dict(_flat(course))


def profiled_steps(profile: str) -> range:
    """The steps that `profile` names, the first of all being 1; empty where it names none."""
    named = re.fullmatch(r"steps:([1-9]\d*)-(\d+)", profile)
    return range(int(named[1]), int(named[2]) + 1) if named else range(0)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def problems(settings: Settings) -> list[str]:
    """Every rule between the settings that is broken, each as what, got, rule, remedy."""
    batch = settings.batch
    found = []
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
    if settings.steps is None and settings.epochs is None:
        found.append("steps=null and epochs=null; set one of them.")
    for name, value in (("steps", settings.steps), ("epochs", settings.epochs)):
        if value is not None and value < 0:
            found.append(f"{name}={value}; it must be ≥ 0.")
    if settings.clip_norm is not None and not settings.clip_norm > 0:
        found.append(f"clip_norm={settings.clip_norm}; it must be > 0, or null to leave gradients as they are.")
    if settings.log_every_steps < 1:
        found.append(f"log_every_steps={settings.log_every_steps}; it must be ≥ 1.")
    every = settings.evaluation.every_steps
    if every is not None and every < 1:
        found.append(f"evaluation.every_steps={every}; it must be ≥ 1, or null to evaluate after each epoch.")
    every = settings.check.replicas_every_steps
    if every is not None and every < 1:
        found.append(f"check.replicas_every_steps={every}; it must be ≥ 1, or null for each evaluation alone.")
    noise = settings.noise_scale
    if noise.every_steps is not None and noise.every_steps < 1:
        found.append(f"noise_scale.every_steps={noise.every_steps}; it must be ≥ 1, or null not to measure it.")
    if noise.smoothing < 1:
        found.append(f"noise_scale.smoothing={noise.smoothing}; it must be ≥ 1 (1: each measurement by itself).")
    if settings.evaluation.batch_size < 1:
        found.append(f"evaluation.batch_size={settings.evaluation.batch_size}; it must be ≥ 1.")
    if isinstance(settings, Config):
        found += _checkpoint_problems(settings.checkpoint)
        found += _tracking_problems(settings.tracking)
        if settings.profile is not None and not profiled_steps(settings.profile):
            found.append(
                f"profile={settings.profile}; it must name the first and the last of some optimizer steps, counted "
                "from 1, such as steps:10-20, or be null."
            )
    return found


def _checkpoint_problems(checkpoint: Checkpoint) -> list[str]:
    found = []
    if checkpoint.every_steps is not None and checkpoint.every_steps < 1:
        found.append(f"checkpoint.every_steps={checkpoint.every_steps}; it must be ≥ 1, or null to go by time alone.")
    if checkpoint.every_seconds is not None and not checkpoint.every_seconds > 0:
        found.append(f"checkpoint.every_seconds={checkpoint.every_seconds}; it must be > 0, or null for steps alone.")
    if checkpoint.memory_every is not None and checkpoint.memory_every < 1:
        found.append(f"checkpoint.memory_every={checkpoint.memory_every}; it must be ≥ 1, or null for none.")
    if checkpoint.keep < 1:
        found.append(f"checkpoint.keep={checkpoint.keep}; at least the newest checkpoint is kept.")
    return found


def _tracking_problems(tracking: Tracking) -> list[str]:
    wandb = tracking.wandb
    return [
        f"tracking.wandb.{name}={value}; it must be > 0."
        for name, value in (
            ("init_timeout_seconds", wandb.init_timeout_seconds),
            ("finish_seconds", wandb.finish_seconds),
        )
        if not value > 0
    ]
