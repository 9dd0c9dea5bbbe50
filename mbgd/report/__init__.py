"""A page about one run, or several side by side, made from what is in the runs' folders alone."""

from mbgd.report.writing import write_report

__all__ = ["write_report"]
