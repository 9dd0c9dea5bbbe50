"""What comes from elsewhere is shown in one line, and nothing of it is obeyed by a terminal."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mbgd.__main__ import main as mbgd_main
from mbgd.checkpoints.format import differences
from mbgd.cli.tools.sweep_plot import plot
from mbgd.runs.sweeps import read_ranking
from mbgd.text.escaping import in_html, plain
from mbgd.tracking.wording import describe

NASTY = "\x1b]0;owned\x07[/red]\n\r\t\u202e\u200b\x9b31m$\\frac$ €μ"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("eval/loss é μ × 漢字 😀", "eval/loss é μ × 漢字 😀"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\u202e\u200b\ufeff\u2028", r"\u202e\u200b\ufeff\u2028"),
        ("\ud800", r"\ud800"),
        (Path("a\nb"), r"a\nb"),
        (5, "5"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: object, shown: str) -> None:
    assert plain(text) == shown
    assert plain(shown) == shown


def test_in_a_page_it_is_text() -> None:
    assert in_html("<b>\x1b</b>&") == "&lt;b&gt;\\x1b&lt;/b&gt;&amp;"


def test_lines_of_the_console_and_lists_of_differences_are_plain() -> None:
    for shown in (describe({f"train/{NASTY}": 1.0}), *differences({NASTY: NASTY}, {"a": NASTY})):
        assert shown.isprintable()


def test_tables_and_pictures_are_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1):
        job = tmp_path / str(number)
        job.mkdir()
        swept = {NASTY: f"{number}{NASTY}"}
        (job / "job.json").write_text(json.dumps({"number": number, "swept": swept, "overrides": [], "exit_code": 0}))
        (job / "summary.json").write_text(json.dumps({"metrics": {NASTY: 0.5 + number}, "steps": 1}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mbgd", "sweep", str(tmp_path), "--metric", NASTY])
        assert mbgd_main() == 0
    said = capsys.readouterr().out
    assert "[/red]" in said
    assert all(line.isprintable() for line in said.splitlines())
    plot(read_ranking(tmp_path, NASTY, None, None), tmp_path / "picture.svg")
    texts = [text for text in ElementTree.parse(tmp_path / "picture.svg").getroot().itertext() if "owned" in text]
    assert len(texts) >= 4  # the metric, the key and a title of each point
    assert all(text.isprintable() for text in texts)
