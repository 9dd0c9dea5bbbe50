"""What ends a run early: mistakes of the user's, and a cluster that wants its machines back."""


class UsageError(ValueError):
    """A mistake of the user's, whose message alone teaches: what was wrong, what was got, the rule, the remedy."""


class Preempted(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop, by a signal, and has saved its state after so many steps."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}")
        self.step = step
