"""One run on disk: its folder, the record of how it was made, resuming it; and sweeps of runs."""
