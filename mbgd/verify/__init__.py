"""Shows, on the user's own model and data, that the average is right, and where it is not, why."""
