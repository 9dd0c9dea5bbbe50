"""Standard JSON: without nan and infinity, which Python writes and other programs refuse."""

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, *, indent: int | None = None, is_compact: bool = False) -> str:
    """The value as JSON; numbers that are not finite become null. is_compact: without spaces."""
    return json.dumps(_finite(value), indent=indent, separators=(",", ":") if is_compact else None, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as they are read back: null becomes nan."""
    return {name: math.nan if value is None else value for name, value in values.items()}
