"""Keys that a configuration file sets for one choice of a group, such as an experiment's `optimizer.lr` for adamw, do
not apply to another: they are dropped where the command line chooses differently. Sections whose keys are users' own
names take new keys."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

NAMED_BY_USERS = ("init.rename", "evaluation.metrics", "observers")

dropped: list[str] = []
"""One message for each file of the last composition whose keys were dropped."""


def keys_stay_with_their_choice() -> None:
    """From now on Hydra composes by this rule."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    composed_by_hydra = ConfigLoaderImpl._compose_config_from_defaults_list
    if composed_by_hydra is not _compose:
        _by_hydra[:] = [composed_by_hydra]
        ConfigLoaderImpl._compose_config_from_defaults_list = _compose  # type: ignore[method-assign]


_by_hydra: list[Any] = []


def _compose(self: Any, defaults: Sequence[Any], repo: Any) -> Any:
    """Replaces Hydra's method of the same meaning. defaults: the files to merge, in order."""
    files = [_File(default, repo) for default in defaults if not default.config_path.startswith("hydra/")]
    of_primary = next((one.choices for one in files if one.is_primary), {})
    of_all = of_primary | {group: name for one in files if not one.is_primary for group, name in one.choices.items()}
    chosen = {one.group: one for one in files if one.group and one.package == one.group.replace("/", ".")}
    strange: dict[str, list[str]] = {}
    dropped.clear()
    for one in files:
        for group, now in chosen.items():
            meant = one.choices.get(group, of_all.get(group))
            if one.is_global and meant is not None and meant != now.name and (keys := one.keys(now.package)):
                strange.setdefault(one.path, []).append(now.package)
                dropped.append(
                    f"{one.shown} sets {', '.join(keys)} for {group}={meant}; with {group}={now.name} that does not "
                    "apply"
                )
    composed = _by_hydra[0](self, defaults, _Without(repo, strange) if strange else repo)
    _let_users_name(composed)
    return composed


def _let_users_name(composed: Any) -> None:
    """Open the sections whose keys are names that users give: `init.rename={l.*: x.*}` needs no + then."""
    from omegaconf import DictConfig, OmegaConf

    for name in NAMED_BY_USERS:
        node = OmegaConf.select(composed, name, throw_on_missing=False)
        if isinstance(node, DictConfig):
            OmegaConf.set_struct(node, False)


class _File:
    """A configuration file in the composition."""

    def __init__(self, default: Any, repo: Any) -> None:
        from omegaconf import OmegaConf

        self.path, self.package = default.config_path, default.package or ""
        self.group, _, self.name = self.path.rpartition("/")
        self.is_primary = default.primary
        self.is_global = self.package in ("", "_global_")
        loaded = repo.load_config(config_path=self.path) if self.is_global else None
        self._config: Any = loaded.config if loaded is not None else OmegaConf.create()
        self.choices = dict(_choices(loaded.defaults_list or [])) if loaded is not None else {}
        """Group → name, as the file's defaults list says."""

    @property
    def shown(self) -> str:
        return f"{self.group}={self.name}" if self.group else f"{self.name}.yaml"

    def keys(self, package: str) -> list[str]:
        """The values that the file sets in a package, by full names."""
        from omegaconf import OmegaConf

        node = OmegaConf.select(self._config, package, throw_on_missing=False)
        return list(_leaves(node, package)) if OmegaConf.is_config(node) else []


class _Without:
    """Hydra's repository of files, but some files without the keys of some packages."""

    def __init__(self, repo: Any, strange: dict[str, list[str]]) -> None:
        self._repo, self._strange = repo, strange

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repo, name)

    def load_config(self, config_path: str) -> Any:
        from omegaconf import OmegaConf

        loaded = self._repo.load_config(config_path=config_path)
        if config_path in self._strange:
            loaded = copy.copy(loaded)
            loaded.config = copy.deepcopy(loaded.config)
            for package in self._strange[config_path]:
                outer, _, last = package.rpartition(".")
                node = OmegaConf.select(loaded.config, outer) if outer else loaded.config
                node.pop(last)
        return loaded


def _choices(defaults_list: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for default in defaults_list:
        name = getattr(default, "value", None)
        if isinstance(name, str) and "${" not in name:
            yield default.group.lstrip("/"), name


def _leaves(node: Any, name: str) -> Iterator[str]:
    from omegaconf import DictConfig

    if not isinstance(node, DictConfig):
        yield name
        return
    for key, value in node.items_ex(resolve=False):
        yield from _leaves(value, f"{name}.{key!s}")
