"""Calls Hydra's `main()`, and explains mistakes in a command in our own words."""

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from mbgd.building import switching
from mbgd.building.configuration import OURS, spelled_out
from mbgd.config import Config
from mbgd.config.renamed import RENAMED_BEGINS, new_name
from mbgd.errors import USAGE, UsageError
from mbgd.text.suggestions import did_you_mean

MOST_LINES = 5
"""Lines kept of Hydra's message about one mistake."""


def check_arguments(arguments: Sequence[str], groups: Path = OURS) -> None:
    """UsageError for arguments that Hydra would not read, or whose mistake it would not explain."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}. `mbgd train --help` shows what there is.")

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(list(arguments))
    for argument in arguments:
        if problem := _no_choice(argument, groups) or _left_out(argument, groups):
            raise UsageError(problem)


def call(task: Callable[[Any], None], configuration: Path, arguments: Sequence[str]) -> int:
    """Let Hydra compose the configuration and call the task with it, here or, in a sweep, as jobs; the exit code.

    configuration: the file to compose; its folder has the valid names. UsageError if the arguments have a mistake.
    """
    import hydra
    from hydra._internal import utils
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    check_arguments(arguments, configuration.parent)
    sys.argv[1:] = spelled_out(arguments)
    switching.keys_stay_with_their_choice()
    # Otherwise Hydra prints exceptions itself and ends the process.
    utils.run_and_report = lambda func: func()
    try:
        hydra.main(version_base="1.3", config_path=str(configuration.parent), config_name=configuration.stem)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        said, remedy = brief(error), hint(error, configuration)
        if remedy.startswith(RENAMED_BEGINS):
            said = said.splitlines()[0]  # the rest says how to add the old key
        told = UsageError("\n".join(filter(None, (said, remedy))))
        told.exit_code = getattr(error, "exit_code", USAGE)
        raise told from error
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise UsageError(stop.code.removeprefix("error: ")) from stop
        return int(stop.code or 0)
    return 0


def brief(error: Exception) -> str:
    """Hydra's message about a mistake, in few lines."""
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException):
        first = str(error).splitlines()[0].rstrip(".")
        return f"{first}. There are {', '.join(error.options)}." if error.options else f"{first}."
    said = [str(error), *([str(error.__cause__)] if error.__cause__ is not None else [])]
    lines = [line.strip() for text in said for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return "\n".join(kept[:MOST_LINES])


def _no_choice(argument: str, groups: Path) -> str:
    """What is wrong with `model=` and `model=null`, which Hydra does not explain well."""
    key, _, value = argument.lstrip("+").partition("=")
    if (
        "=" not in argument
        or not {"", "null"} & set(value.split(","))
        or not re.fullmatch(r"[\w/]+", key)
        or not (groups / key).is_dir()
    ):
        return ""
    choices = ", ".join(sorted(path.stem for path in (groups / key).glob("*.yaml")))
    out = "without it there is none" if key == "experiment" else f"~{key} leaves the group out"
    return f"{argument} names none of the choices of {key} ({choices}); {out}."


def _left_out(argument: str, groups: Path) -> str:
    """What is wrong with `~epochs`: a value that conf/ does not state would count, or none."""
    key = argument[1:].partition("=")[0]
    section = key.partition(".")[0]
    if not argument.startswith("~") or (groups / section).is_dir() or section not in get_type_hints(Config):
        return ""
    return f"{argument} leaves out a setting that is needed. Give it a value: {key}=…, or {key}=null where it may be."


def _how_to_quote(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override} is neither an option nor key=value."
    if re.match(r"""\{\s*["']""", value):
        return (
            f"Hydra cannot read the value of {key}. The keys of a dict stand without quotation marks, and the whole in "
            f"quotation marks for the shell, such as {shlex.quote(key + '={name: value}')}"
        )
    if value[:1] in ("[", "{"):
        example = shlex.quote(f'{key}=["a b", c]')
        return (
            f"Hydra cannot read the value of {key}. Put a list or a dict in quotation marks for the shell, and "
            f"texts with spaces or accents inside it in quotation marks of their own, such as {example}"
        )
    escaped = re.sub(r'(\\*)"', r"\1\1\"", re.sub(r"(\\+)$", r"\1\1", value))
    return (
        f"Hydra cannot read the value of {key}. Put one with spaces, accents, brackets, commas or quotation marks "
        "in quotation marks of its own, inside those for the shell: " + shlex.quote(f'{key}="{escaped}"')
    )


def check_sources(sources: Iterable[Any]) -> None:
    """UsageError if a folder of `hydra.searchpath` does not exist; Hydra would go on without it."""
    from hydra._internal.sources_registry import SourcesRegistry

    for source in sources:
        if source.provider.startswith("hydra.searchpath"):
            kind = SourcesRegistry.instance().resolve(source.schema)
            path = f"{source.schema}://{source.path}"
            if not kind(source.provider, path).available():
                raise UsageError(f"{path}, named by {source.provider}, is not there. Correct hydra.searchpath.")


def hint(error: BaseException | None, configuration: Path) -> str:
    """Similar names, if Hydra knows no such key or choice; otherwise an empty text."""
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        MissingConfigException,
        OverrideParseException,
    )

    if isinstance(error, OverrideParseException):
        return _how_to_quote(error.override)
    if isinstance(error, MissingConfigException):
        return did_you_mean(Path(error.missing_cfg_file or "").name, error.options or []).lstrip()
    if isinstance(error, ConfigCompositionException) and (named := re.search("'([^']+)'", str(error))):
        name = named[1]
        if new := new_name(name):
            return new.lstrip()
        return did_you_mean(name, (key for key in _keys(configuration, name) if key != name)).lstrip()
    if isinstance(error, HydraException) and "does not support sweep type" in str(error):
        return "A sweep over an interval needs a sweeper that searches: hydra/sweeper=optuna (docs/sweeps.md)."
    return ""


def _keys(configuration: Path, unknown: str) -> Iterator[str]:
    """Every key and group of the configuration, composed with the valid choices of the command line."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    choices = [one for one in sys.argv[1:] if re.fullmatch(r"\+?[\w/]+=[\w-]+", one)]
    choices = [one for one in choices if one.lstrip("+").split("=")[0] != unknown]
    with initialize_config_dir(str(configuration.parent), version_base="1.3"):
        try:
            composed = compose(configuration.stem, choices, return_hydra_config=True)
        except HydraException:
            composed = compose(configuration.stem, return_hydra_config=True)
    keys = [*(str(group) for group in composed.hydra.runtime.choices), *_paths(OmegaConf.to_container(composed))]
    yield from (key for key in keys if key.startswith("hydra") == unknown.startswith("hydra"))


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")
