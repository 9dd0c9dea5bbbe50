"""The result of verify as tables of 80 columns."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mbgd.text.escaping import plain
from mbgd.text.numbers import short

WIDTH = 80
MOST_PARAMETERS = 8


def describe(result: Mapping[str, Any]) -> str:
    return "\n".join(line.rstrip() for line in _lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    about = result["about"]
    yield from _wrapped("verify  ", f"{about['model']} on {about['data']}, objective {about['objective']}")
    yield from _wrapped("        ", f"{about['plan']}; averaging {about['averaging']}")
    yield ""
    yield from _cluster(result["cluster"])
    for comparison in result["comparisons"]:
        yield ""
        yield from _comparison(comparison)
    if result["comparisons"]:
        yield ""
        yield from _parameters(result["comparisons"][0])
    if result["same_bits"] is not None:
        yield ""
        equal = "the same bits" if result["same_bits"] else "OTHER BITS THAN"
        yield f"reproducible: {equal} on {about['num_workers']} workers {'and ' if result['same_bits'] else ''}on one"
    yield ""
    for finding in result["findings"]:
        mark = "WRONG  " if finding["severity"] == "wrong" else "note   "
        yield from _wrapped(mark, finding["what"])
        yield from _wrapped("  to do: ", finding["remedy"], "         ")
    for warning in result["cluster"]["warnings"]:
        yield from _wrapped("warning ", warning)
    yield from _wrapped("verdict ", f"{result['verdict']}: {result['why']}")


def _cluster(cluster: Mapping[str, Any]) -> Iterator[str]:
    rows = [("worker", "host", "device", "threads", "torch", "matmul", "clock")]
    for rank, one in enumerate(cluster["workers"]):
        rate = f"{one['matmul_flops'] / 1e9:.4g} GF/s"
        skew = f"{1000 * one['clock_skew_seconds']:+.1f} ms"
        device = _cut(one["device"], 20)
        rows.append((str(rank), _cut(one["host"], 12), device, str(one["threads"]), _cut(one["torch"], 11), rate, skew))
    yield from table(rows)
    exchange = cluster["all_reduce"]
    if exchange is not None:
        rate = f"{short(exchange['bytes_per_second'], 'bytes')}/s"
        size = short(exchange["bytes"], "bytes")
        yield f"all-reduce of the gradients' {size}: {short(exchange['seconds'], 'seconds')}, {rate}"


def _comparison(comparison: Mapping[str, Any]) -> Iterator[str]:
    yield f"precision {comparison['precision']}: {comparison['verdict']}"
    rows = [("step", "loss", "loss off", "examples", "gradient", "one worker", "mean of means", "copies")]
    for row in comparison["steps"]:
        rows.append(
            (
                str(row["step"] + 1),
                f"{row['loss']:.6g}",
                f"{row['loss_difference']:.1e}",
                str(row["num_examples"]),
                f"{row['error']:.1e}",
                f"{row['one_worker_error']:.1e}",
                f"{row['mean_of_means_error']:.1e}",
                "alike" if row["replicas_alike"] else "DIFFER",
            )
        )
    yield from table(rows)


def _parameters(comparison: Mapping[str, Any]) -> Iterator[str]:
    """The parameters with the largest errors in the last step."""
    errors = comparison["steps"][-1]["parameters"] if comparison["steps"] else {}
    worst = sorted(errors, key=lambda name: -errors[name][0])[:MOST_PARAMETERS]
    rows = [("parameter", "gradient", "mean of means")]
    rows += [(_cut(plain(name), 44), f"{errors[name][0]:.1e}", f"{errors[name][1]:.1e}") for name in worst]
    yield from table(rows)
    if len(errors) > len(worst):
        yield f"… and {len(errors) - len(worst)} more, none of them worse (--json has all)"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of minimal width; the first is left-aligned, numbers are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if number == 0 or not _is_number(rows, number) else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells)


def _is_number(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column][:1] in "+-−" for row in rows[1:])


def _wrapped(first: str, text: str, rest: str | None = None) -> list[str]:
    indent = " " * len(first) if rest is None else rest
    return textwrap.wrap(plain(text), WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
