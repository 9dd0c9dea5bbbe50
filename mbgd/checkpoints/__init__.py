"""The state of a run: its parts, snapshots of them, the format on disk, and when checkpoints are written."""
