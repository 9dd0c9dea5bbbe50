"""The house rules: imports run one way, and importing mbgd costs nothing."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "mbgd").rglob("*.py"))
    if "project" not in path.parts  # what `mbgd new` copies
}
LAYERS = """
    __main__
    cli
    torchrun
    explain
    verify
    building
    runs
    report
    trainer
    after_step
    evaluation
    tracking
    step
    checkpoints
    checks
    averaging
    optimizers
    task
    data models
    batches
    measuring schedule
    workers
    config
    files
    text
    errors versions
"""
"""The rooms of mbgd/, top down: one imports from those below it alone. Rooms of one line do not know each other."""
LEVELS = {room: level for level, line in enumerate(LAYERS.split("\n")) for room in line.split()}
PURE = [
    "batches.plan",
    "batches.order",
    "batches.pieces",
    "task.objective",
    "task.losses",
    "config.duration",
    "config.resolved",
    "task.elementwise",
    "config.settings",
    "config.must_match",
    "config.field_types",
    "config.renamed",
    "config.rules",
    "schedule",
    "errors",
    "text.suggestions",
]


def imports(module: str, *, later: bool = False) -> set[str]:
    """Modules imported when this one is; `later`: also those imported in functions or under TYPE_CHECKING."""
    found = set()
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree) if later else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_neither_processes_nor_hydra(name: str) -> None:
    for imported in imports(f"mbgd.{name}"):
        assert not imported.startswith(("torch.distributed", "hydra", "omegaconf")), imported
        if imported in MODULES:
            assert imported.removeprefix("mbgd.") in [*PURE, "config"], imported


def test_only_building_knows_hydra_and_only_tracking_knows_rich() -> None:
    for module in MODULES:
        roots = {imported.split(".")[0] for imported in imports(module)}
        assert module.startswith("mbgd.building") or not roots & {"hydra", "omegaconf"}, module
        assert module.startswith("mbgd.tracking") or not roots & {"rich", "wandb"}, module


def test_imports_between_rooms_run_down() -> None:
    """Those in functions as well."""
    upwards = []
    for module in MODULES.keys() - {"mbgd"}:  # which gives names when asked for them
        room = module.split(".")[1]
        for imported in (imports(module, later=True) & MODULES.keys()) - {"mbgd"}:
            other = imported.split(".")[1]
            if other != room and LEVELS[other] <= LEVELS[room]:
                upwards.append(f"{module} → {imported}")
    assert not upwards, f"imports that do not run down: {sorted(upwards)}; the layers are:\n{LAYERS}"


def test_the_picture_in_the_documentation_is_that_of_the_layers() -> None:
    section = (ROOT / "docs/architecture.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    drawn = [re.split(r"\s{2,}", line.strip())[0].split() for line in section.splitlines() if line.startswith("    ")]
    assert drawn == [line.split() for line in LAYERS.split("\n") if line.strip()]


def test_every_room_says_what_it_is_for() -> None:
    for module, path in MODULES.items():
        if path.stem != "__main__":
            assert ast.get_docstring(ast.parse(path.read_text())), module


def test_there_are_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module in MODULES and module not in done:
            for imported in sorted(imports(module, later=True) - {"mbgd"}):  # which gives names when asked for them
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_there_is_no_drawer_for_everything() -> None:
    assert not [path for path in MODULES.values() if path.stem in ("utils", "helpers", "misc", "common")]


def test_importing_mbgd_imports_nothing_heavy() -> None:
    code = "import sys, mbgd; print(sorted({'torch', 'hydra', 'omegaconf', 'wandb', 'rich'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    heavy = "{'hydra', 'omegaconf', 'wandb', 'rich', 'torchmetrics'}"
    code = f"import sys, mbgd; mbgd.Trainer; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    import mbgd

    assert all(getattr(mbgd, name).__name__.removeprefix("mbgd.") == name for name in mbgd.__all__)


def test_the_version_is_that_of_the_package() -> None:
    import mbgd

    assert mbgd.__version__ == metadata.version("mbgd")


def test_files_and_functions_stay_short() -> None:
    """A file of more than 300 lines says why in its docstring ("Long because …"); a function has at most 50."""
    for module, path in MODULES.items():
        text = path.read_text()
        tree = ast.parse(text)
        is_explained = "Long because" in (ast.get_docstring(tree) or "")
        assert text.count("\n") <= 300 or is_explained, module
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 50, f"{module}: {node.name}"


def test_the_trainer_is_the_loop_and_nothing_else() -> None:
    tree = ast.parse(MODULES["mbgd.trainer"].read_text())
    (trainer,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert trainer.end_lineno is not None
    assert trainer.end_lineno - trainer.lineno < 150
    attributes = {node.attr for node in ast.walk(tree) if _is_set_on_self(node)}
    assert len(attributes) <= 10, attributes


def _is_set_on_self(node: ast.AST) -> bool:
    is_of_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return is_of_self and isinstance(node.ctx, ast.Store)
