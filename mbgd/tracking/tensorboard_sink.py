"""Events for TensorBoard, in a process of its own: see follower.py.

torch.utils.tensorboard uses the same writer, but takes seconds to import and writes one event for each value.
"""

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from mbgd.files.observed import Histogram, HistogramLine, by_name
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

    def histograms(self, line: HistogramLine) -> None:
        values = [Summary.Value(tag=tag, histo=_as_proto(one)) for tag, one in by_name(line)]
        self._writer.add_event(Event(wall_time=time.time(), step=line.step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self, ending: Ending) -> None:
        self._writer.close()


def _as_proto(histogram: Histogram) -> HistogramProto:
    """Without the sums of values, which are not known."""
    counts, edges = histogram.counts_and_edges()
    return HistogramProto(
        min=edges[0], max=edges[-1], num=histogram.size, bucket_limit=edges[1:], bucket=list(map(float, counts))
    )


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads files in the order of their names, which contain the second they were made in."""
    newest = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")), default=0)
    ahead = newest + 1 - time.time()
    if 0 < ahead <= 1:  # more: the clock was set back
        time.sleep(ahead)


def open_sink(folder: Path, start: int) -> TensorboardSink:
    return TensorboardSink(folder)
