"""The process group: its workers, missing workers, messages between workers, stopping together."""
