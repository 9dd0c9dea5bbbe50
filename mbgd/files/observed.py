"""What observers write into a run's folder: `observed/NAME.jsonl`, one JSON object a line, each with its step.

The formats of those that ship, for the code that writes them and the code that reads them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from mbgd.files.lines import BadLine, lines_of
from mbgd.files.reading import Unreadable, convert, parse_json
from mbgd.files.run_files import OBSERVED, Count

HISTOGRAMS, PREDICTIONS = "histograms", "predictions"

Line = TypeVar("Line", "HistogramLine", "PredictionLine")


class Histogram(msgspec.Struct):
    """How the values of a tensor are spread over powers of two. Values of 2^24 or more are in `size` alone."""

    size: Count
    """The number of values."""
    zero: Count
    """Those below 2^-48 in magnitude."""
    low: Annotated[int, msgspec.Meta(ge=-100, le=100)] = 0
    """`negative[i]` and `positive[i]` count the values of that sign from 2^(low + i) up to below 2^(low + i + 1) in
    magnitude; both lists have the same length."""
    negative: Annotated[list[Count], msgspec.Meta(max_length=200)] = []
    positive: Annotated[list[Count], msgspec.Meta(max_length=200)] = []

    def counts_and_edges(self) -> tuple[list[int], list[float]]:
        """n counts and n + 1 edges, from the lowest value to the highest; the bin around 0 has those of `zero`."""
        edges = [2.0 ** (self.low + number) for number in range(len(self.positive) + 1)]
        return [*reversed(self.negative), self.zero, *self.positive], [*(-one for one in reversed(edges)), *edges]


class Layer(msgspec.Struct, omit_defaults=True):
    name: str
    parameters: Histogram
    gradients: Histogram | None = None
    """None where the layer had no gradient in this step."""


class HistogramLine(msgspec.Struct):
    """A line of histograms.jsonl."""

    step: Count
    """Number of steps completed: the parameters after it, and the gradient that made it."""
    layers: list[Layer]


class Guess(msgspec.Struct, omit_defaults=True):
    label: str
    probability: float | None = None
    """None where the model gives none."""


class Token(msgspec.Struct):
    target: str
    predicted: str
    """The most probable token, given those before the target."""
    probability: float | None = None
    """What the model gave to the target."""


class Example(msgspec.Struct, omit_defaults=True):
    """An evaluation example: an image with its target, or a text with its last tokens."""

    png: Annotated[str, msgspec.Meta(pattern="^(data:image/png;base64,[A-Za-z0-9+/]+={0,2})?$")] = ""
    """The image, as a data URI."""
    target: str = ""
    predicted: list[Guess] = []
    """Most probable first."""
    text: str = ""
    """What comes before the tokens."""
    tokens: list[Token] = []


class PredictionLine(msgspec.Struct, omit_defaults=True):
    """A line of predictions.jsonl."""

    step: Count
    examples: list[Example]
    set: str = ""
    """The evaluation set that the examples are of; empty where there is only one."""


def by_name(line: HistogramLine) -> Iterator[tuple[str, Histogram]]:
    """The histograms of a line by names such as gradients/LAYER, as other programs show them."""
    for layer in line.layers:
        yield f"parameters/{layer.name}", layer.parameters
        if layer.gradients is not None:
            yield f"gradients/{layer.name}", layer.gradients


def step_of(content: bytes) -> int:
    """The step of a line of any observer's; ValueError says what is wrong with it."""
    values = parse_json(content)
    if not isinstance(values, dict) or "step" not in values:
        raise ValueError("it is not an object with a step")
    step: int = convert(values["step"], Count)
    return step


def read(folder: Path, name: str, kind: type[Line]) -> tuple[list[Line], str]:
    """(the lines that can be read, what is wrong with the others; empty if nothing) of a run's folder."""
    good, problem = [], ""
    try:
        for line in lines_of(folder / OBSERVED / f"{name}.jsonl", lambda content: parsed(content, kind)):
            if isinstance(line, BadLine):
                problem = problem or f"line {line.number} cannot be read ({line.reason})"
            else:
                good.append(line.value)
    except FileNotFoundError:
        pass
    except Unreadable as error:
        problem = error.reason
    return good, problem and f"{OBSERVED}/{name}.jsonl: {problem}"


def parsed(content: bytes, kind: type[Line]) -> Line:
    """The line as this type; ValueError says what is wrong with it."""
    line = convert(parse_json(content), kind)
    if isinstance(line, HistogramLine):
        for layer in line.layers:
            for one in (layer.parameters, layer.gradients):
                if one is not None and len(one.negative) != len(one.positive):
                    raise ValueError(f"the histogram of {layer.name!r} has sides of different lengths")
    return line


def plain_values(line: Any) -> Any:
    """The line, or a part of it, as values that JSON can hold."""
    return msgspec.to_builtins(line)
