"""How OpenMP's threads wait for each other, decided before torch is imported. Knows no torch."""

from collections.abc import MutableMapping
from typing import Final

SPIN_COUNT: Final = 10_000
"""Turns that GNU OpenMP's threads spin before they sleep; its own default is some 300 000: milliseconds.

As soon as another program needs a processor, every barrier of a forward pass would wait that long for a
thread that is not running. Measured: docs/performance.md.
"""


def spin_briefly(environ: MutableMapping[str, str]) -> None:
    """Sets GNU OpenMP's spin count, unless the caller chose a wait policy; other runtimes ignore it."""
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
