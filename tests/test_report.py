"""report.html: made from the run's folder alone, whole in one file, safe, and right in a real browser."""

import json
import os
import re
import shutil
import subprocess
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from mbgd.__main__ import main as mbgd_main
from mbgd.errors import UsageError
from mbgd.report import write_report
from mbgd.report.chart import Series, draw, thinned
from mbgd.report.history import read_history
from mbgd.report.panels import panels, time_split
from mbgd.text.numbers import short

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'&"


def make_run(folder: Path, *, num_steps: int = 100, config: dict[str, Any] | None = None) -> Path:
    """A run's folder with every kind of metric."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        lines.append(
            {
                "step": step,
                "train/loss": 2.0 / step,
                "train/accuracy": 1 - 1 / step,
                "train/learning_rate": 0.1 / step,
                "train/gradient_norm": 1.0,
                "train/noise_scale": 10.0 * step,
                "train/epoch": step / 10,
                "train/num_workers": 2,
                "train/examples_sha256": "abc",
                "time/examples_per_second": 1000.0 + step,
                "time/data_wait_seconds": 0.001,
                "time/forward_backward_seconds": 0.006,
                "time/averaging_seconds": 0.002,
                "time/optimizer_seconds": 0.001,
                "time/step_seconds": 0.01,
                "time/peak_memory_bytes": 3 * 2**30,
            }
        )
        if step % 10 == 0:
            lines.append({"step": step, "eval/loss": 2.5 / step, "eval/auroc": 0.9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump(config or {"optimizer": {"lr": 0.1}, "seed": 0}))
    record = {
        "plan": {"minibatch": "64 = 2 workers × 1 micro-batch × 32"},
        "environment": {"host": "here", "workers": 2},
        "code": {"commit": "c0ffee" * 6, "dirty": True},
        "ending": {"outcome": "finished", "message": ""},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "summary.json").write_text(json.dumps({"examples_per_second": 1234.0, "steps": num_steps}))
    return folder


def test_curves_of_training_and_evaluation_share_a_picture_the_important_ones_first(tmp_path: Path) -> None:
    run = read_history(make_run(tmp_path / "run"))
    found = panels([run])
    assert [panel.title for panel in found][:6] == [
        "loss",
        "accuracy",
        "auroc",
        "learning rate",
        "gradient norm",
        "noise scale",
    ]
    assert found[0].names == ("train/loss", "eval/loss")
    titles = {panel.title for panel in found}
    assert "examples per second" in titles
    assert not titles & {"epoch", "num workers", "data wait", "examples sha256"}
    assert time_split(run) == pytest.approx(
        {"data wait": 0.001, "forward backward": 0.006, "averaging": 0.002, "optimizer": 0.001}
    )


def test_a_crashed_run_has_a_report_of_what_is_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("summary.json", "run.json", "config.yaml"):
        (folder / name).unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "train/loss": NaN, "train/accuracy": 0.5}\n{"step": 102, "train/lo')
    run = read_history(folder)
    assert run.curves["train/loss"][-1][0] == 100
    assert run.curves["train/accuracy"][-1] == (101, 0.5)
    write_report([folder], folder / "report.html")
    assert "running, or ended without a word" in (folder / "report.html").read_text()
    (folder / "metrics.jsonl").write_text("")
    write_report([folder], folder / "report.html")
    assert "Nothing has been logged yet" in (folder / "report.html").read_text()
    with pytest.raises(UsageError, match="is not the folder of a run"):
        write_report([tmp_path], tmp_path / "report.html")


def test_nothing_in_a_folder_can_become_a_part_of_the_page(tmp_path: Path) -> None:
    found = []
    for name, text in (("tame", "tame"), ("a<b>c", NASTY)):
        folder = make_run(tmp_path / name, config={text: text, "model": {"name": text}})
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 101, f"train/{text}": 1.0, f"eval/{text}": 1.0}) + "\n")
        record = json.loads((folder / "run.json").read_text())
        record["plan"][text] = record["environment"][text] = record["ending"]["message"] = text
        (folder / "run.json").write_text(json.dumps(record))
        for folders in ([folder], [folder, folder]):
            write_report(folders, tmp_path / "report.html")
            found.append(Tags())
            found[-1].feed((tmp_path / "report.html").read_text())
    tame, nasty = found[:2], found[2:]
    assert [page.count for page in nasty] == [page.count for page in tame]
    assert [page.attributes for page in nasty] == [page.attributes for page in tame]


class Tags(HTMLParser):
    """Counts tags and keeps the names of attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    write_report([make_run(tmp_path / "run")], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|\bhref=", page)


def test_a_long_history_is_quick_and_keeps_its_extremes(tmp_path: Path) -> None:
    points = [(step, 1.0) for step in range(100_000)]
    points[12_345], points[77_777] = (12_345, 9.0), (77_777, -9.0)
    kept = thinned(points)
    assert len(kept) <= 600
    assert {(12_345, 9.0), (77_777, -9.0)} <= set(kept)
    assert kept == sorted(kept)
    folder = make_run(tmp_path / "run", num_steps=20_000)
    start = time.process_time()
    write_report([folder], tmp_path / "report.html")
    assert time.process_time() - start < 1.5
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_the_tool_remakes_one_and_compares_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", config={"optimizer": {"lr": 0.2}, "seed": 0})
    monkeypatch.chdir(tmp_path)
    for arguments, path in (([str(one)], one / "report.html"), ([str(one), str(two)], tmp_path / "report.html")):
        monkeypatch.setattr("sys.argv", ["mbgd", "report", *arguments])
        assert mbgd_main() == 0
        assert path.exists()
        assert "report      " in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    differing = page.partition("what differs")[2].partition("<details>")[0]
    assert "optimizer.lr" in differing
    assert "0.2" in differing
    assert "seed" not in differing
    monkeypatch.setattr("sys.argv", ["mbgd", "report", str(tmp_path / "nowhere")])
    assert mbgd_main() == 2
    assert "is not the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123456, "", "0.01235"),
        (12345.6, "", "12,346"),
        (4.56e-7, "", "4.56e-07"),
        (0, "", "0"),
        (1536, "bytes", "1.5 KiB"),
        (3 * 2**30, "bytes", "3 GiB"),
        (0.012, "seconds", "12 ms"),
        (2.5e-6, "seconds", "2.5 µs"),
        (0, "seconds", "0 s"),
    ],
)
def test_numbers_as_people_read_them(value: float, unit: str, text: str) -> None:
    assert short(value, unit) == text


def test_axes_of_bytes_are_round_in_their_unit_and_leave_room_for_the_labels() -> None:
    svg, data = draw("memory", [Series("run", 0, dashed=False, points=[(1, 2**30), (50, 1.5 * 2**30)])], unit="bytes")
    labels = re.findall(r'<text class="y" x="([\d.]+)" [^>]*>([^<]*)<', svg)
    assert [label for _, label in labels] == ["1 GiB", "1.2 GiB", "1.4 GiB"]
    assert {float(right) for right, _ in labels} == {data["x"][2] - 7}
    _, data = draw("memory", [Series("run", 0, False, [(1, 900.2 * 2**20), (50, 900.9 * 2**20)])], unit="bytes")
    assert data["x"][2] - 7 > len("900.4 MiB") * 6.8  # what a character takes at 12 pixels


PROBE = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("load", () => {
  const svg = document.querySelector(".charts svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width * 0.538, clientY: box.top + 50 }));
  const figures = [...document.querySelectorAll("figure")].map((figure) => figure.getBoundingClientRect());
  const result = {
    errors,
    tip: document.getElementById("tip").innerText,
    overflow: document.documentElement.scrollWidth - innerWidth,
    overlap: figures.some((a, i) => figures.some((b, j) => i < j &&
      a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)),
    outside: [...document.querySelectorAll(".charts svg text, .charts svg .curve")].filter((part) => {
      const p = part.getBoundingClientRect(), s = part.closest("svg").getBoundingClientRect();
      return p.left < s.left - 1 || p.right > s.right + 1 || p.top < s.top - 1 || p.bottom > s.bottom + 1;
    }).length,
    page: getComputedStyle(document.body).backgroundColor,
  };
  document.body.innerHTML = "<pre id='result'></pre>";
  document.getElementById("result").textContent = JSON.stringify(result);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    folder = make_run(tmp_path / "run", config={NASTY: NASTY})
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "probe.html").write_text(page.replace("<meta http-equiv", PROBE + "<meta http-equiv", 1))
    found = look(tmp_path / "probe.html", width, dark=dark)
    assert found["errors"] == []
    assert found["tip"].split() == ["step", "50", "train", "0.04", "eval", "0.05"]
    assert found["overflow"] <= 0
    assert not found["overlap"]
    assert found["outside"] == 0
    assert found["page"] == ("rgb(20, 23, 27)" if dark else "rgb(246, 247, 249)")


def look(path: Path, width: int, *, dark: bool) -> dict[str, Any]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    result: dict[str, Any] = json.loads(unescape(found[1]))
    return result
