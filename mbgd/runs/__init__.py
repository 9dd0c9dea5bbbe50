"""One run on disk: its folder, what it was made with, resuming it; and sweeps of runs."""
