"""The typed settings of a run.

`conf/` gives the values and comments; these classes give types, units and rules. A number of steps is a `Duration`: it
may be given in epochs or examples, too. Long because it is the one list of all settings.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mbgd.config.duration import Duration
from mbgd.config.field_types import Typed

MUST_MATCH = {"must_match": True}
"""Metadata of fields that must be the same when a run is resumed; see must_match.py."""


class Precision(Enum):
    """Parameters' dtype and the dtype of the forward computation."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"  # parameters fp32, forward under autocast
    bf16_true = "bf16-true"  # as bf16, but with matrices and embeddings of the forward in bf16, made from fp32 copies
    fp16 = "fp16"  # parameters fp32, forward under autocast, loss scaling


class AveragingName(Enum):
    auto = "auto"  # shared_memory for CPU workers that can share memory, otherwise ddp
    ddp = "ddp"
    shared_memory = "shared_memory"
    reproducible = "reproducible"


class ShardingName(Enum):
    """Whether each worker updates its own pieces of the parameters."""

    auto = "auto"  # optimizer where it gains something, for CPU workers whose optimizer is known to work in pieces
    none = "none"
    optimizer = "optimizer"


class Recovery(Enum):
    """What becomes of the other workers when one is lost."""

    restart = "restart"  # the launcher ends them; with --max-restarts all start again from the newest state
    continue_ = "continue"  # they go on with the step, and compute its micro-batches as well


class BatchNormOver(Enum):
    """The examples whose statistics BatchNorm uses in training."""

    micro_batch = "micro_batch"
    minibatch = "minibatch"  # all workers' examples


class BackendName(Enum):
    auto = "auto"
    gloo = "gloo"
    nccl = "nccl"


class DeviceName(Enum):
    auto = "auto"  # cuda where the backend is nccl, otherwise cpu
    cpu = "cpu"
    cuda = "cuda"


class CompileName(Enum):
    none = "none"
    model = "model"
    blocks = "blocks"  # each part of a ModuleList or Sequential by itself: compiled faster, and once for equal ones


class CudaGraphsName(Enum):
    """Whether micro-batches are replayed as CUDA graphs."""

    off = "off"
    auto = "auto"  # where it is possible, and the bits are those without graphs


class MatmulPrecision(Enum):
    """torch.set_float32_matmul_precision."""

    highest = "highest"
    high = "high"
    medium = "medium"


@dataclass(frozen=True)
class Batch(Typed):
    size: int = field(default=64, metadata=MUST_MATCH)
    """Examples of one optimizer step, all workers together."""
    micro_batch_size: int | None = None
    """Largest number of examples in one forward/backward; None: one micro-batch per worker, or with reproducible 8 per
    minibatch."""
    drop_last: bool = field(default=False, metadata=MUST_MATCH)
    """Leave out an epoch's short last minibatch."""


@dataclass(frozen=True)
class Averaging(Typed):
    name: AveragingName = AveragingName.auto
    find_unused_parameters: bool | None = None
    """Whether the parameters that take part may differ from step to step; None: found out by a trial at the start."""
    num_threads: int | None = None
    """Threads of each CPU worker; None: 1 with reproducible, whose bits depend on it, and for a small model unless
    OMP_NUM_THREADS is set; otherwise torch's default."""


@dataclass(frozen=True)
class Evaluation(Typed):
    every_steps: Duration | None = None
    """Optimizer steps between evaluations; None: at the end of each epoch. There is always one at the end."""
    at_start: bool = False
    """Evaluate also before the first step."""
    batch_size: int = 256
    """Largest number of examples in one forward."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the whole evaluation set by name: objects with update(outputs, targets), compute() and reset()."""


@dataclass(frozen=True)
class NoiseScale(Typed):
    every_steps: Duration | None = 50
    """Optimizer steps between measurements of the gradient's noise; None: not measured."""
    smoothing: int = 20
    """Measurements to average over, with weights that decay exponentially."""


@dataclass(frozen=True)
class Check(Typed):
    replicas_every_steps: Duration | None = None
    """Optimizer steps between comparisons of the workers' copies of the state; None: before each evaluation alone."""
    recompute_every_steps: Duration | None = None
    """Optimizer steps between steps that recompute a micro-batch on another worker; None: never."""


@dataclass(frozen=True)
class ActivationCheckpointing(Typed):
    layers: list[str] = field(default_factory=list)
    """Patterns of the names of layers whose activations are computed again in the backward instead of kept."""


@dataclass(frozen=True)
class Settings(Typed):
    """Training's settings beside the model, the data, the objective and the optimizer."""

    seed: int = field(default=0, metadata=MUST_MATCH)
    epochs: int | None = 1
    steps: Duration | None = None
    """Optimizer steps; None: `epochs` passes over the training examples."""
    batch: Batch = field(default_factory=Batch)
    precision: Precision = field(default=Precision.fp32, metadata=MUST_MATCH)
    matmul_precision: MatmulPrecision | None = field(default=None, metadata=MUST_MATCH)
    """Of matrix products in fp32; None: as torch is set, which is highest by default."""
    compile: CompileName = CompileName.none
    """Whether torch.compile compiles the model, or each of its blocks."""
    cuda_graphs: CudaGraphsName = CudaGraphsName.off
    """Whether micro-batches on a GPU are recorded once for each shape and replayed; auto: where that is possible."""
    activation_checkpointing: ActivationCheckpointing = field(default_factory=ActivationCheckpointing)
    averaging: Averaging = field(default_factory=Averaging)
    sharding: ShardingName = ShardingName.auto
    """Whether each worker updates its own pieces of the parameters, and keeps the optimizer's state of these alone."""
    batch_norm: BatchNormOver = field(default=BatchNormOver.micro_batch, metadata=MUST_MATCH)
    """The examples whose statistics BatchNorm layers use in training."""
    max_grad_norm: float | None = field(default=None, metadata=MUST_MATCH)
    """Largest Euclidean norm of the mean gradient; None: not clipped."""
    max_grad_value: float | None = field(default=None, metadata=MUST_MATCH)
    """Largest absolute value of an element of the mean gradient, clipped before the norm is; None: not clipped."""
    schedule: Any = field(default=None, metadata=MUST_MATCH)
    """Step (counted from 0) → factor for the learning rate; None: 1."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    log_every_steps: Duration = 50
    noise_scale: NoiseScale = field(default_factory=NoiseScale)
    check: Check = field(default_factory=Check)


@dataclass(frozen=True)
class Backend(Typed):
    name: BackendName = BackendName.auto
    device: DeviceName = DeviceName.auto
    """The workers' devices. Over gloo, several workers may share a GPU."""
    timeout_seconds: float = 600.0
    """How long a collective waits for a worker before the run ends with an error."""


@dataclass(frozen=True)
class Run(Typed):
    dir: str | None = None
    """The run's folder; None: a new one under `root`."""
    name: str | None = None
    """Part of a new folder's name; None: the experiment, or model and data."""
    id: str | None = None
    """The folder's name; None: made from the time, the name, and torchrun's, SLURM's or a random id."""
    root: str = "runs"


class Direction(Enum):
    """Whether smaller or larger values of a metric are better."""

    minimize = "minimize"
    maximize = "maximize"


@dataclass(frozen=True)
class Sweep(Typed):
    metric: str = "eval/loss"
    """The metric that ranks a sweep's jobs."""
    direction: Direction = Direction.minimize
    target: float | None = None
    """The sweep reports the steps and examples until the metric reaches this value; None: it does not."""


@dataclass(frozen=True)
class Checkpoint(Typed):
    every_steps: Duration | None = None
    """Optimizer steps between checkpoints; None: by time alone. There is always one at the end."""
    every_seconds: float | None = 300.0
    """Seconds between checkpoints; None: by steps alone."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    best: str | None = None
    """An evaluation metric, such as eval/accuracy, whose best checkpoint is kept too; None: the newest alone."""
    direction: Direction = Direction.minimize
    """Whether smaller or larger values of `best` are better."""
    memory_every_steps: Duration | None = None
    """Optimizer steps between snapshots in the host's memory, for workers that restart there; None: none."""
    required: bool = False
    """End the run if a checkpoint cannot be written."""


@dataclass(frozen=True)
class Init(Typed):
    from_: str | None = None
    """`init.from`. Weights to start from: a .safetensors file, a run's folder or a checkpoint's; None: random ones."""
    strict: bool = True
    """False: names that only the file or only the model has are listed and skipped."""
    rename: dict[str, Any] = field(default_factory=dict)
    """Names in the file → names in the model; * stands for any part."""


@dataclass(frozen=True)
class EmaSettings(Typed):
    """The moving average of the weights; see `mbgd.EMA`."""

    decay: float | None = None
    """Share of the old average that an update keeps; None: no average."""
    every_steps: Duration = 1
    """Optimizer steps between updates of the average."""
    start: Duration = 0
    """Optimizer steps after which the average begins, as a copy of the parameters."""
    warmup_steps: Duration = 0
    """Optimizer steps in which the decay rises linearly from 0; 0: none."""
    power: float | None = None
    """Let the decay rise as 1 − (1 + t)^−power, t steps after the start, up to `decay`; None: at once."""
    evaluate: bool = True
    """Evaluate the average as well, as eval/ema/…."""


@dataclass(frozen=True)
class EarlyStoppingSettings(Typed):
    """When an evaluation ends training; see `mbgd.EarlyStopping`."""

    patience: int | None = None
    """Evaluations in a row without an improvement that end training; None: training is not stopped early."""
    metric: str = "eval/loss"
    min_delta: float = 0.0
    """The least improvement that counts."""
    direction: Direction = Direction.minimize
    load_best: bool = False
    """End with the weights of the best evaluation, not with those of the last step."""


@dataclass(frozen=True)
class HistogramSettings(Typed):
    """Histograms of gradients and parameters by layer; see `mbgd.Histograms`."""

    steps: int | None = None
    """At how many steps, evenly spread from the first to the last; None: none."""
    layers: int = 16
    """Most layers; where there are more, neighbours are put together."""


@dataclass(frozen=True)
class PredictionSettings(Typed):
    """Predictions of a few evaluation examples; see `mbgd.ShownPredictions`."""

    examples: int | None = None
    """The first examples of the evaluation set to keep; None: none."""


@dataclass(frozen=True)
class Unfreeze(Typed):
    at: Duration | None = None
    """Optimizer steps after which the parameters of `freeze` are trained; None: never."""


@dataclass(frozen=True)
class Resume(Typed):
    from_: str = "auto"
    """`resume.from`. auto: resume from the run's own folder; never: start anew; or the path of another run or
    checkpoint to resume from."""
    force: bool = False
    """Resume even if settings have changed that must match."""


class WandbMode(Enum):
    auto = "auto"  # online if there is an API key, otherwise offline; WANDB_MODE takes precedence
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
    """W&B shows runs of the same group together, such as a sweep's."""
    name: str | None = None
    """The run's name in W&B; None: its folder's name."""
    tags: list[str] = field(default_factory=list)
    log_checkpoints: bool = False
    """Upload the last and the best checkpoint at the end."""
    init_timeout_seconds: float = 30.0
    """How long to wait for the server's answer at the start before the run goes on offline."""
    finish_seconds: float = 20.0
    """How long to wait for uploads after training."""


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
    """The whole configuration of `train.py`. Fields of type Any are nodes with a `_target_`."""

    backend: Backend = field(default_factory=Backend)
    run: Run = field(default_factory=Run)
    sweep: Sweep = field(default_factory=Sweep)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    init: Init = field(default_factory=Init, metadata=MUST_MATCH)
    resume: Resume = field(default_factory=Resume)
    recovery: Recovery = Recovery.restart
    """What becomes of the other workers when one is lost."""
    ema: EmaSettings = field(default_factory=EmaSettings, metadata=MUST_MATCH)
    early_stopping: EarlyStoppingSettings = field(default_factory=EarlyStoppingSettings, metadata=MUST_MATCH)
    freeze: list[str] = field(default_factory=list, metadata=MUST_MATCH)
    """Patterns of the names of parameters that are not trained."""
    unfreeze: Unfreeze = field(default_factory=Unfreeze, metadata=MUST_MATCH)
    histograms: HistogramSettings = field(default_factory=HistogramSettings)
    predictions: PredictionSettings = field(default_factory=PredictionSettings)
    observers: dict[str, Any] = field(default_factory=dict, metadata=MUST_MATCH)
    """Observers by name, called after each step and evaluation."""
    profile: str | None = None
    """Optimizer steps to trace with the profiler, counted from 1, such as steps:10-20; None: none."""
    data: Any = None
    model: Any = field(default=None, metadata=MUST_MATCH)
    objective: Any = field(default=None, metadata=MUST_MATCH)
    optimizer: Any = field(default=None, metadata=MUST_MATCH)
