"""Makes Hydra look in conf/ of the folder where `mbgd train` was started, before mbgd's own."""

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.plugins.search_path_plugin import SearchPathPlugin

from mbgd.building import configuration


class OwnConfiguration(SearchPathPlugin):
    """Does nothing in other applications of Hydra."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in configuration.own:
            search_path.prepend(configuration.PROVIDER, f"file://{folder}", anchor=SearchPathQuery(provider="main"))
