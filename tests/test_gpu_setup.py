"""What benchmarks/gpu_setup.sh installs beside torch is enough for `make gpu`, on a machine without a network."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

IMPORTED = """
import importlib, sys

missing = set({missing!r})


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Missing())
sys.path[:0] = [{tests!r}, {benchmarks!r}]
for name in {names!r}:
    importlib.import_module(name)
"""


def needed() -> set[str]:
    """The packages of the script, torch, and what torch needs."""
    [names] = re.findall(r"^NEEDED=\$\{NEEDED:-'([^']*)'\}", (ROOT / "benchmarks/gpu_setup.sh").read_text(), re.M)
    found: set[str] = set()
    waiting = ["torch"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            of_torch = [Requirement(one) for one in distribution(name).requires or []]
        except PackageNotFoundError:
            continue
        waiting += [one.name for one in of_torch if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found | {canonicalize_name(name) for name in names.split()}


def imports(names: tuple[str, ...], packages: set[str]) -> subprocess.CompletedProcess[str]:
    """The import of modules where these packages alone are installed."""
    missing = [
        module
        for module, of in packages_distributions().items()
        if not {canonicalize_name(one) for one in of} & packages and module not in ("mbgd", "__pycache__")
    ]
    program = IMPORTED.format(
        missing=missing, tests=str(ROOT / "tests"), benchmarks=str(ROOT / "benchmarks"), names=names
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_what_runs_on_a_gpu_imports_no_other_package() -> None:
    """One module that cannot be imported would keep pytest from running any test."""
    done = imports(("test_gpu", "test_gpu_ready", "gpu"), needed())
    assert done.returncode == 0, done.stderr


def test_a_package_too_few_is_noticed() -> None:
    done = imports(("test_gpu",), needed() - {"msgspec"})
    assert done.returncode != 0
    assert "No module named 'msgspec'" in done.stderr
