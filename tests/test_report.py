"""report.html: made from the run's folder alone, whole in one file, and safe whatever the folder holds."""

import csv
import itertools
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mbgd.__main__ import main as mbgd_main
from mbgd.errors import UsageError
from mbgd.files.job_file import JobRecord
from mbgd.report import write_report
from mbgd.report.curve import MOST_BUCKETS, Curve
from mbgd.report.data import MOST_POINTS, page_data
from mbgd.report.extras import MOST_BYTES, extras
from mbgd.report.finding import MOST_RUNS, Runs
from mbgd.report.history import History, Reader
from mbgd.report.page import HERE
from mbgd.report.pictures import pictures, time_split
from mbgd.report.results import results
from mbgd.text.numbers import short

from report_runs import data_of, line_of, make_run, write_lines

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'&"


def read(folder: Path) -> History:
    return Reader(folder).read()


def mbgd(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["mbgd", *map(str, arguments)])
    return mbgd_main()


def test_curves_of_training_and_evaluation_share_a_picture_the_important_ones_first(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "run"))
    found = pictures([run])
    titles = [picture.title for picture in found]
    assert titles[:6] == ["loss", "accuracy", "auroc", "learning rate", "gradient norm", "noise scale"]
    assert found[0].curves == {"train/loss": "train", "eval/loss": "eval"}
    assert {"examples per second", "load", "memory in use"} <= set(titles)
    assert not set(titles) & {"epoch", "num workers", "data wait", "examples sha256", "peak memory"}
    assert time_split(run) == pytest.approx(
        {"data wait": 0.001, "forward backward": 0.006, "averaging": 0.002, "optimizer": 0.001}
    )


def test_the_best_stands_beside_the_last(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", config={"checkpoint": {"best": "eval/odd", "direction": "maximize"}})
    more = [
        {"step": step, "eval/loss": loss, "eval/odd": loss, "eval/other": loss}
        for step, loss in ((101, 0.001), (102, 5.0))
    ]
    write_lines(folder, more, "a")
    found = {one["name"]: one for one in results(read(folder))}
    assert (found["eval loss"]["last"], found["eval loss"]["best"], found["eval loss"]["best_step"]) == (
        5.0,
        0.001,
        101,
    )
    assert found["eval accuracy"]["best"] == pytest.approx(0.912)
    assert (found["eval odd"]["best"], found["eval odd"]["best_step"]) == (5.0, 102)  # by the configuration
    assert found["eval other"]["best"] is None  # nothing tells which values are better


def test_a_crashed_run_has_a_report_of_what_is_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("summary.json", "run.json", "config.yaml"):
        (folder / name).unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "train/loss": NaN, "train/accuracy": 0.5}\n{"step": 102, "train/lo')
    run = read(folder)
    assert run.curves["train/loss"].last.step == 100
    assert run.curves["train/accuracy"].last == (101, 0.5)
    write_report([folder], folder / "report.html")
    [shown] = data_of((folder / "report.html").read_text())["runs"]
    assert shown["state"] == "ended without a word (killed, or its host was lost)"
    assert "metrics.jsonl: line 112 cannot be read" in shown["problems"][0]
    (folder / "metrics.jsonl").write_text("")
    write_report([folder], folder / "report.html")
    assert data_of((folder / "report.html").read_text())["pictures"] == []


def test_a_run_that_grows_is_read_on_and_one_that_is_taken_back_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", num_steps=20)
    reader = Reader(folder)
    assert reader.read(may_grow=True).last_step == 20
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line_of(21)))
    run = reader.read(may_grow=True)
    assert (run.last_step, run.problems) == (20, [])  # the line has no end yet
    write_lines(folder, [{}, line_of(22)], "a")  # ends it, badly, and one more
    assert reader.read(may_grow=True).last_step == 22
    content = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(content[:5]))
    run = reader.read(may_grow=True)
    assert (run.last_step, run.curves["train/loss"].num, run.problems) == (5, 5, [])


def test_nothing_in_a_folder_can_become_a_part_of_the_page(tmp_path: Path) -> None:
    found = []
    for name, text in (("tame", "tame"), ("a<b>c", NASTY)):
        folder = make_run(tmp_path / name, config={text: text, "model": {"name": text}})
        write_lines(folder, [{"step": 101, f"train/{text}": 1.0, f"eval/{text}": 1.0}], "a")
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
    scripts = "".join(path.read_text() for path in (HERE / "assets").glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", scripts)


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
    assert not re.search(r"@import|url\(|<link|<iframe|<img|\bsrc=|\bhref=", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "connect-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]


def test_a_long_curve_keeps_its_extremes_and_means() -> None:
    curve, short_curve = Curve(), Curve()
    values = np.random.default_rng(0).normal(size=200_003)
    values[12_345], values[177_777] = 90.0, -90.0
    for step, value in enumerate(values.tolist()):
        curve.add(step, value)
    for step in range(5):
        short_curve.add(step, step * 2.0)
    assert (curve.num, curve.last) == (200_003, (200_002, values[-1]))
    assert curve.greatest == (12_345, 90.0)
    assert curve.least == (177_777, -90.0)
    assert curve.mean == pytest.approx(values.mean())
    assert curve._mean.shape[1] < 2 * MOST_BUCKETS
    for most in (100, 2000):
        kept = curve.thinned(most)
        assert most / 2 < len(kept.steps) <= most
        assert {(12_345, 90.0), (177_777, -90.0)} <= set(zip(kept.steps, kept.values, strict=True))
        assert all(values[int(step)] == value for step, value in zip(kept.steps, kept.values, strict=True))
        assert (np.diff(kept.steps) > 0).all()
        assert (np.diff(kept.mean_steps) > 0).all()
        size = round(len(values) / len(kept.means))
        power = 2 ** round(np.log2(size))
        assert kept.means[3] == pytest.approx(values[3 * power : 4 * power].mean())
        assert kept.mean_steps[3] == pytest.approx(3.5 * power - 0.5)
    assert short_curve.thinned(100).values.tolist() == [0, 2, 4, 6, 8]
    assert len(short_curve.thinned(100).means) == 0


def test_a_long_history_is_a_small_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", num_steps=20_000)
    start = time.process_time()
    write_report([folder], tmp_path / "report.html")
    assert time.process_time() - start < 1.5
    assert (tmp_path / "report.html").stat().st_size < 700_000


def test_many_runs_are_a_page_of_bounded_size(tmp_path: Path) -> None:
    one = read(make_run(tmp_path / "run", num_steps=2000))
    for number in (1, 8, 300, MOST_RUNS):
        data = page_data([one] * number, "many")
        num_points = sum(len(curve["x"]) for run in data["runs"] for curve in run["curves"].values())
        assert num_points <= 1.1 * MOST_POINTS
        assert len(json.dumps(data, separators=(",", ":"))) < 1_400_000
        assert all(run["curves"].keys() >= {"train/loss", "eval/loss"} for run in data["runs"])
    assert data["notes"] == [f"Of {MOST_RUNS} runs a page has room for these curves alone: train/loss, eval/loss."]


def test_the_tool_remakes_one_and_compares_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", config={"optimizer": {"lr": 0.2}, "seed": 0, "run": {"dir": "two"}})
    monkeypatch.chdir(tmp_path)
    for arguments, path in (([one], one / "report.html"), ([one, two], tmp_path / "report.html")):
        assert mbgd(monkeypatch, "report", *arguments) == 0
        assert path.exists()
        assert "report      " in capsys.readouterr().out
    data = data_of((tmp_path / "report.html").read_text())
    by_title = {table["title"]: table for table in data["tables"]}
    assert by_title["Configuration"]["differing"] == {"optimizer.lr": ["0.1", "0.2"]}
    assert by_title["Configuration"]["shared"] == {"seed": "0"}
    assert by_title["Plan"]["differing"] == {}
    assert [run["link"] for run in data["runs"]] == ["./one/report.html", ""]  # the second has no page of its own
    assert mbgd(monkeypatch, "report", tmp_path / "nowhere") == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert mbgd(monkeypatch, "report", one, "--output", tmp_path / "no/such/report.html") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_all_runs_under_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "<script>"
    make_run(root / "a/one")
    make_run(root / "two", ending={"outcome": "preempted", "message": "stopped"})
    for number, rate in enumerate(("0.1", "0.2")):
        job = make_run(root / f"sweep/{number}")
        JobRecord(number, {"optimizer.lr": rate, "batch.size": "8"}, [], 0).write(job)
    (root / "z").mkdir()
    (root / "z/metrics.jsonl").symlink_to("nowhere")
    assert mbgd(monkeypatch, "report", root) == 0
    data = data_of((root / "report.html").read_text())
    assert data["title"] == "<script>"
    assert [run["name"] for run in data["runs"]] == ["a/one", "lr=0.1, size=8", "lr=0.2, size=8", "two"]
    assert [run["outcome"] for run in data["runs"]] == ["finished"] * 3 + ["preempted"]
    assert "z is not the folder of a run" in data["notes"][0]
    with pytest.raises(UsageError, match="holds none"):
        Runs([root / "a/one/checkpoints"]).read()


def test_runs_of_one_name_and_runs_of_the_same_bits_are_told(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("a/run", "b/run", "c")]
    for folder, weights in zip(folders, ("1" * 64, "1" * 64, "2" * 64), strict=True):
        (folder / "summary.json").write_text(json.dumps({"weights_sha256": weights}))
    write_report(folders, tmp_path / "report.html")
    data = data_of((tmp_path / "report.html").read_text())
    names = [f"run ({tmp_path}/a/run)", f"run ({tmp_path}/b/run)"]
    assert [run["name"] for run in data["runs"]] == [*names, "c"]
    assert data["notes"] == [f"{', '.join(names)}: the same weights, bit for bit (weights_sha256 {'1' * 12}…)."]


def test_every_value_as_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "a, b", num_steps=5000)
    assert mbgd(monkeypatch, "report", folder, "--csv", tmp_path / "curves.csv") == 0
    assert "curves      " in capsys.readouterr().out
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5500
    assert rows[0]["run"] == "a, b"
    assert "train/examples_sha256" not in rows[0]
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert losses == {step: 2.0 / step for step in range(1, 5001)}
    for odd in (["--port", "80"], ["--watch", "--csv", "x"], ["--watch", "--port", "0"]):
        try:
            code = mbgd(monkeypatch, "report", folder, *odd)
        except SystemExit as error:
            code = int(str(error.code))
        assert code == 2, odd


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


SEEN_WITH = {  # what full protanopia, deuteranopia and tritanopia make of linear RGB (Machado et al. 2009, table 1)
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
OKLAB_1 = [
    [0.41222147, 0.53633254, 0.05144599],
    [0.2119035, 0.68069955, 0.10739696],
    [0.08830246, 0.28171884, 0.6299787],
]
OKLAB_2 = [
    [0.21045426, 0.7936178, -0.00407205],
    [1.9779985, -2.4285922, 0.4505937],
    [0.0259040, 0.78277177, -0.80867577],
]


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def test_the_colours_can_be_told_apart_without_full_colour_vision() -> None:
    style = (HERE / "chart.css").read_text()
    for theme in style.split("@media"):
        colours = re.findall(r"--c\d: (#\w{6});", theme)
        assert len(colours) == 8
        for kind, seen_as in SEEN_WITH.items():
            seen = [np.clip(np.array(seen_as) @ linear(one), 0, 1) for one in colours]
            oklab = [np.array(OKLAB_2) @ np.cbrt(np.array(OKLAB_1) @ one) for one in seen]
            least = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(oklab, 2))
            assert least > 0.075, (kind, least)  # 0.02 is just noticeable side by side


def test_panels_leave_out_what_has_no_room(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "observed").mkdir()
    png = "data:image/png;base64," + "A" * 9000
    example = {"png": png, "target": "4", "predicted": [{"label": "4", "probability": 1.0}]}
    some = {"size": 400, "zero": 0, "low": -100, "negative": [1] * 200, "positive": [1] * 200}
    layers = [{"name": str(number), "parameters": some, "gradients": some} for number in range(16)]
    for name, lines in (
        ("predictions", [{"step": step, "examples": [example] * 32} for step in range(1, 4)]),
        ("histograms", [{"step": step, "layers": layers} for step in range(1, 20)]),
    ):
        (folder / f"observed/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for num_runs in (1, 4, 100):
        found = extras(folder, num_runs)
        assert len(json.dumps(found, separators=(",", ":"))) <= MOST_BYTES / num_runs
    found = extras(folder, 1)
    assert found["predictions"]["sets"][""]["steps"] == [1, 2, 3]
    assert len(found["predictions"]["sets"][""]["examples"]) == 16
    assert found["histograms"]["lines"][-1]["step"] == 19
    (folder / "observed/histograms.jsonl").write_text("no line\n")
    assert "line 1 cannot be read" in extras(folder, 1)["histograms"]["problem"]
