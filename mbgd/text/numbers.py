"""Numbers for people to read."""

BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
SECONDS = ("s", "ms", "µs", "ns")


def short(value: float, unit: str = "") -> str:
    """Three or four significant digits: 0.0123, 4.56e-07, 12,300, 1.5 GiB, 12 ms."""
    if unit == "bytes":
        size = size_of_unit(value)
        return f"{value / size:.4g} {BYTES[size.bit_length() // 10]}"
    if unit == "seconds":
        power = 0
        while value != 0 and abs(value) < 1 and power < len(SECONDS) - 1:
            value, power = value * 1000, power + 1
        return f"{value:.3g} {SECONDS[power]}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.4g}"


def size_of_unit(num_bytes: float) -> int:
    """Bytes in the largest unit up to `num_bytes`: 1, 1024, 1024² …"""
    size = 1
    while abs(num_bytes) >= 1024 * size and size < 1024 ** (len(BYTES) - 1):
        size *= 1024
    return size
