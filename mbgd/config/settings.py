"""The typed settings of a run.

`conf/` gives the values and comments; these classes give types, units and rules.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mbgd.config.field_types import Typed

MUST_MATCH = {"must_match": True}
"""Metadata of fields that must be the same when a run goes on; see must_match.py."""


class Precision(Enum):
    """Parameters' dtype and the dtype of the forward computation."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"  # parameters fp32, forward under autocast
    fp16 = "fp16"  # parameters fp32, forward under autocast, loss scaling


class AveragingName(Enum):
    auto = "auto"  # shared_memory where the workers are CPU workers that can share it, otherwise ddp
    ddp = "ddp"
    shared_memory = "shared_memory"
    reproducible = "reproducible"


class BackendName(Enum):
    auto = "auto"
    gloo = "gloo"
    nccl = "nccl"


class DeviceName(Enum):
    auto = "auto"  # cuda where the backend is nccl, otherwise cpu
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class Batch(Typed):
    size: int = field(default=64, metadata=MUST_MATCH)
    """Examples of one optimizer step, all workers together."""
    micro_batch_size: int | None = None
    """Largest number of examples in one forward/backward; None: each worker's share in one."""
    drop_last: bool = field(default=False, metadata=MUST_MATCH)
    """Leave out an epoch's short last minibatch."""


@dataclass(frozen=True)
class Averaging(Typed):
    name: AveragingName = AveragingName.auto
    find_unused_parameters: bool | None = None
    """Whether the parameters that take part may differ from step to step; None: found out at the start."""
    num_threads: int | None = None
    """Threads of each CPU worker; None: 1 with reproducible, whose bits depend on it, otherwise as torch finds it."""


@dataclass(frozen=True)
class Evaluation(Typed):
    every_steps: int | None = None
    """Optimizer steps between evaluations; None: at the end of each epoch. There is always one at the end."""
    batch_size: int = 256
    """Largest number of examples in one forward."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the whole evaluation set by name: what has update(outputs, targets), compute() and reset()."""


@dataclass(frozen=True)
class NoiseScale(Typed):
    every_steps: int | None = 50
    """Optimizer steps between measurements of the gradient's noise; None: not measured."""
    smoothing: int = 20
    """Measurements over which it is averaged: the weight of older ones falls exponentially."""


@dataclass(frozen=True)
class Check(Typed):
    replicas_every_steps: int | None = None
    """Optimizer steps between comparisons of the workers' copies of the state; None: before each evaluation alone."""
    recompute_every_steps: int | None = None
    """Optimizer steps between those in which a micro-batch is computed again on another worker; None: never."""


@dataclass(frozen=True)
class Settings(Typed):
    """What training depends on beside the model, the data, the objective and the optimizer."""

    seed: int = field(default=0, metadata=MUST_MATCH)
    epochs: int | None = 1
    steps: int | None = None
    """Optimizer steps; None: `epochs` passes over the training examples."""
    batch: Batch = field(default_factory=Batch)
    precision: Precision = field(default=Precision.fp32, metadata=MUST_MATCH)
    averaging: Averaging = field(default_factory=Averaging)
    max_grad_norm: float | None = field(default=None, metadata=MUST_MATCH)
    """Largest Euclidean norm of the mean gradient; None: not clipped."""
    schedule: Any = field(default=None, metadata=MUST_MATCH)
    """A function of the step (counted from 0) that gives a factor for the learning rate; None: 1."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    log_every_steps: int = 50
    noise_scale: NoiseScale = field(default_factory=NoiseScale)
    check: Check = field(default_factory=Check)


@dataclass(frozen=True)
class Backend(Typed):
    name: BackendName = BackendName.auto
    device: DeviceName = DeviceName.auto
    """What the workers compute on. Over gloo, several workers may share a GPU."""
    timeout_seconds: float = 600.0
    """How long a collective waits for a worker before the run ends with an error."""


@dataclass(frozen=True)
class Run(Typed):
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
class Sweep(Typed):
    metric: str = "eval/loss"
    """What a sweep's jobs are ranked by."""
    direction: Direction = Direction.minimize
    target: float | None = None
    """Value of the metric whose steps and examples the result tells; None: it does not."""


@dataclass(frozen=True)
class Checkpoint(Typed):
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
    memory_every_steps: int | None = None
    """Optimizer steps between snapshots in the host's memory, for workers that restart there; None: none."""
    required: bool = False
    """End the run where a checkpoint cannot be written."""


@dataclass(frozen=True)
class Resume(Typed):
    from_: str = "auto"
    """`resume.from`. auto: go on where the run's own folder ends; never; or the path of another run or checkpoint to go
    on from."""
    force: bool = False
    """Go on even if what alters the course of training has changed."""


class WandbMode(Enum):
    auto = "auto"  # online where there is a key, offline elsewhere; WANDB_MODE decides where it is set
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(frozen=True)
class Wandb(Typed):
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
class Tracking(Typed):
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
    resume: Resume = field(default_factory=Resume)
    profile: str | None = None
    """steps:10-20: a trace of these optimizer steps, counted from 1; None: none."""
    data: Any = None
    model: Any = field(default=None, metadata=MUST_MATCH)
    objective: Any = field(default=None, metadata=MUST_MATCH)
    optimizer: Any = field(default=None, metadata=MUST_MATCH)
