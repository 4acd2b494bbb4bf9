"""Owns how amounts are written for people: three significant digits and a unit. Measures nothing."""

import math
from typing import Final

NOTHING: Final = "–"
"""Where there is no number."""

_BYTES: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_COUNTS: Final = ((1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, ""))
_TIMES: Final = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))


def number(value: float | None, *, digits: int = 3) -> str:
    """1234.5 as "1230", 0.04321 as "0.0432"."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(0, decimals)}f}"


def signed(value: float) -> str:
    """As `number`, with its sign: "+2.10", "−0.500"."""
    return f"{'−' if value < 0 else '+'}{number(abs(value))}"


def percent(part: float) -> str:
    """0.0123 as "1.2 %"."""
    return f"{100 * part:.1f} %"


def signed_percent(part: float) -> str:
    """−0.0123 as "−1.2 %"."""
    return f"{'−' if part < 0 else '+'}{percent(abs(part))}"


def times(ratio: float) -> str:
    """1.2345 as "1.23 ×"."""
    return f"{number(ratio)} ×"


def rate(value: float) -> str:
    """A learning rate: 0.0002 as "2e-4"."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def size(size_bytes: float) -> str:
    """In decimal units, as vendors of accelerators count: 1.5e9 as "1.50 GB"."""
    divisor, unit = byte_unit(size_bytes)
    return f"{number(size_bytes / divisor)} {unit}"


def count(amount: float) -> str:
    """1234567 as "1.23 M"."""
    divisor, unit = _unit(amount, _COUNTS)
    return f"{number(amount / divisor)}{unit}"


def duration(seconds: float) -> str:
    """192.6 as "3.21 min"."""
    divisor, unit = time_unit(seconds)
    return f"{number(seconds / divisor)} {unit}"


def byte_unit(size_bytes: float) -> tuple[float, str]:
    """The unit that such a size is written in: its bytes and its name."""
    return _unit(size_bytes, _BYTES)


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit that such a time is written in: its seconds and its name."""
    return _unit(seconds, _TIMES)


def _unit(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    return next((unit for unit in units if abs(value) >= unit[0]), units[-1])
