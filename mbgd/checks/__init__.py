"""Checks before training, and checks of values and of the workers' copies during it."""
