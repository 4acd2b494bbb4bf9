"""Owns how long an adapter takes from its last training step to its first served token, part by part."""

import time


class Stopwatch:
    """Runs from `restart`; each `lap` is what came since the one before.

    Attributes:
        parts: seconds by what they went into, in order.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Another step ended: whatever was measured before does not count."""
        self.parts: dict[str, float] = {}
        self._began_s = self._last_s = time.perf_counter()

    def lap(self, part: str) -> None:
        now_s = time.perf_counter()
        self.parts[part] = now_s - self._last_s
        self._last_s = now_s

    @property
    def seconds(self) -> float:
        """From the last `restart` to the last `lap`."""
        return self._last_s - self._began_s
