"""The process group: who is there, who is missing, what workers tell each other, stopping together."""
