"""Predictions of a few evaluation examples, as people can look at them: images with their classes, texts."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mbgd.config import CompileName
from mbgd.data.pictures import pictures
from mbgd.data.text import END_OF_DOCUMENT, VOCABULARY
from mbgd.errors import UsageError, optional
from mbgd.files.observed import PREDICTIONS, Example, Guess, PredictionLine, Token, plain_values
from mbgd.task.objective import PerExample

MOST_EXAMPLES = 32
MOST_PIXELS = 48
"""Height and width beyond which an image is made smaller; as PNG it has at most 7 KB."""
GUESSES = 3
TOKENS = 64
"""The last tokens of a text, each with its prediction."""
CHARACTERS_BEFORE = 80
END = "<end>"
"""Of a document, as a token; its other tokens are bytes, shown as characters."""


class ShownPredictions:
    """Writes the predictions for the first evaluation examples into observed/predictions.jsonl.

    The examples are images, or texts of bytes (data=text); the objective gives the predictions, as for metrics of the
    whole set. A line is written after the evaluations 1, 2, 4, 8 …, and after the last, so that long runs have few.
    The main worker alone computes them; if it fails, the run goes on without.
    """

    name = PREDICTIONS

    def __init__(self, examples: int = 8) -> None:
        """examples: at most this many, of the first evaluation set."""
        if not 1 <= examples <= MOST_EXAMPLES:
            raise UsageError(
                f"predictions.examples={examples}; it must be from 1 to {MOST_EXAMPLES}, or null for none."
            )
        self.examples = examples
        self._trainer: Any = None
        self._evaluated_at, self._written_at = -1, -1
        self._write: Callable[[int, Mapping[str, Any]], None] = lambda step, values: None

    def before_training(self, trainer: Any) -> None:
        """UsageError, the same on every worker, where there is nothing to show."""
        self._trainer = trainer
        self._shown()

    def with_writer(self, write: Callable[[int, Mapping[str, Any]], None]) -> None:
        self._write = write

    def after_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._evaluated_at = step
        number = self._trainer.evaluations.number(step)
        if number & (number - 1) == 0 or step == self._trainer.setup.num_steps:
            self._take(step)

    def at_end(self) -> None:
        if self._evaluated_at > self._written_at:  # training was stopped early
            self._take(self._evaluated_at)

    def _take(self, step: int) -> None:
        self._written_at = step
        if self._trainer.setup.workers.is_main:
            with optional("the predictions for the first evaluation examples failed", "Training goes on."):
                self._write(step, plain_values(PredictionLine(step, self._shown(), self._evaluator.name)))

    @property
    def _evaluator(self) -> Any:
        evaluators = self._trainer.evaluations.by_name
        if not evaluators:
            raise UsageError(
                f"predictions.examples={self.examples}, but there is no evaluation dataset. Give data.evaluation, or "
                "predictions.examples=null."
            )
        return next(iter(evaluators.values()))

    def _shown(self) -> list[Example]:
        """The examples; UsageError if they cannot be shown."""
        evaluator, is_compiled = self._evaluator, self._trainer.setup.settings.compile is not CompileName.none
        with _uncompiled() if is_compiled else nullcontext():  # no compilation for a micro-batch of this size
            batch, terms = evaluator.first(self.examples)
        outputs, targets = _predictions(terms, self.examples)
        size = len(targets)
        if _are_texts(outputs, targets, evaluator.dataset):
            return [_text(*one) for one in zip(batch[0], outputs, targets, strict=True)]
        drawn = pictures(batch, evaluator.dataset, size, MOST_PIXELS)
        if not all(picture.png for picture in drawn) or not _are_alike(outputs, targets):
            raise UsageError(
                f"predictions.examples={self.examples}: the evaluation examples cannot be shown. They must be images "
                "with one target each, (N, C, H, W) with 1 or 3 channels or (N, H, W), or texts of data=text; outputs "
                f"have shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}. Set predictions.examples=null."
            )
        names = getattr(evaluator.dataset, "classes", ())
        return [
            Example(picture.png, _target(target, outputs, names), _guesses(output, names))
            for picture, output, target in zip(drawn, outputs, targets, strict=True)
        ]


def _uncompiled() -> AbstractContextManager[None]:
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _predictions(terms: PerExample, examples: int) -> tuple[Tensor, Tensor]:
    """Outputs and targets on the host, for one forward of a few examples."""
    given = terms.whole_predictions()
    if given is None:
        raise UsageError(
            f"predictions.examples={examples}, but the objective gives no predictions. Let it return "
            "PerExample(…, predictions=(outputs, targets)), or set predictions.examples=null."
        )
    outputs, targets = (one.cpu() for one in given)
    return outputs, targets


def _are_texts(outputs: Tensor, targets: Tensor, dataset: Any) -> bool:
    is_of_bytes = getattr(dataset, "vocabulary", None) == VOCABULARY
    return is_of_bytes and targets.dim() == 2 and outputs.shape == (*targets.shape, VOCABULARY)


def _are_alike(outputs: Tensor, targets: Tensor) -> bool:
    """Whether each example has one class of several, or one value."""
    is_of_classes = targets.dim() == 1 and outputs.dim() == 2 and not targets.is_floating_point()
    return is_of_classes or outputs.numel() == targets.numel() == len(targets)


def _target(target: Tensor, outputs: Tensor, names: Any) -> str:
    return _label(int(target), names) if outputs.dim() == 2 and outputs.shape[1] > 1 else f"{target.item():.4g}"


def _guesses(output: Tensor, names: Any) -> list[Guess]:
    """The most probable classes, or the one value."""
    if output.numel() == 1:
        return [Guess(f"{output.item():.4g}")]
    values, classes = output.topk(min(GUESSES, len(output)))
    probabilities = values.tolist() if _is_distribution(output) else [None] * len(classes)
    return [
        Guess(_label(one, names), None if probability is None else round(probability, 4))
        for one, probability in zip(classes.tolist(), probabilities, strict=True)
    ]


def _is_distribution(output: Tensor) -> bool:
    return bool((output >= 0).all()) and abs(float(output.double().sum()) - 1) < 1e-3


def _label(number: int, names: Any) -> str:
    return str(names[number]) if 0 <= number < len(names) else str(number)


def _text(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Example:
    """The last tokens of a text and their predictions."""
    counted = int(((targets >= 0) & (targets < VOCABULARY)).sum())  # the rest of a document's last window is filled up
    first = max(0, counted - TOKENS)
    before = bytes(token for token in inputs[: first + 1].tolist() if token < END_OF_DOCUMENT).decode(errors="replace")
    rows = zip(outputs[first:counted], targets[first:counted].tolist(), strict=True)
    tokens = [Token(_token(target), _token(int(row.argmax())), round(float(row[target]), 4)) for row, target in rows]
    return Example(text=before[-CHARACTERS_BEFORE:], tokens=tokens)


def _token(token: int) -> str:
    return END if token == END_OF_DOCUMENT else bytes([token]).decode(errors="replace")
