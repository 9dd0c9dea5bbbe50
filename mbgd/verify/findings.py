"""What looking at a model, its objective and its data has shown, in words."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from mbgd.checks.finite import shown


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


def wrong(kind: str, what: str, remedy: str) -> Finding:
    return Finding(kind, Severity.wrong, what, remedy)


def note(kind: str, what: str, remedy: str) -> Finding:
    return Finding(kind, Severity.note, what, remedy)


def batch_norm(names: Sequence[str]) -> Finding:
    return wrong(
        "batch_norm",
        f"BatchNorm in training mode ({shown(names)}): each example's loss depends on the others in its micro-batch, "
        "so the result depends on how the minibatch is cut.",
        "Use GroupNorm or LayerNorm, freeze the statistics (module.eval()), or accept it: fewer workers and larger "
        "micro-batches come nearer to the whole minibatch.",
    )


def unkeyed(losses: Sequence[float]) -> Finding:
    return wrong(
        "unkeyed_randomness",
        f"The same examples under the same key gave the losses {losses[0]:.9g} and {losses[1]:.9g}: model or objective "
        "draws from a generator of its own, or keeps state between calls.",
        "Draw from torch's default generators, which are keyed by (seed, step, micro-batch).",
    )


def seeded(losses: Sequence[float]) -> Finding:
    return wrong(
        "unkeyed_randomness",
        f"One example at several places of a batch has the losses {min(losses):.9g} to {max(losses):.9g}, whatever the "
        "key: model or objective draws from a generator that it seeds itself.",
        "Draw from torch's default generators, which are keyed by (seed, step, micro-batch).",
    )


def keyed(names: Sequence[str]) -> Finding:
    where = f" ({shown(names)})" if names else ""
    return note(
        "keyed_randomness",
        f"The model draws random numbers{where}, keyed by (seed, step, micro-batch): compared with the same draws, "
        "micro-batch by micro-batch.",
        "Nothing. With another micro-batch size the draws are others.",
    )


def reduced(factor: float | None, size: int) -> Finding:
    if factor is None:
        what = f"In a batch of {size} all examples have one and the same loss, although alone they have not"
    else:
        what = f"In a batch of {size} each example's loss is {factor:.4g} times its loss alone"
    return wrong(
        "reduced_loss",
        f"{what}: the objective averages or adds up itself.",
        "Return one unreduced loss per example (reduction='none', no mean, no division by the batch's size); the "
        "trainer does the averaging.",
    )


def coupled(alone: float, together: float) -> Finding:
    return wrong(
        "coupled_losses",
        f"An example's loss depends on the other examples of its batch ({alone:.6g} with some, {together:.6g} with "
        "others), as with in-batch negatives or statistics of the batch.",
        "No cut of the minibatch can give the same then. Take negatives from outside the batch (a queue, a fixed set), "
        "or train on one worker with one micro-batch.",
    )


def coupled_gradients() -> Finding:
    return wrong(
        "coupled_gradients",
        "The gradient of an example's loss depends on the other examples of its batch, although the loss does not.",
        "Look for a backward or a hook of your own that works over the batch's dimension.",
    )


def of_worker(rank: int, mine: float, theirs: float) -> Finding:
    return wrong(
        "depends_on_worker",
        f"The same examples, parameters and key gave the loss {theirs:.9g} on worker {rank} and {mine:.9g} on worker "
        "0: something in the model or the objective depends on the worker, such as a seed made from the rank.",
        "Draw from torch's default generators and do not use the rank; see to it that the hosts' versions are alike.",
    )


def other_examples(rank: int, step: int) -> Finding:
    return wrong(
        "data_depends_on_worker",
        f"Worker {rank} reads other examples than worker 0 under the same numbers (seen in step {step + 1}): the "
        "dataset depends on the worker, or the hosts' files differ.",
        "Let the dataset depend on the index alone; compare the files.",
    )


def wrong_positions(step: int) -> Finding:
    return wrong(
        "examples_not_once",
        f"The workers did not compute every example of step {step + 1} exactly once.",
        "This is a fault of mbgd's plan or of a plan of your own.",
    )


def replicas(step: int) -> Finding:
    return wrong(
        "replicas_differ",
        f"After step {step + 1} the workers' parameters are not the same bits.",
        "Look for code that changes parameters and depends on the rank; then for faulty memory.",
    )


def mean_of_means() -> Finding:
    return wrong(
        "mean_of_means",
        "The gradient is the mean of the workers' own means: workers with fewer examples or tokens count too much.",
        "Add up gradients over workers and divide once, by the whole minibatch's weight.",
    )


def scaled(factor: float) -> Finding:
    return wrong(
        "scaled",
        f"The gradient points the right way, but is {factor:.6g} times as long as it should be: a division is missing, "
        "or made twice.",
        "Divide once, by the whole minibatch's weight; do not divide losses by workers or accumulation steps.",
    )


def wrong_update(step: int, error: float) -> Finding:
    return wrong(
        "update",
        f"With the same gradient the optimizer alone changes the parameters otherwise in step {step + 1} (relative "
        f"difference {error:.2g}).",
        "Look for what changes parameters or gradients between averaging and optimizer.",
    )


def detached(names: Sequence[str]) -> Finding:
    return wrong(
        "detached",
        f"The loss depends on {shown(names)}, but no gradient reaches them: a part is cut off by detach(), no_grad(), "
        ".data, .item() or numpy, and is not trained.",
        "Take the cut away; if it is meant, set requires_grad=False there.",
    )


def partly_detached(names: Sequence[str]) -> Finding:
    return note(
        "gradient_is_not_the_derivative",
        f"The gradient of {shown(names)} is not the derivative of the loss as finite differences measure it: part of "
        "their use is detached, or a backward of your own is not that of its forward.",
        "Nothing, if it is meant (stop-gradient, straight-through); otherwise correct it.",
    )


def unused(names: Sequence[str]) -> Finding:
    return note(
        "unused_parameters",
        f"The loss does not depend on {shown(names)}; the optimizer holds them.",
        "Nothing, if they are used later on; otherwise set requires_grad=False.",
    )


def not_held(names: Sequence[str]) -> Finding:
    return note(
        "not_in_optimizer",
        f"{shown(names)} require a gradient, but the optimizer does not hold them: they are not trained.",
        "Give them to the optimizer, or set requires_grad=False.",
    )


def moving(names: Sequence[str]) -> Finding:
    return note(
        "moving_buffers",
        f"Forwards change the buffers {shown(names)}; each is averaged over the minibatch's micro-batches.",
        "Nothing.",
    )


def hooks(names: Sequence[str]) -> Finding:
    return note(
        "hooks",
        f"Hooks on {shown(names)} are called once a step, with the mean gradient; what is compared is the gradient "
        "before them.",
        "Nothing.",
    )


def nondeterministic(operations: Sequence[str]) -> Finding:
    return note(
        "nondeterministic",
        f"torch has no deterministic version of {shown(operations)} here: two runs may differ in the last bits.",
        "Replace them where the same bits are wanted (averaging=reproducible refuses them).",
    )


def autocast(precision: str) -> Finding:
    return note(
        "autocast",
        f"precision={precision} computes the forward in 16 bits (autocast): its rounding is far above float32's.",
        "Compare it with `one worker` in the table, which rounds likewise.",
    )


def overflow(step: int) -> Finding:
    return note(
        "overflow",
        f"The gradients of step {step + 1} overflowed in fp16; the trainer skips such a step and lowers its scale.",
        "Take more steps (--steps) to compare those that follow.",
    )


def not_alone(reason: str) -> Finding:
    return note(
        "not_alone",
        f"The model does not take an example alone ({reason}), so losses alone and in a batch were not compared.",
        "Nothing; the other comparisons were made.",
    )
