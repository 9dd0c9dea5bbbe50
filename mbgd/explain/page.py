"""An explanation as one self-contained HTML page, in the style of a run's report."""

from collections.abc import Sequence
from pathlib import Path

from mbgd import report
from mbgd.data.pictures import Picture
from mbgd.explain.chart import draw
from mbgd.explain.explanation import Explanation
from mbgd.explain.wording import number
from mbgd.files.atomic import write_atomically
from mbgd.report.axes import CHART_STYLE
from mbgd.text.escaping import in_html as escape
from mbgd.text.numbers import short

NO_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MOST_EXAMPLES = 24
"""Examples that are shown individually."""


def write_page(it: Explanation, pictures: Sequence[Picture], path: Path) -> None:
    write_atomically(path, render(it, pictures).encode())


def render(it: Explanation, pictures: Sequence[Picture]) -> str:
    pages = [Path(report.__file__).with_name("page.css"), Path(__file__).with_name("page.css")]
    css = CHART_STYLE + "".join(path.read_text() for path in pages)
    body = "\n".join(
        [*_head(it), *_gradients(it, pictures), *_workers(it), *_step(it), *_noise(it), *_after(it, pictures)]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>One step of minibatch gradient descent</title>\n<style>\n{css}</style></head>\n<body>\n{body}\n"
        "</body></html>\n"
    )


def _head(it: Explanation) -> list[str]:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in it.about.items()
    )
    names = "".join(f"<tr><td>w{n}</td><td>{escape(one.name)}</td></tr>" for n, one in enumerate(it.weights, start=1))
    notes = "".join(_say(escape(one)) for one in it.notes)
    return [
        f"<h1>One step of minibatch gradient descent</h1>{notes}",
        f'<div class="tiles">{tiles}</div>',
        f'<h2>The weights that are shown</h2><div class="card"><table>{names}</table></div>',
    ]


def _gradients(it: Explanation, pictures: Sequence[Picture]) -> list[str]:
    cards = []
    for n, (one, picture) in enumerate(zip(it.examples[:MOST_EXAMPLES], pictures, strict=False), start=1):
        cards.append(_card(f"example {n}", picture, {"loss": number(one.loss)}))
    more = len(it.examples) - MOST_EXAMPLES
    rest = _say(f"… and {more} more.") if more > 0 else ""
    shown = enumerate(it.examples[:MOST_EXAMPLES], start=1)
    rows = [(f"example {n}", one.gradient, "") for n, one in shown]
    means, backward = [one.mean for one in it.weights], [one.backward for one in it.weights]
    sums = [("mean of the rows", means, "sum"), ("backward of the mean loss", backward, "")]
    return [
        _title(1, "Every example has a loss of its own"),
        _say("The minibatch is drawn from the shuffled data. Nothing is averaged yet."),
        f'<div class="examples">{"".join(cards)}</div>{rest}',
        _title(2, "Every loss has a gradient; their mean is the gradient of the mean loss"),
        _say(
            "A row tells how one example's loss changes with each weight. Differentiation is linear: the mean of the "
            "rows is the gradient of the mean loss, which one backward gives. Over all "
            f"{escape(it.about['weights'])} weights the two differ by {it.difference:.1e} (relative)."
        ),
        _table(it, [*rows, *sums]),
        _say(f"Found by {escape(it.method)}."),
    ]


def _workers(it: Explanation) -> list[str]:
    weight = short(it.total_weight)
    rows = [
        (
            f"worker {one.worker}: Σ of example{'s' if one.last > one.first else ''} {_span(one.first, one.last)}",
            one.sums,
            "",
        )
        for one in it.shares
    ]
    rows.append(("all-reduce: Σ of the workers", it.total, "sum"))
    rows.append((f"÷ {weight}, once", [value / it.total_weight for value in it.total], ""))
    return [
        _title(3, f"The same on {len(it.shares)} workers"),
        _say(
            "Each worker adds up the gradients of its own examples. The all-reduce adds up the workers' sums, and one "
            f"division by the whole minibatch's weight, {weight}, makes the mean: the same numbers as above, however "
            "the examples were split."
        ),
        _table(it, rows),
    ]


def _step(it: Explanation) -> list[str]:
    before, after = [one.before for one in it.weights], [one.after for one in it.weights]
    changes = [one.after - one.before for one in it.weights]
    parts = [
        _title(4, "The optimizer moves each weight"),
        _say(f"By {escape(it.about['optimizer'])}: one update for the whole minibatch, not one for each example."),
        _table(it, [("before", before, ""), ("change", changes, ""), ("after", after, "sum")]),
    ]
    if it.opposite is not None:
        parts += [
            _title(5, "Losses of 2 and −2: a mean of 0 is not a gradient of 0"),
            _say(
                "Constants are added to the first two examples' losses, so that they are 2 and −2. A constant has no "
                f'gradient. <span class="big">Mean loss: {number(it.opposite.mean_loss)}. Norm of its gradient: '
                f"{number(it.opposite.norm)}.</span> Weights follow gradients, not losses."
            ),
            _table(it, [("gradient of the mean loss", it.opposite.gradient, "")]),
        ]
    return parts


def _noise(it: Explanation) -> list[str]:
    variance = it.variance
    bounded = variance.noise_scale != float("inf")
    scale = (
        f"Noise and gradient are equally long at k = {short(variance.noise_scale)}, the noise scale: a minibatch much "
        "smaller follows mostly noise, one much larger gains little."
        if bounded
        else "The gradient itself is 0 as far as can be measured: all is noise."
    )
    late = "" if variance.is_whole else " For larger minibatches there was no time."
    return [
        _title(6, "A larger minibatch is less noisy: 1/k"),
        _say(
            "Many minibatches of k examples, drawn at random: how far their mean gradients scatter (dots), and one "
            f"example's variance divided by k (line). {scale}{late}"
        ),
        draw(variance),
    ]


def _after(it: Explanation, pictures: Sequence[Picture]) -> list[str]:
    rows = [("gradient before the step", it.next.gradient_before, ""), ("after it", it.next.gradient_after, "")]
    moved = it.next.gradient_before != it.next.gradient_after
    order = sorted(range(len(it.examples)), key=lambda n: -it.examples[n].norm)
    longest = max(one.norm for one in it.examples) or 1.0
    cards = []
    for n in order[:MOST_EXAMPLES]:
        one = it.examples[n]
        against = one.cosine < 0
        bar = f'<div class="pull{" against" if against else ""}" style="width: {100 * one.norm / longest:.0f}%"></div>'
        values = {"norm": number(one.norm), "cosine": f"{one.cosine:.2f}"}
        cards.append(_card(f"example {n + 1}", pictures[n], values, bar))
    return [
        _title(7, "The next minibatch sees the new weights"),
        _say(
            f"Example 1 before and after this step: its loss went from {number(it.next.loss_before)} to "
            f"{number(it.next.loss_after)}"
            + (
                ", and its gradient is another one."
                if moved
                else "; its gradient is the same, for this loss is linear."
            )
        ),
        _table(it, rows),
        _title(8, "Which examples pull"),
        _say(
            "The longest gradients move the weights most. The cosine tells the direction: 1 is the mean's own; below 0 "
            "(orange) an example pulls against the others."
        ),
        f'<div class="examples">{"".join(cards)}</div>',
    ]


def _card(name: str, picture: Picture, values: dict[str, str], bar: str = "") -> str:
    seen = ""
    if picture.png:
        seen = f'<img src="{picture.png}" alt="{escape(name)}">'
    elif picture.text:
        seen = f"<code>{escape(picture.text)}</code>"
    if picture.label:
        values = {"target": picture.label, **values}
    lines = "".join(f"<span>{escape(key)} <b>{escape(value)}</b></span>" for key, value in values.items())
    kind = "example text" if picture.text else "example"
    return f'<div class="{kind}">{seen}<b>{escape(name)}</b>{lines}{bar}</div>'


def _table(it: Explanation, rows: Sequence[tuple[str, Sequence[float], str]]) -> str:
    """A column for each weight; cells are tinted by sign and size."""
    head = "".join(f'<th class="number">w{n}</th>' for n in range(1, len(it.weights) + 1))
    largest = max((abs(value) for _, values, _ in rows for value in values), default=0.0) or 1.0
    lines = []
    for label, values, kind in rows:
        cells = "".join(f'<td class="number"{_tint(value / largest)}>{number(value)}</td>' for value in values)
        lines.append(f'<tr class="{kind}"><td>{escape(label)}</td>{cells}</tr>')
    return f'<div class="card"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _tint(share: float) -> str:
    if abs(share) < 1e-9:
        return ""
    colour = "var(--c0)" if share > 0 else "var(--c1)"
    return f' style="background: color-mix(in srgb, {colour} {35 * abs(share):.0f}%, transparent)"'


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _title(n: int, text: str) -> str:
    return f"<h2><b>{n}</b>{escape(text)}</h2>"


def _say(text: str) -> str:
    return f'<p class="say">{text}</p>'
