"""One self-contained HTML file: curves, where the time went, the plan, the environment and the configuration."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbgd.files.atomic import write_atomically
from mbgd.report.axes import CHART_STYLE, NUM_COLOURS
from mbgd.report.chart import Series, draw
from mbgd.report.history import History, read_history
from mbgd.report.panels import Panel, panels, time_split
from mbgd.text.escaping import in_html as escape
from mbgd.text.numbers import short

NO_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write a page about the runs in these folders; UsageError where one is not a run's."""
    write_atomically(path, render([read_history(folder) for folder in folders]).encode())


def render(runs: Sequence[History]) -> str:
    figures, data = [], []
    for panel in panels(runs):
        figure, of_pointer = draw(panel.title, _series(panel, runs), unit=panel.unit, may_be_log=panel.may_be_log)
        figures.append(figure)
        data.append(of_pointer)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    head = _about_one(runs[0]) if len(runs) == 1 else _about_several(runs)
    body = [
        f"<h1>{escape(title)}</h1>{head}",
        _problems(runs),
        _legend(runs),
        f'<div class="charts">{"".join(figures)}</div>' if figures else "<p>Nothing has been logged yet.</p>",
        _time(runs),
        '<div class="pair">',
        _section("Plan", runs, [run.record.get("plan", {}) for run in runs]),
        _section("Environment", runs, [_environment(run) for run in runs]),
        "</div>",
        _configuration(runs),
    ]
    here = Path(__file__)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{CHART_STYLE}{here.with_name('page.css').read_text()}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f'\n<div id="tip"></div>\n<script type="application/json" id="charts">{_json(data)}</script>\n'
        f"<script>\n{here.with_name('page.js').read_text()}</script>\n</body></html>\n"
    )


def _problems(runs: Sequence[History]) -> str:
    """What of the runs' folders could not be read."""
    found = [problem if len(runs) == 1 else f"{run.name}: {problem}" for run in runs for problem in run.problems]
    return "".join(f'<p class="failed">{escape(problem)}</p>' for problem in found)


def _json(data: Any) -> str:
    """JSON that cannot end the script it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _series(panel: Panel, runs: Sequence[History]) -> list[Series]:
    """Of one run, training and evaluation have colours; of several, each run has, and evaluation is dashed."""
    series = []
    for number, run in enumerate(runs):
        for name in panel.names:
            if name in run.curves:
                group = name.partition("/")[0]
                is_evaluation = group == "eval"
                if len(runs) == 1:
                    colour, label, dashed = int(is_evaluation), group, False
                else:
                    colour, label, dashed = number % NUM_COLOURS, f"{run.name} {group}", is_evaluation
                series.append(Series(label, colour, dashed and len(panel.names) > 1, run.curves[name]))
    return series


def _about_one(run: History) -> str:
    values = _results(run)
    tiles = "".join(
        f'<div class="tile"><b>{escape(text)}</b><span>{escape(name)}</span></div>' for name, text in values
    )
    return f'<p class="{_outcome(run)}">{escape(run.state)}</p><div class="tiles">{tiles}</div>'


def _about_several(runs: Sequence[History]) -> str:
    results = [dict(_results(run)) for run in runs]
    names = list(dict.fromkeys(name for result in results for name in result))
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in names)
    rows = []
    for number, (run, result) in enumerate(zip(runs, results, strict=True)):
        cells = "".join(f'<td class="number">{escape(result.get(name, ""))}</td>' for name in names)
        state = f'<td class="{_outcome(run)}">{escape(run.state)}</td>'
        rows.append(f"<tr><td>{_swatch(number, run.name)}</td>{cells}{state}</tr>")
    table = f"<table><tr><th>run</th>{head}<th>state</th></tr>{''.join(rows)}</table>"
    return f'<h2>Results</h2><div class="card">{table}</div>'


def _results(run: History) -> list[tuple[str, str]]:
    """What a run came to: (name, text)."""
    found = [
        (f"eval {name[5:].replace('_', ' ')}", short(curve[-1][1]))
        for name, curve in run.curves.items()
        if name.startswith("eval/")
    ]
    loss = run.last("train/loss")
    if not found and loss is not None:
        found.append(("train loss", short(loss)))
    found.append(("steps", f"{run.last_step:,}"))
    speed = run.summary.get("examples_per_second")
    if speed is not None:
        found.append(("examples/s", short(speed)))
    memory = run.last("time/peak_memory_bytes")
    if memory is not None:
        found.append(("peak memory", short(memory, "bytes")))
    workers = run.record.get("environment", {}).get("workers", run.summary.get("num_workers"))
    return [*found, ("workers", str(workers))] if workers is not None else found


def _outcome(run: History) -> str:
    return escape(run.state.partition(":")[0].partition(",")[0])


def _legend(runs: Sequence[History]) -> str:
    if len(runs) == 1:
        has_evaluation = any(name.startswith("eval/") for name in runs[0].curves)
        return (
            f'<div class="legends">{_swatch(0, "training")}{_swatch(1, "evaluation")}</div>' if has_evaluation else ""
        )
    swatches = "".join(_swatch(number, run.name) for number, run in enumerate(runs))
    return f'<h2>Curves</h2><div class="legends">{swatches}<span class="hint">dashed: evaluation</span></div>'


def _swatch(number: int, label: str) -> str:
    colour = f"var(--c{number % NUM_COLOURS})"
    return f'<span class="legend"><i style="background: {colour}"></i>{escape(label)}</span>'


def _time(runs: Sequence[History]) -> str:
    """A bar for each run: how its mean step divides."""
    splits = [time_split(run) for run in runs]
    names = list(dict.fromkeys(name for split in splits for name in split))
    bars = []
    for run, split in zip(runs, splits, strict=True):
        total = sum(split.values())
        if total > 0:
            pieces, legends = [], []
            for name, seconds in split.items():
                number = names.index(name)
                style = f"width: {100 * seconds / total:.2f}%; background: var(--c{number % NUM_COLOURS})"
                pieces.append(f'<i style="{style}"></i>')
                legends.append(_swatch(number, f"{name} {short(seconds, 'seconds')} ({100 * seconds / total:.0f} %)"))
            name = "" if len(runs) == 1 else f"<b>{escape(run.name)}</b>"
            bar = f'<div class="bar">{"".join(pieces)}</div><div class="legends">{"".join(legends)}</div>'
            bars.append(f"<div>{name}{bar}</div>")
    return f'<h2>Where the time of a step goes</h2><div class="card">{"".join(bars)}</div>' if bars else ""


def _environment(run: History) -> dict[str, Any]:
    code = run.record.get("code", {})
    changes = ", with changes" if code and code.get("dirty") else ""
    commit = {"commit": f"{code.get('commit', '')[:12]}{changes}"} if code else {}
    return {key.replace("_", " "): value for key, value in run.record.get("environment", {}).items()} | commit


def _configuration(runs: Sequence[History]) -> str:
    configs = [run.config for run in runs]
    if len(runs) == 1:
        return _section("Configuration", runs, configs)
    keys = list(dict.fromkeys(key for config in configs for key in config))
    differing = {key for key in keys if len({repr(config.get(key)) for config in configs}) > 1}
    parts = [{key: config[key] for key in keys if key in differing and key in config} for config in configs]
    same = {key: value for key, value in configs[0].items() if key not in differing}
    rest = f"<h2></h2><details><summary>What all share</summary>{_section('', runs[:1], [same])}</details>"
    return _section("Configuration: what differs", runs, parts) + rest


def _section(title: str, runs: Sequence[History], columns: Sequence[Mapping[str, Any]]) -> str:
    """A table with a row for each key and a column for each run; nothing where there are no keys."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not keys:
        return ""
    head = "".join(f"<th>{_swatch(number, run.name)}</th>" for number, run in enumerate(runs))
    rows = [f"<tr><th></th>{head}</tr>"] if len(runs) > 1 else []
    for key in keys:
        cells = "".join(f"<td>{escape(_text(column[key])) if key in column else '–'}</td>" for column in columns)
        rows.append(f"<tr><td>{escape(key)}</td>{cells}</tr>")
    return f'<div><h2>{escape(title)}</h2><div class="card"><table>{"".join(rows)}</table></div></div>'


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
