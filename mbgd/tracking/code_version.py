"""The version of the code that a run uses, from git."""

import subprocess
from pathlib import Path

SECONDS = 2.0


def code_version(script: str) -> dict[str, str | bool]:
    """The commit of the repository that holds the script, and whether tracked files differ from it; {} without git.

    If the script is the command mbgd, this looks in the current folder instead.
    """
    is_command = not script.endswith(".py") or Path(script).name == "__main__.py"
    folder = Path.cwd() if is_command else Path(script).resolve().parent
    command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.splitlines()
    commits = [line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")]
    return {"commit": commits[0] if commits else "", "dirty": any(not line.startswith("#") for line in lines)}
