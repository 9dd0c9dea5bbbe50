"""Checks on the user's own model and data that the average is right, and finds the reason if it is not."""
