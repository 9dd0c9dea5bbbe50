"""The report in a real browser: each control, both widths and themes; a console error or a request fails the test."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mbgd.report import write_report
from mbgd.report.watch import Server
from mbgd.text.numbers import short

from report_runs import line_of, make_run, write_lines

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("chromium is not installed (apt-get install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'&"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """opened(path or address, width, dark=…) gives a page; what it complains of, or asks of others, fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_page(where: Path | str, width: int = 1280, *, dark: bool = False) -> Any:
        address = where if isinstance(where, str) else where.as_uri()
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda one: None if one.url.startswith((address, "blob:")) else complaints.append(one.url))
        page.goto(address)
        page.set_default_timeout(10_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def one(tmp_path: Path, opened: Open) -> Any:
    """The page of one run."""
    write_report([make_run(tmp_path / "run")], tmp_path / "report.html")
    return opened(tmp_path / "report.html")


@pytest.fixture
def three(tmp_path: Path, opened: Open) -> Any:
    """The page of three runs, called fast, slow and stopped."""
    make_run(tmp_path / "runs/slow", rate=4.0, config={"optimizer": {"lr": 0.01}, "seed": 0})
    make_run(tmp_path / "runs/fast", rate=1.0, config={"optimizer": {"lr": 0.5}, "seed": 0})
    stopped = {"outcome": "preempted", "message": "stopped by a signal"}
    make_run(tmp_path / "runs/stopped", rate=1.5, num_steps=50, ending=stopped)
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    return opened(tmp_path / "report.html")


def figure(page: Any, title: str) -> Any:
    return page.locator("figure").filter(has=page.locator("figcaption b", has_text=re.compile(f"^{title}$")))


def chart(page: Any, title: str) -> Any:
    """What a chart draws: its limits, and its lines by label."""
    settle(page)
    return page.evaluate(
        """(title) => {
          const { plot, lines, limits } = charts.get(title);
          return { x: [plot.scales.x.min, plot.scales.x.max], y: [plot.scales.y.min, plot.scales.y.max], ...limits,
            lines: Object.fromEntries(lines.map((line) => [line.label + (line.faint ? " raw" : ""), line])) };
        }""",
        title,
    )


def settle(page: Any) -> None:
    """Wait until what was chosen is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def wait_for(page: Any, condition: str) -> None:
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):  # the page's policy forbids what Playwright's own waiting does
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def test_a_first_value_does_not_spoil_an_axis(one: Any) -> None:
    accuracy = chart(one, "accuracy")
    assert accuracy["y"][0] > 0.7
    assert accuracy["numOutside"] == 1  # the evaluation after step 10: 0.1
    assert "1 value outside" in figure(one, "accuracy").inner_text()
    one.locator("#outliers").check()
    assert chart(one, "accuracy")["y"][0] < 0.1
    assert chart(one, "accuracy")["numOutside"] == 0


def test_the_x_axis_is_steps_epochs_examples_or_time(one: Any) -> None:
    assert chart(one, "loss")["x"] == [1, 100]
    for axis, ends in (("epoch", [0.1, 10]), ("examples", [64, 6400]), ("time", [1, 100])):
        one.locator("#axis").select_option(axis)
        found = chart(one, "loss")
        assert found["x"] == pytest.approx(ends), axis
        assert found["lines"]["train"]["xs"][49] == pytest.approx(ends[1] / 2), axis
        assert found["lines"]["eval"]["xs"][0] == pytest.approx(ends[1] / 10), axis


def test_smoothing_averages_and_leaves_the_values_faint(one: Any) -> None:
    def spread(values: list[float]) -> float:
        return max(values[20:]) - min(values[20:])

    one.locator("#smoothing").fill("0.95")
    lines = chart(one, "gradient norm")["lines"]
    assert lines.keys() == {"train", "train raw"}
    assert spread(lines["train"]["ys"]) < 0.7 * spread(lines["train raw"]["ys"])
    assert lines["train"]["ys"][0] == lines["train raw"]["ys"][0]  # the start has no bias
    one.locator("#smoothing").fill("0")
    assert chart(one, "gradient norm")["lines"].keys() == {"train"}


def test_dragging_zooms_all_charts_and_three_ways_lead_back(one: Any) -> None:
    def drag() -> None:
        over = figure(one, "loss").locator(".u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        one.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
        one.mouse.down()
        one.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60, steps=4)
        one.mouse.up()
        for title in ("loss", "accuracy", "load"):
            assert chart(one, title)["x"] == pytest.approx([25.75, 75.25], abs=0.5), title

    reset = one.locator("#zoom-reset")
    settle(one)
    assert reset.is_disabled()
    ways: list[Callable[[], Any]] = [
        reset.click,
        lambda: figure(one, "accuracy").locator(".u-over").dblclick(),
        lambda: figure(one, "loss").locator(".plot").press("Escape"),
    ]
    for way in ways:
        drag()
        assert chart(one, "loss")["y"][1] < 0.2  # limits of what is in view
        way()
        assert chart(one, "loss")["x"] == [1, 100]


def test_the_pointer_and_the_keyboard_show_values(one: Any) -> None:
    over = figure(one, "loss").locator(".u-over")
    box = over.bounding_box()
    over.hover(position={"x": box["width"] * 49 / 99, "y": 30})
    assert one.locator("#tip").inner_text().split() == ["step", "50", "train", "0.04", "eval", "0.05"]
    one.mouse.move(0, 0)
    assert not one.locator("#tip").is_visible()
    plot = figure(one, "loss").locator(".plot")
    plot.focus()
    plot.press("End")
    assert one.locator("#tip").inner_text().split() == ["step", "100", "train", "0.02", "eval", "0.025"]
    plot.press("Home")
    assert one.locator("#tip").inner_text().split()[:4] == ["step", "1", "train", "2"]
    plot.press("+")
    low, high = chart(one, "loss")["x"]
    assert (low, high) == pytest.approx((1, 50.5), abs=1)
    plot.press("0")
    assert chart(one, "loss")["x"] == [1, 100]
    assert one.evaluate("document.activeElement.className") == "plot"  # drawing again keeps the focus


def test_one_chart_can_be_logarithmic_or_wide_and_charts_can_be_found(one: Any) -> None:
    assert chart(one, "loss")["isLog"]
    figure(one, "loss").get_by_text("log", exact=True).click()
    assert not chart(one, "loss")["isLog"]
    before = figure(one, "loss").bounding_box()["width"]
    figure(one, "loss").get_by_text("wide").click()
    settle(one)
    assert figure(one, "loss").bounding_box()["width"] > 1.8 * before
    one.locator("#charts-filter").fill("NORM")
    settle(one)
    assert one.locator("figcaption b").all_inner_texts() == ["gradient norm"]
    one.locator("#charts-filter").fill("nothing of the kind")
    settle(one)
    assert "No chart has this" in one.inner_text("main")


def test_the_noise_scale_stands_beside_the_minibatch_in_use(one: Any) -> None:
    lines = chart(one, "noise scale")["lines"]
    assert lines["minibatch in use"]["ys"] == [64, 64]
    assert "Suggested minibatch: about 1,000 examples; in use: 64." in figure(one, "noise scale").inner_text()


def test_the_best_stands_beside_the_last(one: Any) -> None:
    assert "eval accuracy\nbest 0.912 at step 100" in one.locator(".tiles").inner_text()


def test_runs_can_be_hidden_sorted_filtered_and_pinned(three: Any) -> None:
    names = three.locator("tbody .run")
    assert names.all_inner_texts() == ["fast", "slow", "stopped"]
    assert three.locator("td.outcome.preempted").evaluate("(cell) => getComputedStyle(cell).color") == "rgb(138, 97, 0)"
    three.locator("#run\\ slow").uncheck()
    assert {line.split()[0] for line in chart(three, "loss")["lines"]} == {"fast", "stopped"}
    three.get_by_role("button", name="eval loss", exact=True).click()
    settle(three)
    assert names.all_inner_texts() == ["fast", "stopped", "slow"]
    three.get_by_role("button", name="eval loss ↑").click()
    settle(three)
    assert names.all_inner_texts() == ["slow", "stopped", "fast"]
    for text, wanted in (("lr>0.05", ["stopped", "fast"]), ("preempted", ["stopped"]), ("lr=0.5 fast", ["fast"])):
        three.locator("#runs-filter").fill(text)
        settle(three)
        assert names.all_inner_texts() == wanted, text
    three.locator("#runs-filter").fill("")
    settle(three)
    three.get_by_role("button", name="pin steps").click()
    settle(three)
    assert three.locator("table.runs th .sort").all_inner_texts()[:3] == ["run", "steps", "state"]
    assert three.evaluate("document.activeElement.id") == "pin steps"
    three.locator(".scrolled").first.evaluate("(place) => { place.scrollLeft = 400; }")
    left = three.locator("table.runs").evaluate("(table) => table.parentElement.getBoundingClientRect().left")
    assert abs(three.locator("tbody td").first.bounding_box()["x"] - left) < 25
    three.get_by_label("draw all runs").check()
    assert {line.split()[0] for line in chart(three, "loss")["lines"]} == {"fast", "slow", "stopped"}


def test_only_what_differs_and_bars_of_one_scale(three: Any) -> None:
    text = three.locator("section[aria-label='what was run']").inner_text()
    assert "Plan: the same in all" in text
    assert "Configuration: what differs" in text
    rows = three.locator(".differing").last.locator("tbody tr")
    assert rows.count() == 1
    assert rows.inner_text().split() == ["optimizer.lr", "0.5", "0.01", "0.1"]
    assert three.locator(".bar").count() == 3


def test_curves_as_csv(three: Any) -> None:
    three.locator("#run\\ slow").uncheck()
    settle(three)
    with three.expect_download() as download:
        three.locator("#csv").click()
    with Path(download.value.path()).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"fast", "stopped"}
    assert [float(row["train/loss"]) for row in rows[:2]] == [1.0, 0.5]
    assert rows[9]["eval/auroc"] == "0.9"
    assert re.fullmatch(r"[\w.=-]+\.csv", download.value.suggested_filename)


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (1280, False), (480, True), (480, False)])
def test_nothing_overlaps_or_leaves_the_page(tmp_path: Path, opened: Open, width: int, dark: bool) -> None:
    name = "a-run-with-quite-a-long-name"
    folders = [make_run(tmp_path / f"{name}-{n}", config={"lr": n, "x" * 90: n}) for n in range(3)]
    for name, of in (("one", folders[:1]), ("three", folders)):
        write_report(of, tmp_path / f"{name}.html")
        page = opened(tmp_path / f"{name}.html", width, dark=dark)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        overlaps = """() => {
          const parts = document.querySelectorAll("figure, .card, .toolbar");
          const all = [...parts].map((one) => one.getBoundingClientRect());
          return all.filter((a, i) => all.some((b, j) => i < j &&
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)).length;
        }"""
        assert page.evaluate(overlaps) == 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 27)" if dark else "rgb(246, 247, 249)")
        drawn = page.evaluate("charts.get('loss').plot.series[1].stroke()")
        assert drawn == ("#6ea3ff" if dark else "#2563d0")
    if width == 480:
        rows = page.locator("table.runs tbody tr")
        assert rows.first.inner_text().split()[0] == f"{folders[0].name}"
        assert not page.locator("table.runs thead").is_visible()
        assert page.locator("table.runs").evaluate("(one) => one.scrollWidth <= one.clientWidth + 1")


def test_hostile_names_are_only_names(tmp_path: Path, opened: Open) -> None:
    folders = []
    for name in ("<script>document.title='owned'<", "<img src=x onerror=alert(1)>"):
        folder = make_run(tmp_path / name, config={NASTY: name, "model": {"name": NASTY}})
        write_lines(folder, [{"step": 101, f"train/{NASTY}": 1.0, f"eval/{NASTY}": 1.0}], "a")
        record = json.loads((folder / "run.json").read_text())
        record["plan"][NASTY] = record["environment"][NASTY] = record["ending"]["message"] = NASTY
        (folder / "run.json").write_text(json.dumps(record))
        folders.append(folder)
    for of in (folders[:1], folders):
        write_report(of, tmp_path / "report.html")
        page = opened(tmp_path / "report.html")
        assert "owned" not in page.title() or len(of) == 1  # of one run the title is its name
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 2
        assert folders[0].name in page.inner_text("main")
        assert NASTY.replace("</", "</") in page.inner_text("main")


def test_numbers_are_those_of_the_terminal(one: Any) -> None:
    values = [0, 1, 12, 999.5, 1000, 12345.6, 1e8, 2.5e9, 0.1, 0.0123456, 1e-4, 4.56e-7, -3.14159, -12345.6, 0.99995]
    for unit in ("", "bytes", "seconds"):
        wanted = [short(value, unit) for value in values]
        assert one.evaluate("([values, unit]) => values.map((value) => short(value, unit))", [values, unit]) == wanted
    steps = {0: "0", 1500: "1,500", 10_000: "10k", 123_456: "123,456", 3_000_000: "3M"}
    assert one.evaluate("(steps) => steps.map(whole)", list(steps)) == list(steps.values())


def test_a_long_history_opens_at_once(tmp_path: Path, opened: Open) -> None:
    write_report([make_run(tmp_path / "run", num_steps=20_000)], tmp_path / "report.html")
    took = []
    for _ in range(3):  # the quickest: the machine may be busy
        page = opened(tmp_path / "report.html")
        took.append(page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart"))
    assert min(took) < 1000
    lines = chart(page, "gradient norm")["lines"]
    assert len(lines["train"]["xs"]) <= 2000
    assert (min(lines["train"]["ys"]), max(lines["train"]["ys"])) == (1.0, pytest.approx(1.6))


def test_a_page_without_curves(tmp_path: Path, opened: Open) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("")
    (folder / "run.json").unlink()
    write_report([folder], tmp_path / "report.html")
    assert "Nothing has been logged yet." in opened(tmp_path / "report.html").inner_text("main")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, as a running run does: in another process."""
    code = "import sys, pathlib; from mbgd.files import folder_lock as f; "
    code += "held = f.take(pathlib.Path(sys.argv[1])); print(held, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert "FolderLock" in holder.stdout.readline()
        yield
        assert holder.stdin
        holder.stdin.close()


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    with Server([folder]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_a_running_run_is_followed(tmp_path: Path, opened: Open) -> None:
    folder = make_run(tmp_path / "run", num_steps=40, ending=None, numbers={"steps": 100})
    (folder / "summary.json").unlink()
    with locked(folder), served(folder) as server:
        page = opened(server.address)
        assert "running, 40 % of 100 steps" in page.inner_text("header")
        page.locator("#smoothing").fill("0.5")
        figure(page, "loss").get_by_text("wide").click()
        write_lines(folder, [line_of(step) for step in range(41, 61)], "a")
        wait_for(page, "data.runs[0].curves['train/loss'].x.at(-1) === 60")
        found = chart(page, "loss")
        assert found["x"] == [1, 60]
        assert "train raw" in found["lines"]  # what the reader has chosen stays
        assert "wide" in figure(page, "loss").get_attribute("class")
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"ending": {"outcome": "finished", "message": ""}}))
        wait_for(page, "document.querySelector('header .outcome').textContent === 'finished'")


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg=="
)


def observe(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    (folder / "observed").mkdir(exist_ok=True)
    (folder / f"observed/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_histograms_of_the_layers(tmp_path: Path, opened: Open) -> None:
    folder = make_run(tmp_path / "run")
    some = {"size": 16, "zero": 4, "low": -2, "negative": [0, 4], "positive": [8, 0]}
    lines = [{"step": step, "layers": [{"name": NASTY, "parameters": some}]} for step in (1, 10, 100)]
    lines[-1]["layers"][0]["gradients"] = some | {"low": 3}
    observe(folder, "histograms", lines)
    write_report([folder], tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    panel = page.locator("section[aria-label=panels]")
    assert "After steps 1, 10, 100, the last in front" in panel.inner_text()
    assert panel.locator("figcaption").inner_text() == NASTY
    assert panel.locator(".ridges").count() == 2
    assert panel.locator(".ridges").first.locator("path").count() == 3
    bins = page.evaluate("(one) => shares(one, -2, 1)", some)
    assert bins == [0, 0.25, 0, 0.25, 0.5, 0, 0]  # −2 to −1, −1 to −½, −½ to −¼, 0, ¼ to ½ …


def test_predictions_of_examples(tmp_path: Path, opened: Open) -> None:
    folder = make_run(tmp_path / "run")
    guesses = [{"label": "4", "probability": 0.75}, {"label": NASTY, "probability": 0.25}]
    token = {"target": "s", "predicted": NASTY, "probability": 0.5}
    lines = [
        {
            "step": step,
            "examples": [
                {"png": PIXEL, "target": target, "predicted": guesses},
                {"text": "the end", "tokens": [token, token | {"predicted": "s"}]},
            ],
        }
        for step, target in ((10, "9"), (20, "9"))
    ]
    lines[1]["examples"][0]["predicted"] = [{"label": "9", "probability": 1.0}]
    observe(folder, "predictions", lines)
    write_report([folder], tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    first = page.locator(".example").first
    assert first.inner_text().split() == ["✓", "9", "9", "100", "%"]
    assert first.locator("img").evaluate("(one) => one.naturalWidth") == 1
    assert page.locator(".token.wrong").count() == 1
    assert page.locator(".token.wrong").get_attribute("title") == f"50 %; most probable: {NASTY}"
    page.locator("section[aria-label=panels] select").select_option("step 10")
    settle(page)
    assert "✗" in first.inner_text()
    assert NASTY in first.inner_text()


def test_drawing_again_keeps_the_keyboard_and_the_pointer_where_they_are(one: Any) -> None:
    button = figure(one, "loss").get_by_role("button", name="logarithmic axis")
    button.focus()
    button.press("Enter")
    assert not chart(one, "loss")["isLog"]
    assert one.evaluate("document.activeElement.id") == "log loss"
    figure(one, "loss").locator(".u-over").hover(position={"x": 200, "y": 30})
    before = one.locator("#tip").inner_text()
    one.evaluate("changed('data')")
    settle(one)
    assert one.locator("#tip").is_visible()
    assert one.locator("#tip").inner_text() == before


def test_of_many_runs_ten_are_drawn_at_first(tmp_path: Path, opened: Open) -> None:
    for number in range(12):
        make_run(tmp_path / f"runs/{number:02}", num_steps=20)
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    assert "12 of 12 runs, 10 drawn" in page.inner_text("main")
    assert len(chart(page, "auroc")["lines"]) == 10
    page.locator("tbody tr").nth(3).hover()
    settle(page)
    alphas = page.evaluate("charts.get('auroc').plot.series.slice(1).map((one) => one.alpha)")
    assert alphas == [1 if number == 3 else 0.25 for number in range(10)]
