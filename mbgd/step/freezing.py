"""Parameters that are not trained at first."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mbgd.config.duration import Duration, check_duration, in_steps
from mbgd.errors import UsageError
from mbgd.step.done import Done
from mbgd.text.suggestions import matching_none


class Freeze:
    """Parameters whose names match a pattern get no gradient and do not change; all of them do after `until` steps.

    Patterns are as in a shell: backbone.*. Only the parameters are frozen: a frozen BatchNorm's statistics move on
    unless the module is in evaluation mode.
    """

    name = "freeze"

    def __init__(self, patterns: Sequence[str], until: Duration | None = None) -> None:
        """until: the steps after which the parameters are trained like the others; None: they stay frozen."""
        if isinstance(patterns, str) or not patterns or not all(isinstance(one, str) and one for one in patterns):
            raise UsageError(f"freeze={patterns!r}; it takes a list of patterns of names, such as [backbone.*].")
        if until is not None:
            check_duration("unfreeze.at", until, least=1)
        self.patterns, self.until = list(patterns), until
        self._frozen: list[nn.Parameter] = []

    def before_training(self, trainer: Any) -> None:
        """UsageError where a pattern matches no parameter, none is left to train, or the run ends before `until`."""
        given, num_steps = self.until, trainer.setup.num_steps
        if given is not None:
            self.until = in_steps(given, trainer.setup.plan)
            if 0 < num_steps <= self.until:
                raise UsageError(
                    f"unfreeze.at={given}, but the run ends after step {num_steps}: the frozen parameters would never "
                    "be trained. Make it smaller, train longer, or set null to keep them frozen."
                )
        by_name: dict[str, nn.Parameter] = trainer.setup.trained.by_name
        for pattern in self.patterns:
            matched = [parameter for name, parameter in by_name.items() if fnmatchcase(name, pattern)]
            if not matched:
                raise UsageError(matching_none("freeze", pattern, by_name))
            self._frozen += [parameter for parameter in matched if parameter.requires_grad]
            self._set(requires_grad=False)
        if not any(parameter.requires_grad for parameter in by_name.values()):
            raise UsageError(f"freeze={self.patterns} leaves no parameter to train. Leave some out.")

    def after_update(self, done: Done) -> None:
        if done.step + 1 == self.until:
            self._set(requires_grad=True)

    def state_dict(self) -> dict[str, Any]:
        return {"is_frozen": not any(parameter.requires_grad for parameter in self._frozen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._set(requires_grad=not state["is_frozen"])

    def _set(self, *, requires_grad: bool) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(requires_grad)
