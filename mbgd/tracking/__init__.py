"""Where a run's metrics go. Only the main worker has trackers; the others have `NoTracker`."""

from mbgd.tracking.base import NoTracker, Tracker, Trackers

__all__ = ["NoTracker", "Tracker", "Trackers"]
