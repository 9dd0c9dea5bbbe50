"""The state of a run: its parts, snapshots of it, their form on disk, and when they are written."""
