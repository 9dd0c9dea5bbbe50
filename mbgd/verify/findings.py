"""What looking at a model, its objective and its data has shown, in words: one entry for each kind of finding."""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from mbgd.text.listing import shown


class Severity(Enum):
    wrong = "wrong"
    """The update is not the gradient of the mean loss of the minibatch, or not the same on every worker."""
    note = "note"


@dataclass(frozen=True)
class Finding:
    kind: str
    severity: Severity
    what: str
    remedy: str

    def values(self) -> dict[str, Any]:
        return {**asdict(self), "severity": self.severity.value}


@dataclass(frozen=True)
class Kind:
    """Called with what was seen, it gives the finding."""

    severity: Severity
    name: str
    what: str
    """With places for what was seen, in the syntax of `str.format`."""
    remedy: str

    def __call__(self, **seen: object) -> Finding:
        """seen: the value of each place, by name; a list of names is joined."""
        texts = {key: shown(value) if isinstance(value, list) else value for key, value in seen.items()}
        return Finding(self.name, self.severity, self.what.format(**texts), self.remedy)


WRONG, NOTE = Severity.wrong, Severity.note

# Losses

batch_norm = Kind(
    WRONG,
    "batch_norm",
    "BatchNorm in training mode ({names}): each example's loss depends on the others in its micro-batch, "
    "so the result depends on how the minibatch is cut.",
    "Set batch_norm=minibatch: the statistics are then those of the whole minibatch. Or use GroupNorm or LayerNorm, or "
    "freeze the statistics (module.eval()).",
)
minibatch_norm = Kind(
    NOTE,
    "minibatch_norm",
    "BatchNorm in training mode ({names}) uses the statistics of the whole minibatch (batch_norm=minibatch): each "
    "example's loss depends on the others, but not on how the minibatch is cut.",
    "Nothing.",
)
unkeyed = Kind(
    WRONG,
    "unkeyed_randomness",
    "The same examples under the same key gave the losses {first:.9g} and {again:.9g}: model or objective draws from a "
    "generator of its own, or keeps state between calls.",
    "Draw from torch's default generators, which are keyed by (seed, step, micro-batch).",
)
seeded = Kind(
    WRONG,
    "unkeyed_randomness",
    "One example at several places of a batch has the losses {least:.9g} to {greatest:.9g}, whatever the key: model or "
    "objective draws from a generator that it seeds itself.",
    "Draw from torch's default generators, which are keyed by (seed, step, micro-batch).",
)
keyed = Kind(
    NOTE,
    "keyed_randomness",
    "The model draws random numbers{where}, keyed by (seed, step, micro-batch): compared with the same draws, "
    "micro-batch by micro-batch.",
    "Nothing. With another micro-batch size the draws are others.",
)
reduced = Kind(
    WRONG,
    "reduced_loss",
    "In a batch of {size} {losses}: the objective averages or adds up itself.",
    "Return one unreduced loss per example (reduction='none', no mean, no division by the batch's size); the trainer "
    "does the averaging.",
)
coupled = Kind(
    WRONG,
    "coupled_losses",
    "An example's loss depends on the other examples of its batch ({alone:.6g} with some, {together:.6g} with others), "
    "as with in-batch negatives or statistics of the batch.",
    "Make the objective a pair of methods, encode(model, batch) and losses(*encodings); the latter gets the encodings "
    "of the whole minibatch, so that any cut is exact (docs/coupled_losses.md). Or take negatives from elsewhere.",
)
coupled_encodings = Kind(
    WRONG,
    "coupled_encodings",
    "What encode returns for an example depends on the other examples of its batch ({alone:.6g} with some, "
    "{together:.6g} with others): encode sees one micro-batch, so the result depends on how the minibatch is cut.",
    "Let encode compute each example by itself; what looks at several examples belongs in losses, which gets the whole "
    "minibatch's encodings.",
)
coupled_gradients = Kind(
    WRONG,
    "coupled_gradients",
    "The gradient of an example's loss depends on the other examples of its batch, although the loss does not.",
    "Look for a backward or a hook of your own that works over the batch's dimension.",
)
not_alone = Kind(
    NOTE,
    "not_alone",
    "The model does not take an example alone ({reason}), so losses alone and in a batch were not compared.",
    "Nothing; the other comparisons were made.",
)

# Parameters and their gradients

detached = Kind(
    WRONG,
    "detached",
    "The loss depends on {names}, but no gradient reaches them: a part is cut off by detach(), no_grad(), .data, "
    ".item() or numpy, and is not trained.",
    "Take the cut away; if it is meant, set requires_grad=False there.",
)
partly_detached = Kind(
    NOTE,
    "gradient_is_not_the_derivative",
    "The gradient of {names} is not the derivative of the loss as finite differences measure it: part of their use is "
    "detached, or a backward of your own is not that of its forward.",
    "Nothing, if it is meant (stop-gradient, straight-through); otherwise correct it.",
)
unused = Kind(
    NOTE,
    "unused_parameters",
    "The loss does not depend on {names}; the optimizer holds them.",
    "Nothing, if they are used later on; otherwise set requires_grad=False.",
)
not_held = Kind(
    NOTE,
    "not_in_optimizer",
    "{names} require a gradient, but the optimizer does not hold them: they are not trained.",
    "Give them to the optimizer, or set requires_grad=False.",
)
moving = Kind(
    NOTE,
    "moving_buffers",
    "Forwards change the buffers {names}; each is averaged over the minibatch's micro-batches.",
    "Nothing.",
)
hooks = Kind(
    NOTE,
    "hooks",
    "Hooks on {names} are called once a step, with the mean gradient; what is compared is the gradient before them.",
    "Nothing.",
)

# Arithmetic

nondeterministic = Kind(
    NOTE,
    "nondeterministic",
    "torch has no deterministic version of {operations} here: two runs may differ in the last bits.",
    "Replace them where the same bits are wanted (averaging=reproducible refuses them).",
)
autocast = Kind(
    NOTE,
    "autocast",
    "precision={precision} computes the forward in 16 bits (autocast): its rounding is far above float32's.",
    "Compare it with `one worker` in the table, which rounds likewise.",
)
overflow = Kind(
    NOTE,
    "overflow",
    "The gradients of step {step} overflowed in fp16; the trainer skips such a step and lowers its scale.",
    "Take more steps (--steps) to compare those that follow.",
)

# Workers and their steps

of_worker = Kind(
    WRONG,
    "depends_on_worker",
    "The same examples, parameters and key gave the loss {theirs:.9g} on worker {rank} and {mine:.9g} on worker 0: "
    "something in the model or the objective depends on the worker, such as a seed made from the rank.",
    "Draw from torch's default generators and do not use the rank; see to it that the hosts' versions are alike.",
)
other_examples = Kind(
    WRONG,
    "data_depends_on_worker",
    "Worker {rank} reads other examples than worker 0 under the same numbers (seen in step {step}): the dataset "
    "depends on the worker, or the hosts' files differ.",
    "Let the dataset depend on the index alone; compare the files.",
)
wrong_positions = Kind(
    WRONG,
    "examples_not_once",
    "The workers did not compute every example of step {step} exactly once.",
    "This is a fault of mbgd's plan or of a plan of your own.",
)
replicas = Kind(
    WRONG,
    "replicas_differ",
    "After step {step} the workers' parameters are not the same bits.",
    "Look for code that changes parameters and depends on the rank; then for faulty memory.",
)
mean_of_means = Kind(
    WRONG,
    "mean_of_means",
    "The gradient is the mean of the workers' own means: workers with fewer examples or tokens count too much.",
    "Add up gradients over workers and divide once, by the whole minibatch's weight.",
)
scaled = Kind(
    WRONG,
    "scaled",
    "The gradient points the right way, but is {factor:.6g} times as long as it should be: a division is missing, or "
    "made twice.",
    "Divide once, by the whole minibatch's weight; do not divide losses by workers or accumulation steps.",
)
wrong_update = Kind(
    WRONG,
    "update",
    "With the same gradient the optimizer alone changes the parameters otherwise in step {step} (relative difference "
    "{error:.2g}).",
    "Look for what changes parameters or gradients between averaging and optimizer.",
)
