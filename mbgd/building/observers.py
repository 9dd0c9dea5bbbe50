"""The observers of a configuration: those that ship, by keys of their own, and the user's."""

from typing import Any

from mbgd.building.make import make
from mbgd.config import Config
from mbgd.errors import UsageError
from mbgd.evaluation.shown_predictions import ShownPredictions
from mbgd.step.early_stopping import EarlyStopping
from mbgd.step.ema import EMA
from mbgd.step.freezing import Freeze
from mbgd.step.histograms import Histograms


def make_observers(config: Config) -> dict[str, Any]:
    """The observers by name, in the order in which they are called; UsageError where two have one name."""
    shipped: dict[str, Any] = {}
    if config.freeze:
        shipped[Freeze.name] = Freeze(config.freeze, config.unfreeze.at)
    elif config.unfreeze.at is not None:
        raise UsageError(f"unfreeze.at={config.unfreeze.at}, but nothing is frozen. Name parameters in freeze.")
    if config.ema.decay is not None:
        shipped[EMA.name] = EMA(**vars(config.ema))
    if config.histograms.steps is not None:
        shipped[Histograms.name] = Histograms(config.histograms.steps, config.histograms.layers)
    if config.predictions.examples is not None:
        shipped[ShownPredictions.name] = ShownPredictions(config.predictions.examples)
    if config.early_stopping.patience is not None:
        values = {**vars(config.early_stopping), "direction": config.early_stopping.direction.value}
        shipped[EarlyStopping.name] = EarlyStopping(**values)
    if twice := sorted(shipped.keys() & config.observers.keys()):
        raise UsageError(f"observers.{twice[0]} and the key {twice[0]} name one observer. Give yours another name.")
    return shipped | {name: make(f"observers.{name}", node) for name, node in config.observers.items()}
