"""Shell scripts have no fault that shellcheck knows; skipped where it is missing (pip install '.[dev]' installs it)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path
    for folder in ("launch", "benchmarks", "examples", "mbgd")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") and not path.is_symlink()
)


def shellcheck(path: Path) -> subprocess.CompletedProcess[str]:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if found is None:
        pytest.skip("shellcheck is not installed")
    command = [found, "--shell=bash", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_without_known_faults(path: Path) -> None:
    done = shellcheck(path)
    assert done.returncode == 0, done.stdout


def test_a_fault_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "wrong.sh").write_text("#!/usr/bin/env bash\nrm -r $1\n")
    assert "SC2086" in shellcheck(tmp_path / "wrong.sh").stdout
    assert {"local.sh", "multinode.sh", "slurm.sbatch"} <= {path.name for path in SCRIPTS}
