"""What the documents name is there: files, links, functions, tests, the version."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "mbgd").rglob("*.md")]
OF_NOW = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # which also tells of what was
NAMED_FILE = re.compile(r"(?<![\w./-])(?:mbgd|tests|benchmarks|examples|conf|launch)/[a-z0-9_./-]+\.(?:py|yaml|sh)\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ROW = re.compile(r"^\| `(mbgd/[a-z0-9_/]+\.py)` \| ([^|]+) \|", re.MULTILINE)


def by_name(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", sorted(paths), ids=lambda path: str(path.relative_to(ROOT)))


@by_name(OF_NOW)
def test_files_that_are_named_are_there(path: Path) -> None:
    missing = [named for named in NAMED_FILE.findall(path.read_text()) if not (ROOT / named).exists()]
    assert not missing


@by_name(DOCUMENTS)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    broken = []
    for link in LINK.findall(path.read_text()):
        target, _, heading = link.partition("#")
        if not target.startswith(("http:", "https:")):
            file = (path.parent / target) if target else path
            if not file.exists() or (heading and heading not in headings(file)):
                broken.append(link)
    assert not broken


def headings(path: Path) -> list[str]:
    """As GitHub links to them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_functions_that_architecture_follows_are_there() -> None:
    rows = ROW.findall((ROOT / "docs/architecture.md").read_text())
    assert len(rows) > 40
    for file, names in rows:
        there = defined(ast.parse((ROOT / file).read_text()))
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in there, f"{file}: {name}"


def defined(tree: ast.Module | ast.ClassDef, prefix: str = "") -> set[str]:
    """The classes, functions and methods of a module."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(f"{prefix}{node.name}")
        if isinstance(node, ast.ClassDef):
            found |= defined(node, f"{prefix}{node.name}.")
    return found


def test_tests_that_contributing_names_are_there() -> None:
    for row in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        files = re.findall(r"tests/test_\w+\.py", row)
        there = set().union(*(defined(ast.parse((ROOT / file).read_text())) for file in files))
        names = set(re.findall(r"`(test_\w+)`|::(test_\w+)", row))
        assert {one or other for one, other in names} <= there, row


def test_every_page_is_in_the_index() -> None:
    linked = set(LINK.findall((ROOT / "docs/README.md").read_text()))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked


def test_the_newest_release_in_the_changelog_is_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    releases = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", releases[1])
