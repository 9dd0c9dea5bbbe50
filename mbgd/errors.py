"""What ends a run early: mistakes of the user's, workers that are gone, a cluster that wants its machines back."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

FAILED = 1
"""Exit code where training failed."""

USAGE = 2
"""Exit code where nothing has begun, because the command or the configuration has a mistake."""


class UsageError(ValueError):
    """A mistake of the user's, whose message alone teaches: what was wrong, what was got, the rule, the remedy."""

    exit_code = USAGE
    """FAILED where training had begun."""


class WorkersLost(RuntimeError):  # noqa: N818  (the workers are the error)
    """Other workers did not come to an exchange; says which, as far as can be found out."""


class Preempted(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop, by a signal, and has saved its state after so many steps."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}")
        self.step = step
        self.folder = ""


class ReplicasDiffer(RuntimeError):  # noqa: N818  (the replicas are the error)
    """The workers' copies of the state are no longer the same; names the tensors, the workers and the step."""


class ComputedWrongly(RuntimeError):  # noqa: N818  (as above)
    """A worker has computed other bits than the others; names the step, the micro-batch, the worker and its device."""


class NotSaved(Exception):  # noqa: N818  (as above)
    """The run was asked to stop, by a signal, and its state could not be saved; says what there is to go on from."""

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(f"stopped by a signal after step {step}, but {problem}")


@contextmanager
def optional(failure: str, consequence: str) -> Iterator[None]:
    """Whatever is raised inside, but for Ctrl-C, becomes a warning: what failed, why, and what follows from it."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        warn(failure, error, consequence)


def warn(failure: str, error: BaseException, consequence: str) -> None:
    with suppress(Exception):  # standard output may be what failed
        print(f"warning: {failure} ({type(error).__name__}: {error}). {consequence}", flush=True)
