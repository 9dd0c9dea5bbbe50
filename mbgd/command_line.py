"""What stands around Hydra's `main()`: what is wrong with a command in our words, and the result of a sweep."""

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mbgd import plain_output, sweep
from mbgd.errors import UsageError
from mbgd.suggestions import did_you_mean
from mbgd.worker_log import guard_output


def call(main: Callable[[], None], configuration: Path) -> None:
    """Call what `@hydra.main` has made.

    configuration: the file that it composes, from which valid names are taken.
    """
    plain_output.start()
    guard_output()
    for argument in sys.argv[1:]:
        if problem := _no_choice(argument, configuration.parent):
            sys.exit(f"error: {problem}")
    try:
        main()
    except SystemExit as stop:
        # Hydra has printed its error and ends the process; the error is what it was handling.
        if found := hint(stop.__context__, configuration):
            print(found, file=sys.stderr)
        _show_sweep()
        raise
    _show_sweep()


def _no_choice(argument: str, groups: Path) -> str:
    """What is wrong with `model=` and `model=null`, of which Hydra says nothing that helps."""
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


def _how_to_quote(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override} is neither an option nor key=value."
    if value[:1] in ("[", "{"):
        example = shlex.quote(f'{key}=["a b", c]')
        return (
            f"Hydra cannot read the value of {key}. A list or a dict stands in quotation marks for the shell, and "
            f"texts with spaces or accents inside it in quotation marks of their own, such as {example}"
        )
    escaped = re.sub(r'(\\*)"', r"\1\1\"", re.sub(r"(\\+)$", r"\1\1", value))
    return (
        f"Hydra cannot read the value of {key}. One with spaces, accents, brackets, commas or quotation marks stands "
        "in quotation marks of its own, inside those that are for the shell: " + shlex.quote(f'{key}="{escaped}"')
    )


def check_sources(sources: Iterable[Any]) -> None:
    """End with an error where a folder of `hydra.searchpath` is not there; Hydra would go on without it."""
    from hydra._internal.sources_registry import SourcesRegistry

    for source in sources:
        if source.provider.startswith("hydra.searchpath"):
            kind = SourcesRegistry.instance().resolve(source.schema)
            path = f"{source.schema}://{source.path}"
            if not kind(source.provider, path).available():
                sys.exit(f"error: {path}, named by {source.provider}, is not there. Correct hydra.searchpath.")


def _show_sweep() -> None:
    for folder in sweep.to_show:
        from mbgd.tools.sweep import show

        try:
            show(folder)
        except UsageError as error:
            sys.exit(f"error: {error}")


def hint(error: BaseException | None, configuration: Path) -> str:
    """The names that may have been meant where Hydra knows no such key or choice; otherwise nothing."""
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
        return did_you_mean(name, (key for key in _keys(configuration, name) if key != name)).lstrip()
    if isinstance(error, HydraException) and "does not support sweep type" in str(error):
        return "A sweep over an interval needs a sweeper that searches: hydra/sweeper=optuna (docs/sweeps.md)."
    return ""


def _keys(configuration: Path, unknown: str) -> Iterator[str]:
    """Every key and group of the configuration, with those choices of the command line that are valid."""
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
