"""An explanation as terminal tables of 80 columns, with the page's numbers."""

import textwrap
from collections.abc import Iterator, Sequence

from mbgd.data.pictures import Picture
from mbgd.explain.explanation import Explanation, Share
from mbgd.text.escaping import plain
from mbgd.text.numbers import short

Rows = list[tuple[str, Sequence[float], float | None]]
"""Label, a value for each shown weight, and an extra value."""

WIDTH, LABEL = 80, 15
MOST_ROWS = 12
BAR = 30


def describe(it: Explanation, pictures: Sequence[Picture]) -> str:
    return "\n".join(line.rstrip() for line in _lines(it, pictures))


def number(value: float) -> str:
    """Four significant digits, at most ten characters; rounding noise as 0."""
    return f"{0.0 if abs(value) < 1e-13 else value:.4g}"


def _lines(it: Explanation, pictures: Sequence[Picture]) -> Iterator[str]:
    about = it.about
    yield from _text(
        f"One step of minibatch gradient descent: {about['model']} of {about['weights']} weights, {about['data']}, "
        f"{about['objective']}, {about['optimizer']}; a minibatch of {about['minibatch']}, in float64."
    )
    for one in it.notes:
        yield from _text(f"note: {one}")
    yield ""
    for n, weight in enumerate(it.weights, start=1):
        yield from _text(f"w{n} = {weight.name}")
    yield ""
    yield from _text(
        "1. Every example has a loss of its own, and that loss a gradient: how it changes with each weight."
    )
    rows: Rows = [(f"∇L of {n}", one.gradient, one.loss) for n, one in enumerate(it.examples, start=1)]
    yield from _table(it, rows, "loss")
    yield from _text(f"By {it.method}.")
    yield ""
    yield from _text("2. Their mean is the gradient of the mean loss, which one backward gives.")
    means, backward = [one.mean for one in it.weights], [one.backward for one in it.weights]
    yield from _table(it, [("mean of ∇L", means, None), ("backward", backward, it.mean_loss)], "loss")
    yield from _text(f"Over all {about['weights']} weights they differ by {it.difference:.1e} (relative).")
    yield ""
    yield from _text(
        f"3. Split over {len(it.shares)} workers: each adds up its own, the all-reduce adds up the workers' sums, and "
        f"one division by {short(it.total_weight)} makes the mean."
    )
    rows = [(_share(one), one.sums, one.weight) for one in it.shares]
    rows.append(("all-reduce Σ", it.total, it.total_weight))
    rows.append((f"Σ / {short(it.total_weight)}", [value / it.total_weight for value in it.total], None))
    yield from _table(it, rows, "weight")
    yield ""
    yield from _text(f"4. The optimizer's step ({about['optimizer']}).")
    changes = [one.after - one.before for one in it.weights]
    rows = [("before", [one.before for one in it.weights], None), ("change", changes, None)]
    yield from _table(it, [*rows, ("after", [one.after for one in it.weights], None)], "")
    yield ""
    yield from _opposite(it)
    yield from _variance(it)
    yield ""
    yield from _text("7. The next minibatch sees the new weights: example 1 before and after this step.")
    rows = [("∇L before", it.next.gradient_before, it.next.loss_before)]
    yield from _table(it, [*rows, ("∇L after", it.next.gradient_after, it.next.loss_after)], "loss")
    yield ""
    yield from _pull(it, pictures)


def _opposite(it: Explanation) -> Iterator[str]:
    if it.opposite is None:
        return
    yield from _text(
        "5. Losses of 2 and −2, by adding constants to the first two examples': the mean loss is "
        f"{number(it.opposite.mean_loss)}, the gradient is not 0. Weights follow gradients, not losses."
    )
    yield from _table(it, [("gradient", it.opposite.gradient, it.opposite.mean_loss)], "loss")
    yield ""


def _variance(it: Explanation) -> Iterator[str]:
    variance = it.variance
    yield from _text(
        "6. The variance of the mean gradient falls as 1/k with the minibatch's size k (measured, examples drawn at "
        "random; the line is the variance of one, divided by k)."
    )
    yield f"{'k':>5}  {'minibatches':>11}  {'measured':>10}  {'line':>10}  {'measured / line':>15}"
    for point in variance.points:
        line = variance.of_one / point.size
        ratio = point.variance / line if line else 1.0
        yield (
            f"{point.size:>5}  {point.num_minibatches:>11}  {number(point.variance):>10}  {number(line):>10}  "
            f"{ratio:>15.2f}"
        )
    if not variance.is_whole:
        yield from _text("There was no time for larger minibatches (--seconds).")
    scale = "without bound: the gradient itself is 0" if variance.noise_scale == float("inf") else ""
    yield from _text(
        f"Noise scale: {scale or short(variance.noise_scale)}. There noise and gradient are equally long; a minibatch "
        "much larger gains little."
    )


def _pull(it: Explanation, pictures: Sequence[Picture]) -> Iterator[str]:
    yield from _text(
        "8. Which examples pull: the norm of each one's gradient, and the cosine of its angle with the mean (below 0 "
        "it pulls against the others)."
    )
    order = sorted(range(len(it.examples)), key=lambda n: -it.examples[n].norm)
    longest = max(one.norm for one in it.examples) or 1.0
    yield f"{'example':>8}  {'number':>8}  {'norm':>10}  {'cosine':>7}  pull"
    shown = order if len(order) <= MOST_ROWS else [*order[: MOST_ROWS // 2], *order[-MOST_ROWS // 2 :]]
    for n in shown:
        one = it.examples[n]
        bar = "█" * round(BAR * one.norm / longest)
        label = f" target {pictures[n].label}" if pictures[n].label else ""
        row = f"{n + 1:>8}  {one.number:>8}  {number(one.norm):>10}  {one.cosine:>7.2f}  {bar}"
        yield row + (label if len(row + label) <= WIDTH else "")
    against = [str(n + 1) for n, one in enumerate(it.examples) if one.cosine < 0]
    yield from _text(
        f"Strongest: example {order[0] + 1}. "
        + (f"Against the mean: {', '.join(against)}." if against else "None pulls against the mean.")
    )


def _table(it: Explanation, rows: Rows, last: str) -> Iterator[str]:
    yield f"{'':{LABEL}}" + "".join(f"{f'w{n}':>11}" for n in range(1, len(it.weights) + 1)) + f"{last:>10}"
    shown = rows if len(rows) <= MOST_ROWS else [*rows[: MOST_ROWS - 2], *rows[-2:]]
    for label, values, extra in shown:
        cells = "".join(f"{number(value):>11}" for value in values)
        yield f"{label:{LABEL}}{cells}" + (f"{number(extra):>10}" if extra is not None else "")
    if len(shown) < len(rows):
        yield f"… and {len(rows) - len(shown)} more (--json has all)"


def _share(one: Share) -> str:
    label = f"worker {one.worker}: {_span(one.first, one.last)}"
    return label if len(label) <= LABEL else f"worker {one.worker}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _text(text: str) -> list[str]:
    return textwrap.wrap(plain(text), WIDTH, break_on_hyphens=False)
