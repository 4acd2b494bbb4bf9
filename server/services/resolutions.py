"""What the references that requests use meant last. Knows neither the store nor the engine."""

import threading
from collections import OrderedDict
from collections.abc import Set
from typing import Final

_KEPT: Final = 10_000


class Resolutions:
    """References by which adapters were asked for, and the content that each was resolved to; any thread."""

    def __init__(self, kept: int = _KEPT) -> None:
        """
        Args:
            kept: so many references; the longest unused goes first.
        """
        self._digests: OrderedDict[str, str] = OrderedDict()
        self._kept = kept
        self._lock = threading.Lock()

    def remember(self, reference: str, digest: str) -> None:
        """A reference means this content now, whatever it meant before."""
        with self._lock:
            self._digests[reference] = digest
            self._digests.move_to_end(reference)
            if len(self._digests) > self._kept:
                self._digests.popitem(last=False)

    def forget(self, digest: str) -> None:
        """Nothing means this content any more."""
        with self._lock:
            for reference in [r for r, meant in self._digests.items() if meant == digest]:
                del self._digests[reference]

    def references_to(self, digests: Set[str]) -> list[str]:
        """The references that mean one of these."""
        with self._lock:
            return [reference for reference, digest in self._digests.items() if digest in digests]
