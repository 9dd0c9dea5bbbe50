"""How a worker ends when something in it raises."""

import faulthandler
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mbgd.cli import telling, tracebacks
from mbgd.errors import FAILED, ComputedWrongly, NotSaved, ObserverFailed, ReplicasDiffer, UsageError, WorkersLost
from mbgd.text.escaping import plain
from mbgd.workers.log import write_to_log_alone


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Ends the process at an exception inside, reported in a few lines, once for all workers, and fully in the log.

    doing: the word for what raised it, such as training.
    """
    faulthandler.enable(all_threads=True)
    try:
        yield
    except Exception as error:  # a part of the user's can raise anything
        log = write_to_log_alone(traceback.format_exc())
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        said, of_user = str(error), ""
        if isinstance(error, UsageError | ObserverFailed):
            of_user = tracebacks.of_user(error.__cause__) if error.__cause__ is not None else ""
        elif not isinstance(error, WorkersLost | ReplicasDiffer | ComputedWrongly | NotSaved):
            of_user = tracebacks.of_user(error) or tracebacks.of_ours(error)
            said = f"{doing} raised {type(error).__name__}{f'; the whole traceback is in {plain(log)}' if log else ''}"
        telling.tell("\n".join(filter(None, (said, of_user))), is_consequence=isinstance(error, WorkersLost))
        sys.exit(error.exit_code if isinstance(error, UsageError) else FAILED)
