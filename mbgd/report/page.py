"""One self-contained HTML file: the data, and the styles and scripts that draw it."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from mbgd.files import strict_json
from mbgd.report.axes import CHART_STYLE
from mbgd.text.escaping import in_html as escape

HERE = Path(__file__).parent
STYLES = ("vendor/uPlot.min.css", "page.css", "assets/report.css", "assets/table.css", "assets/panels.css")
SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    *(
        f"assets/{name}.js"
        for name in (
            "elements",
            "numbers",
            "curves",
            "limits",
            "state",
            "chart",
            "charts",
            "toolbar",
            "runs_table",
            "tables",
            "export",
            "panels",
            "panel_histograms",
            "panel_predictions",
            "main",
        )
    ),
)
WITHOUT_SCRIPTS = (
    "This page draws its curves with JavaScript, which is switched off here. The numbers are in metrics.jsonl in the "
    "run's folder; `mbgd report RUN --csv FILE` writes them as a table."
)


def render(data: Any) -> str:
    """data: see `page_data`."""
    style = CHART_STYLE + "".join((HERE / name).read_text() for name in STYLES)
    script = "".join((HERE / name).read_text() for name in SCRIPTS)
    policy = _policy(script, style, network="'self'" if data["watched"] else "'none'")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data['title'])}</title>\n<style>{style}</style></head>\n<body>\n"
        f"<noscript>{WITHOUT_SCRIPTS}</noscript>\n<main></main>\n"
        f'<script type="application/json" id="data">{in_script(data)}</script>\n<script>{script}</script>\n'
        "</body></html>\n"
    )


def _policy(script: str, style: str, *, network: str) -> str:
    """The page's own script and style alone, and no network; images come in the data."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style))
    script_hash, style_hash = hashes
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; img-src data:; "
        f"connect-src {network}; base-uri 'none'; form-action 'none'"
    )


def in_script(data: Any) -> str:
    """JSON that cannot end the script it stands in."""
    return strict_json.dumps(data, is_compact=True).replace("<", "\\u003c")
