"""The trainer's own losses and findings, and whether all workers agree on them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mbgd.batches.describing import content
from mbgd.batches.loader import Examples
from mbgd.batches.plan import MicroBatch
from mbgd.batches.randomness import key_generators
from mbgd.batches.reading import Indices, read
from mbgd.config import Precision
from mbgd.task.objective import PerExample
from mbgd.task.precision import parameter_dtype
from mbgd.trainer import Trainer
from mbgd.verify import findings
from mbgd.verify.findings import Finding

NUM_EXAMPLES = 8
SAME = 1e-5
"""Relative difference up to which losses count as equal; models may compute partly in float32."""


def read_examples(trainer: Trainer, indices: Indices, precision: Precision) -> Examples:
    """Examples by number, read as in evaluations."""
    device, dtype = trainer.setup.workers.device, parameter_dtype(precision)
    data, seed = trainer.setup.data, trainer.setup.settings.seed
    how: dict[str, Any] = {"num_workers": 0, "device": device, "dtype": dtype, "seed": seed}
    (batch,) = read(data.train, [indices], collate=data.collate, **how)
    return Examples(MicroBatch(0, 1, 0, len(indices)), batch)


def losses_here(trainer: Trainer, indices: Indices) -> dict[str, Any]:
    """The first examples' losses on this worker's model; every worker should have the same."""
    examples = read_examples(trainer, indices[:NUM_EXAMPLES], trainer.setup.settings.precision)
    trainer.setup.buffers.put_back()
    key_generators(trainer.setup.workers.device, trainer.setup.settings.seed)
    with torch.no_grad(), trainer.train_step.autocast:
        terms = trainer.setup.task(examples.batch, examples.micro_batch.size)
    trainer.setup.buffers.put_back()
    return {"losses": [float(loss) for loss in of_each(terms)], "examples": content(examples.batch)}


def look_at_trainer(trainer: Trainer) -> Iterator[Finding]:
    """Findings that the trainer already knows."""
    if names := trainer.setup.trained.not_held:
        yield findings.not_held(names=names)
    if names := list(trainer.setup.findings.moving_buffers):
        yield findings.moving(names=names)
    hooked = [
        name
        for name, p in trainer.setup.trained.by_name.items()
        if any(not getattr(hook, "is_averaging_hook", False) for hook in (p._backward_hooks or {}).values())
        or any(
            not getattr(hook, "is_averaging_hook", False)
            for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
        )
    ]
    if hooked:
        yield findings.hooks(names=hooked)
    if trainer.setup.settings.precision in (Precision.bf16, Precision.bf16_true, Precision.fp16):
        yield findings.autocast(precision=trainer.setup.settings.precision.value)


def compare_workers(of_workers: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Findings from the results of `losses_here`, by rank."""
    main, *others = of_workers
    mine = torch.tensor(main["losses"], dtype=torch.float64)
    for rank, other in enumerate(others, start=1):
        if other["examples"] != main["examples"]:
            return [findings.other_examples(rank=rank, step=1)]
        theirs = torch.tensor(other["losses"], dtype=torch.float64)
        if not same(mine, theirs):
            number = int((mine - theirs).abs().nan_to_num().argmax())
            return [findings.of_worker(rank=rank, mine=mine[number].item(), theirs=theirs[number].item())]
    return []


def of_each(terms: PerExample) -> Tensor:
    """One float64 per example: Σ w L over its elements."""
    losses = terms.losses.double()
    if terms.weights is not None:
        losses = torch.where(terms.weights != 0, losses, 0.0) * terms.weights.double()
    return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b.expand_as(a), rtol=SAME, atol=SAME * 1e-3, equal_nan=True))
