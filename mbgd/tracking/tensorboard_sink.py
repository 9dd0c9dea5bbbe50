"""Events for TensorBoard, in a process of its own: see follower.py.

torch.utils.tensorboard uses the same writer, but takes seconds to import and writes one event for each value.
"""

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from mbgd.tracking.base import Ending, Metrics


class TensorboardSink:
    """Writes the whole history from the first line on; it replaces what earlier processes of the run wrote."""

    def __init__(self, folder: Path) -> None:
        folder = folder / "tensorboard"
        _wait_for_a_later_name(folder)
        self._writer = EventFileWriter(str(folder))
        started_over = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=0, session_log=started_over))

    def log(self, step: int, metrics: Metrics) -> None:
        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if not isinstance(value, str)
        ]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self, ending: Ending) -> None:
        self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads files in the order of their names, which contain the second they were made in."""
    newest = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")), default=0)
    ahead = newest + 1 - time.time()
    if 0 < ahead <= 1:  # more: the clock was set back
        time.sleep(ahead)


def open_sink(folder: Path, start: int) -> TensorboardSink:
    return TensorboardSink(folder)
