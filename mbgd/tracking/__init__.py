"""Where a run's metrics go. Only the main worker has trackers; the others have `NoTracker`."""

from mbgd.tracking.base import Ending, NoTracker, Outcome, Tracker, Trackers, told_of_its_end

__all__ = ["Ending", "NoTracker", "Outcome", "Tracker", "Trackers", "told_of_its_end"]
