"""Which mbgd this is."""

from importlib.metadata import PackageNotFoundError, version


def of_mbgd() -> str:
    """The version that is installed; of a clone that is not, that it is one."""
    try:
        return version("mbgd")
    except PackageNotFoundError:
        return "of a clone that is not installed"


def of_torch() -> str:
    return version("torch")
