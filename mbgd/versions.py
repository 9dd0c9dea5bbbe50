"""The versions of mbgd and torch."""

from importlib.metadata import PackageNotFoundError, version


def of_mbgd() -> str:
    """The installed version, or a text that says this is a clone that is not installed."""
    try:
        return version("mbgd")
    except PackageNotFoundError:
        return "of a clone that is not installed"


def of_torch() -> str:
    return version("torch")
