"""Knowledge distillation: a frozen teacher's probabilities as further targets (Hinton et al. 2015)."""

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mbgd.errors import UsageError
from mbgd.task.losses import CrossEntropy
from mbgd.task.objective import PerExample
from mbgd.workers.messages import bytes_of

MODEL = "model.safetensors"
"""The file in a run's folder that holds its weights."""


class Distillation(CrossEntropy):
    """hard_weight · cross-entropy + (1 − hard_weight) · T² · KL(teacher ‖ model), for each example or token.

    Both distributions are softmax(logits / T). Inputs, targets, layouts, ignored targets and class weights are those of
    `CrossEntropy`; a weight multiplies both parts. The teacher computes in evaluation mode and without gradients. It is
    no part of the model: not trained, not in the optimizer, not saved and not exported.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        weights: str | Path | None = None,
        temperature: float = 2.0,
        hard_weight: float = 0.5,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
        class_dim: int | None = None,
    ) -> None:
        """weights: the teacher's, a .safetensors file or a run's folder; None: those it has."""
        super().__init__(
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            class_weights=class_weights,
            class_dim=class_dim,
        )
        if not isinstance(teacher, nn.Module):
            raise UsageError(f"teacher is a {type(teacher).__name__}; it must be a torch.nn.Module.")
        if not 0.0 < temperature < math.inf:
            raise UsageError(f"temperature={temperature}; it must be a finite number > 0.")
        if not 0.0 <= hard_weight <= 1.0:
            raise UsageError(f"hard_weight={hard_weight}; it must lie between 0 (the teacher alone) and 1.")
        if weights is not None:
            _load(teacher, Path(weights))
        self.temperature, self.hard_weight = float(temperature), float(hard_weight)
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_sha256 = _sha256(teacher)
        """Compared between workers, whose teachers must be equal."""
        self._kind: tuple[torch.device, torch.dtype] | None = None

    def __call__(self, model: nn.Module, batch: Any) -> PerExample:
        inputs, targets = batch
        logits = model(inputs)
        hard = super().__call__(_Given(logits), batch)
        students, teachers = (self.classes_last(one, targets) for one in (logits, self._of_teacher(model, inputs)))
        if students.shape != teachers.shape:
            raise UsageError(
                f"the teacher gives {teachers.shape[-1]} classes and the model {students.shape[-1]}; their outputs "
                "must be logits of the same classes."
            )
        dtype = torch.promote_types(students.dtype, torch.float32)
        of_student, of_teacher = (
            F.log_softmax(one.to(dtype) / self.temperature, dim=-1) for one in (students, teachers)
        )
        soft = F.kl_div(of_student, of_teacher, reduction="none", log_target=True).sum(-1) * self.temperature**2
        losses = self.hard_weight * hard.losses + (1 - self.hard_weight) * soft
        agreement = partial(_agree, students.detach(), teachers)
        return PerExample(losses, hard.weights, {**hard.metrics, "agreement": agreement}, hard.predictions)

    def _of_teacher(self, model: nn.Module, inputs: Any) -> Tensor:
        one = next(model.parameters())
        if self._kind != (one.device, one.dtype):
            if not {id(p) for p in model.parameters()}.isdisjoint(map(id, self.teacher.parameters())):
                raise UsageError(
                    "the teacher has parameters of the model; it must be a module of its own, or it would be trained. "
                    "Give the objective a copy: copy.deepcopy(model)."
                )
            with torch.inference_mode(mode=False):  # an evaluation may come first
                self.teacher.to(one.device, one.dtype)
            self._kind = one.device, one.dtype
        self.teacher.eval()
        with torch.no_grad():
            logits: Tensor = self.teacher(inputs)
        return logits


class _Given(nn.Module):
    """A model that has computed already."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, inputs: Any) -> Tensor:
        return self._outputs


def _agree(students: Tensor, teachers: Tensor) -> Tensor:
    """Whether the model's most probable class is the teacher's."""
    return students.argmax(-1) == teachers.argmax(-1)


def _load(teacher: nn.Module, path: Path) -> None:
    file = path / MODEL if path.is_dir() else path
    try:
        given = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"the teacher's weights {file} cannot be read ({error}). Name a .safetensors file, or the folder of a "
            "complete run."
        ) from error
    try:
        teacher.load_state_dict(given)
    except RuntimeError as error:
        raise UsageError(
            f"the weights {file} do not fit the teacher: {error}. Give the teacher the class and arguments that the "
            "weights were trained with."
        ) from error


def _sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(bytes_of(tensor).cpu().numpy().data)
    return digest.hexdigest()
