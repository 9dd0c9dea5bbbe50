"""The folders of configurations: mbgd's own, and conf/ of the current folder."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mbgd.errors import UsageError

OURS = Path(__file__).parent.parent / "conf"
"""In a clone, a link to conf/ of the repository."""

NAME = "train"
"""The configuration that is composed, unless --config-name names another."""

PROVIDER = "this folder"

own: list[Path] = []
"""conf/ of the current folder, if there is one: Hydra looks there first. Set before Hydra is called."""


def find_own(folder: Path) -> Path | None:
    """conf/ of this folder, unless it is mbgd's own; UsageError if it is not a folder."""
    found = folder / "conf"
    if not found.exists() and not found.is_symlink():
        return None
    if not found.is_dir():
        raise UsageError(
            f"{found} is not a folder. mbgd looks for configurations of yours in conf/ of the folder where it is "
            "started: rename the file, or start in another folder."
        )
    return None if found.samefile(OURS) else found


def use_folder(folder: Path) -> None:
    """Also compose with conf/ of this folder, and make the folder's modules importable."""
    found = find_own(folder)
    own[:] = [] if found is None else [found]
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def which_wins(hydra: Any) -> Iterator[str]:
    """Messages for configurations in use that two folders have under the same name.

    hydra: the node `hydra` of the composed configuration.
    """
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    choices = [(group, one) for group, one in hydra.runtime.choices.items() if isinstance(one, str)]
    for config in [hydra.job.config_name, *(f"{group.lstrip('/')}/{one}" for group, one in choices)]:
        paths = [folder / f"{config}.yaml" for folder in folders if (folder / f"{config}.yaml").is_file()]
        used, *others = paths or [Path()]
        for other in others:
            if not other.samefile(used):
                yield f"{_shown(used)} is used, not {_shown(other)}, which has the same name"


def _shown(path: Path) -> str:
    if path.is_relative_to(OURS):
        return f"mbgd's own {path.relative_to(OURS)}"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def spelled_out(overrides: Sequence[str]) -> list[str]:
    """The overrides with resume=VALUE as resume.from=VALUE, so that resume.force can be given beside it."""
    return [re.sub(r"^resume=(?!\{)", "resume.from=", one) for one in overrides]
