"""Exact means and metrics over evaluation sets."""
