"""The exceptions that end a run early: the user's mistakes, lost workers, preemption."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

FAILED = 1
"""Exit code if training failed."""

USAGE = 2
"""Exit code if nothing has begun, because the command or the configuration has a mistake."""


class UsageError(ValueError):
    """A mistake of the user's; the message is enough to fix it: what was wrong, what was got, the rule, the remedy."""

    exit_code = USAGE
    """FAILED if training had begun."""


class WorkersLost(RuntimeError):  # noqa: N818  (the workers are the error)
    """Other workers did not come to an exchange; names them as far as known."""


class GroupChanged(RuntimeError):  # noqa: N818  (nothing went wrong)
    """Workers were lost, or have come: those that are there now form a new group and go on (recovery=continue)."""


class RunComplete(RuntimeError):  # noqa: N818  (as above)
    """The others have completed or saved the run before this worker could join them."""


class Preempted(Exception):  # noqa: N818  (nothing went wrong)
    """A signal asked the run to stop, and it has saved its state after step `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}")
        self.step = step
        self.folder = ""


class ObserverFailed(RuntimeError):  # noqa: N818  (as above)
    """An observer of the user's raised; names it and the method. The state of the last step is saved where one
    worker has all of it."""

    def __init__(self, name: str, method: str, error: Exception) -> None:
        super().__init__(f"observers.{name} raised {type(error).__name__} in {method}: {error}")


class ReplicasDiffer(RuntimeError):  # noqa: N818  (the replicas are the error)
    """The workers' copies of the state are no longer equal; names the tensors, the workers and the step."""


class ComputedWrongly(RuntimeError):  # noqa: N818  (as above)
    """Workers computed different bits for the same work; names the step, and the worker at fault if known."""


class NotSaved(Exception):  # noqa: N818  (as above)
    """A signal asked the run to stop, but its state could not be saved; says what the run can resume from."""

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(f"stopped by a signal after step {step}, but {problem}")


@contextmanager
def optional(failure: str, consequence: str) -> Iterator[None]:
    """Turns any exception inside, except KeyboardInterrupt, into a warning: what failed, why, and the consequence."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        warn(failure, error, consequence)


def warn(failure: str, error: BaseException, consequence: str) -> None:
    with suppress(Exception):  # standard output may be what failed
        print(f"warning: {failure} ({type(error).__name__}: {error}). {consequence}", flush=True)
