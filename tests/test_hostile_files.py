"""Run folders that a mistake, another version or an attacker has written: resumed right, put aside, or refused.

Every field of every file of a real run's folder is changed (type, range, absence, nesting, encoding), hashes made right
again, and the run started anew from it. Whatever is changed: it ends as the run that nobody disturbed, or is refused in
one message; never a traceback, never slow, never another result.
"""

import copy
import hashlib
import json
import os
import random
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mbgd.__main__ import main as mbgd_main
from mbgd.checkpoints import format as checkpoint
from mbgd.config import Resume
from mbgd.errors import UsageError
from mbgd.files.run_files import seal
from mbgd.runs.resume import resume

from small_runs import PLAIN, lines, prepare, train

STOP_AT = 5
MOST_SECONDS = 10.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(a run that was stopped, one that is complete, the hash that it ends with)."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "stopped", stop_at=STOP_AT)
    wanted = train(folder / "complete")
    assert wanted is not None
    assert [path.name[-1] for path in checkpoint.complete(folder / "stopped/checkpoints")] == ["5", "4"]
    return folder / "stopped", folder / "complete", wanted


def outcome(folder: Path, wanted: str, what: str) -> str:
    """Start the run of this folder anew and judge how that ends: resumed, complete or refused."""
    started, found, refusal = time.monotonic(), None, ""
    try:
        found = train(folder)
    except UsageError as error:
        refusal = str(error)
    assert time.monotonic() - started < MOST_SECONDS, what
    if refusal:
        assert "\x1b" not in refusal, what
        assert len(refusal) < 3000, what
        return "refused"
    if found is None:
        assert json.loads((folder / "summary.json").read_text())["weights_sha256"] == wanted, what
        assert load_file(folder / "model.safetensors").keys() == {"weight", "bias"}, what
        return "complete"
    assert found == wanted, what
    return "resumed"


# Every field

DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]
MISSING = object()
ESCAPES = "\x1b[31m\n\u202e"
NUMBERS = [True, -5, 0.5, 10**30, float("nan"), float("inf")]
VALUES: list[Any] = [MISSING, None, *NUMBERS, "", "15", ESCAPES, [], {}, [1, 2, 3, 4], {"a": [1]}, DEEP]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every field, containers too."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(len(value)):
            yield from places(value[number], (*path, number))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def mutations(value: Any, each: int | None) -> Iterator[tuple[str, Any]]:
    """(what is changed, the changed value): so many changes of every field, or all."""
    chance = random.Random(0)
    for path in places(value):
        for new in VALUES if each is None else chance.sample(VALUES, each):
            shown = "nothing" if new is MISSING else "deep" if new is DEEP else repr(new)
            yield f"{'.'.join(map(str, path))} = {shown}", changed(value, path, new)


EACH = None if os.environ.get("MBGD_ALL_MUTATIONS") else 3


def resealed(manifest: Any) -> str:
    if "sha256" in manifest:
        manifest["sha256"] = seal(manifest)
    return json.dumps(manifest)


def test_any_field_of_a_manifest(tmp_path: Path, runs: tuple[Path, Path, str], capsys: Any) -> None:
    stopped, _, wanted = runs
    name = f"checkpoints/{checkpoint.name_of(STOP_AT)}"
    manifest = json.loads((stopped / name / "manifest.json").read_text())
    outcomes = set()
    for number, (what, mutated) in enumerate(mutations(manifest, EACH)):
        folder = tmp_path / str(number)
        shutil.copytree(stopped, folder)
        (folder / name / "manifest.json").write_text(resealed(mutated))
        outcomes.add(ended := outcome(folder, wanted, what))
        said = capsys.readouterr().out
        assert "\x1b" not in said
        aside = list(folder.glob("checkpoints/*.broken-0"))
        of_the_optimizer = what.startswith(("values.optimizer", "identity", "values.run"))
        assert ended == "resumed" or of_the_optimizer, what  # what only the run itself can judge it may refuse
        if what.partition(" ")[0] in ("step", "format", "identity", "values", "files", "values.noise_scale"):
            assert aside or ended == "refused", what
            assert ("is broken" in said) == bool(aside), what
        if ended == "resumed":
            assert [line["step"] for line in lines(folder)] == [line["step"] for line in lines(runs[1])], what
        shutil.rmtree(folder)
    assert outcomes == {"resumed", "refused"}


@pytest.mark.parametrize("step", [-5, 0, 4, 15, 900, "5", 5.0, None, float("nan"), True, 2**60])
def test_a_step_that_is_not_the_folders(tmp_path: Path, runs: tuple[Path, Path, str], step: Any, capsys: Any) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    path = tmp_path / "run/checkpoints" / checkpoint.name_of(STOP_AT)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(resealed({**manifest, "step": step}))
    assert train(tmp_path / "run") == runs[2]
    assert "step-000000005 is broken" in capsys.readouterr().out
    assert lines(tmp_path / "run") == lines(runs[1])


def change_summary(folder: Path, content: str) -> None:
    (folder / "summary.json").write_text(content)


@pytest.mark.parametrize("sealed", [True, False])
def test_any_field_of_a_summary(tmp_path: Path, runs: tuple[Path, Path, str], sealed: bool) -> None:
    summary = json.loads((runs[1] / "summary.json").read_text())
    for number, (what, mutated) in enumerate(mutations(summary, EACH or 2)):
        folder = tmp_path / str(number)
        shutil.copytree(runs[1], folder)
        if what.startswith(("weights_sha256", "steps")) and sealed:
            continue  # who gives a false result its right hash is believed
        change_summary(folder, resealed(mutated) if sealed else json.dumps(mutated))
        assert outcome(folder, runs[2], what) in ("complete", "resumed"), what
        if not sealed and mutated.get("sha256") is not None:
            assert (folder / "summary.json.unreadable-0").exists(), what
        shutil.rmtree(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "folder"])
def test_results_whose_model_is_not_what_was_written_are_written_anew(
    tmp_path: Path, runs: tuple[Path, Path, str], damage: str
) -> None:
    shutil.copytree(runs[1], tmp_path / "run")
    model = tmp_path / "run/model.safetensors"
    content = model.read_bytes()
    model.unlink()
    if damage == "folder":
        model.mkdir()
    elif damage != "gone":
        model.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flip" else b""))
    assert train(tmp_path / "run") == runs[2]
    assert model.read_bytes() == content
    assert train(tmp_path / "run") is None


def test_any_field_of_a_configuration(tmp_path: Path, runs: tuple[Path, Path, str]) -> None:
    for number, (what, mutated) in enumerate(mutations(PLAIN, EACH or 3)):
        folder = tmp_path / str(number)
        shutil.copytree(runs[0], folder)
        (folder / "config.yaml").write_text(yaml.dump(mutated))
        assert outcome(folder, runs[2], what) == "resumed", what
        shutil.rmtree(folder)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
CONFIGS: dict[str, bytes] = {
    "not UTF-8": b"seed: \xff\n",
    "not YAML": b"a: [1,\n",
    "a list": b"- 1\n",
    "nothing": b"",
    "aliases": LAUGHS.encode(),
    "deep": b"a: " + b"[" * 100_000 + b"]" * 100_000,
    "twice": b"seed: 0\nseed: 1\n",
    "code": b"!!python/object/apply:os.system ['touch executed']\n",
    "no such date": b"seed: 9999-99-99\n",
    "large": b"seed: '" + b"x" * 2_000_000 + b"'\n",
    "control": b"a: \x1b[31m\n",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_cannot_be_read_is_kept_aside(
    tmp_path: Path, runs: tuple[Path, Path, str], kind: str, capsys: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    (folder / "config.yaml").write_bytes(CONFIGS[kind])
    assert outcome(folder, runs[2], kind) == "resumed"
    assert (folder / "config.yaml.unreadable-0").read_bytes() == CONFIGS[kind]
    assert "config.yaml cannot be read" in capsys.readouterr().out
    assert yaml.safe_load((folder / "config.yaml").read_text()) == PLAIN

    shutil.rmtree(folder / "checkpoints")  # now nothing tells whether the run is the same
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_bytes(CONFIGS[kind])
    with pytest.raises(UsageError, match=r"config\.yaml cannot be read.*resume.force=true"):
        train(folder)
    assert (folder / "config.yaml").read_bytes() == CONFIGS[kind]
    assert train(folder, resume=Resume(force=True)) == runs[2]


def nest(depth: int) -> bytes:
    return b'{"step": 1, "a": ' + b"[" * depth + b"]" * depth + b"}\n"


BAD_LINES: dict[str, bytes] = {
    "not UTF-8": b'{"step": 1, "train/loss": "\xff"}\n',
    "a number": b"5\n",
    "no step": b'{"a": 1}\n',
    "a text": b'{"step": "1"}\n',
    "no whole step": b'{"step": 1.5}\n',
    "not a step": b'{"step": NaN}\n',
    "true": b'{"step": true}\n',
    "null": b'{"step": null}\n',
    "before the first": b'{"step": -1}\n',
    "too many": b'{"step": 1' + b"0" * 5000 + b"}\n",
    "twice": b'{"step": 1, "step": 2}\n',
    "nested": b'{"step": 1, "a": {"b": 1}}\n',
    "deep": nest(150),
    "very deep": nest(400_000),
    "half a character": b'{"step": 1, "a": "\\ud800"}\n',
    "empty": b"\n",
    "zeros": bytes(3000) + b"\n",
    "long": b'{"step": 1, "a": "' + b"x" * 2_500_000 + b'"}\n',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_line_that_cannot_be_read_is_kept_aside(
    tmp_path: Path, runs: tuple[Path, Path, str], kind: str, capsys: Any
) -> None:
    folder, bad = tmp_path / "run", BAD_LINES[kind]
    shutil.copytree(runs[0], folder)
    content = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([*content[:2], bad, *content[2:], b'{"step": 5, "train/lo']))
    assert train(folder) == runs[2]
    assert lines(folder) == lines(runs[1])
    kept = [json.loads(line) for line in (folder / "metrics.jsonl.unreadable-0").read_text().splitlines()]
    assert b"".join(line["content"].encode(errors="surrogateescape") for line in kept[:-1]) == bad
    assert {line["line"] for line in kept[:-1]} == {3}
    assert kept[-1]["content"] == '{"step": 5, "train/lo'
    assert "line 3 cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("kind", BAD_LINES)
def test_tools_tell_of_lines_that_they_cannot_read(
    tmp_path: Path, runs: tuple[Path, Path, str], kind: str, capsys: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(BAD_LINES[kind])
    number = len(lines(runs[1])) + 1
    assert tool("report", str(folder)) == 0
    assert f"metrics.jsonl: line {number} cannot be read" in (folder / "report.html").read_text()
    assert tool("compare", str(runs[1]), str(folder)) == 2
    assert f"line {number} cannot be read" in capsys.readouterr().err
    (folder / "job.json").write_text(json.dumps({"number": 0, "swept": {"seed": "0"}, "overrides": []}))
    assert tool("sweep", str(tmp_path)) == 0
    assert f"line {number} cannot be read" in capsys.readouterr().out


def tool(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mbgd", *arguments])
        return mbgd_main()


def test_tools_read_any_field_of_any_file(tmp_path: Path, runs: tuple[Path, Path, str], capsys: Any) -> None:
    """What `report`, `compare`, `checkpoints` and `sweep` make of folders in which one field is another."""
    folder = tmp_path / "sweep/0"
    record = {"number": 0, "swept": {"seed": "0", "optimizer.lr": "0.1"}, "overrides": ["seed=0"], "exit_code": 0}
    contents = {
        "summary.json": json.loads((runs[1] / "summary.json").read_text()),
        "run.json": json.loads((runs[1] / "run.json").read_text()),
        "job.json": record,
        "config.yaml": {**PLAIN, "sweep": {"metric": "eval/loss", "direction": "minimize", "target": 0.5}},
        "checkpoints/step-000000008/manifest.json": json.loads(
            (runs[1] / "checkpoints/step-000000008/manifest.json").read_text()
        ),
    }
    shutil.copytree(runs[1], folder)
    for name, whole in contents.items():
        dump = yaml.dump if name.endswith("yaml") else resealed
        (folder / name).write_text(dump(whole))
    for name, whole in contents.items():
        dump = yaml.dump if name.endswith("yaml") else resealed
        for what, mutated in mutations(whole, EACH and 1):
            (folder / name).write_text(dump(mutated))
            for arguments in (
                ("report", str(folder)),
                ("compare", str(runs[1]), str(folder)),
                ("checkpoints", str(folder)),
                ("sweep", str(folder.parent)),
            ):
                started = time.monotonic()
                with no_plot():
                    code = tool(*arguments)
                assert code in (0, 1, 2), what
                assert time.monotonic() - started < MOST_SECONDS, what
                said = capsys.readouterr()
                assert "\x1b" not in said.out + said.err, what
                assert code != 2 or said.err.startswith("error: "), what
        (folder / name).write_text(dump(whole))


@contextmanager
def no_plot() -> Iterator[None]:
    """Without the picture, which takes a second, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbgd.cli.tools.sweep_plot.plot", lambda ranking, path: None)
        yield


# Tensors


def retensored(path: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors in a checkpoint's file, with hashes that are right."""
    save_file(tensors, path / name)
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(resealed(manifest))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_tensors_that_are_missing_other_or_too_many_are_refused(
    tmp_path: Path, runs: tuple[Path, Path, str], name: str
) -> None:
    whole = load_file(runs[0] / "checkpoints" / checkpoint.name_of(STOP_AT) / name)
    number = 0
    for key, tensor in whole.items():
        for new in (
            None,
            tensor[None],
            tensor.double()[..., None],
            torch.zeros(0),
            torch.zeros(3, 3, dtype=torch.uint8),
        ):
            folder = tmp_path / str(number := number + 1)
            shutil.copytree(runs[0], folder)
            tensors = {one: value for one, value in whole.items() if one != key or new is not None}
            tensors |= {} if new is None else {key: new.contiguous()}
            retensored(folder / "checkpoints" / checkpoint.name_of(STOP_AT), name, tensors)
            if name.startswith("model"):
                assert outcome(folder, runs[2], key) == "refused"
            shutil.rmtree(folder)
    shutil.copytree(runs[0], tmp_path / "more")
    evil = {**whole, "\x1b[31m\nextra": torch.zeros(1)}
    retensored(tmp_path / "more/checkpoints" / checkpoint.name_of(STOP_AT), name, evil)
    with pytest.raises(UsageError, match="extra") as refused:
        train(tmp_path / "more")
    assert "\x1b" not in str(refused.value)


# Files that are not files


def fifo(path: Path) -> None:
    os.mkfifo(path)


def socket_(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its name may be 108 bytes long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("cannot make a device here (needs root)")


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_a_file(path: Path) -> None:
    (path.parent.parent / "elsewhere").write_text("{}")
    path.symlink_to(path.parent.parent / "elsewhere")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 * 2**30)


KINDS = (fifo, socket_, device, Path.mkdir, link, link_to_a_file, huge)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "optimizer.safetensors"])
def test_what_is_no_file_in_a_checkpoint(
    tmp_path: Path, runs: tuple[Path, Path, str], name: str, make: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    path = folder / "checkpoints" / checkpoint.name_of(STOP_AT) / name
    path.unlink()
    make(path)
    assert outcome(folder, runs[2], name) == "resumed"
    assert list(folder.glob("checkpoints/*.broken-0"))


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "name", ["config.yaml", "summary.json", "metrics.jsonl", "run.json", "lock", "logs", "checkpoints"]
)
def test_what_is_no_file_in_a_run(
    tmp_path: Path, runs: tuple[Path, Path, str], name: str, make: Callable[[Path], None]
) -> None:
    if make is huge and name == "metrics.jsonl":
        pytest.skip("may have any length")
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make(path)
    ended = outcome(folder, runs[2], name)
    assert ended == "resumed" or (ended == "refused" and name in ("lock", "logs", "checkpoints", "run.json"))
    for arguments in (("report", str(folder)), ("checkpoints", str(folder)), ("compare", str(runs[1]), str(folder))):
        assert tool(*arguments) in (0, 1, 2)


def test_a_folder_that_is_named_as_a_checkpoint_and_is_none(tmp_path: Path, runs: tuple[Path, Path, str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    path = folder / "checkpoints"
    shutil.copytree(path / checkpoint.name_of(4), path / checkpoint.name_of(900))  # the newest by its name
    (path / checkpoint.name_of(901)).write_text("a file")
    (path / checkpoint.name_of(902)).symlink_to(path / checkpoint.name_of(4))
    for name in ("step-²²²²²²²²²", "step-5", "step-00000000000000000005", "step-x", "step-"):
        (path / name).mkdir()
    assert [checkpoint.step_of(one) for one in checkpoint.complete(path)] == [902, 901, 900, 5, 4]
    assert outcome(folder, runs[2], "names") == "resumed"
    assert {one.name for one in path.glob("*.broken-0")} == {f"step-00000090{n}.broken-0" for n in (0, 1, 2)}


# Another run is only read


def test_resuming_from_another_run_only_reads(tmp_path: Path, runs: tuple[Path, Path, str], capsys: Any) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    saving_now = other / "checkpoints/step-000000006.123.tmp"
    saving_now.mkdir()
    (saving_now / "model.safetensors").write_bytes(b"half")
    (other / "checkpoints" / checkpoint.name_of(STOP_AT) / "model.safetensors").write_bytes(b"broken")

    def state() -> dict[str, Any]:
        return {
            str(path): (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in other.rglob("*")
        }

    before = state()
    assert train(tmp_path / "own", resume=Resume(str(other))) == runs[2]
    assert state() == before
    assert "is passed over" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["nowhere", "a\0b", "x" * 5000, "/dev/zero", "/proc/self/mem"])
def test_a_place_to_resume_from_that_is_none(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError):
        train(tmp_path, resume=Resume(path))


def test_values_of_another_evaluation_are_forgotten(tmp_path: Path, runs: tuple[Path, Path, str]) -> None:
    """Where the evaluations' values of a checkpoint are not those that this configuration gives."""
    other_data = {**PLAIN, "data": {**PLAIN["data"], "evaluation": {"_target_": "another"}}}
    other_metrics = {**PLAIN, "evaluation": {"metrics": {"auroc": {}}}}
    other_batches = {**PLAIN, "evaluation": {"metrics": {}, "batch_size": 3}}
    cases = ((PLAIN, False), (other_data, True), (other_metrics, True), (other_batches, False))
    for number, (plain, forgets) in enumerate(cases):
        trainer, opened, config = prepare(shutil.copytree(runs[0], tmp_path / str(number)))
        assert resume(trainer, opened, config, plain)
        assert "train/loss" in trainer.state.metrics
        assert ("eval/loss" not in trainer.state.metrics) == forgets, plain
    trainer, opened, config = prepare(tmp_path / "own", resume=Resume(str(runs[0])))
    assert resume(trainer, opened, config, PLAIN)
    assert trainer.state.step == STOP_AT
    assert "eval/loss" not in trainer.state.metrics

    shutil.copytree(runs[0], tmp_path / "twice")
    for _ in range(2):  # the second start finds its own configuration, and still the first one's checkpoint
        trainer, opened, config = prepare(tmp_path / "twice")
        assert resume(trainer, opened, config, other_data)
        assert "eval/loss" not in trainer.state.metrics
        opened.write_config(yaml.safe_dump(other_data))
