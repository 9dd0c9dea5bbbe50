"""`mbgd new FOLDER`: makes a project to begin with, which has its own model, dataset and objective."""

import argparse
import shutil
from pathlib import Path

from mbgd.errors import UsageError

DESCRIPTION = "make a folder with a model, a dataset, an objective, conf/ and a test of your own to begin with"
PROJECT = Path(__file__).parent / "project"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the folder to make; it must not exist, or be empty")


def main(parsed: argparse.Namespace) -> int:
    folder: Path = parsed.folder
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty. Name a folder that does not exist yet.")
        shutil.copytree(PROJECT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}. Name a folder that you may write to.") from error
    print(f"{folder} is made. Next:\n\n    cd {folder}\n    mbgd train experiment=first workers=2")
    return 0
