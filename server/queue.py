"""Sequences that wait to run, and who of them goes next. Knows neither blocks nor slots.

The order: priority, which grows while a sequence waits; then the adapter that had least service; then age.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Set

from server.fairness import FairShare
from server.sequence import Sequence


class WaitingQueue:
    """One line per adapter and priority, oldest first.

    Attributes:
        tokens: of everything that waits; none of them computed, unless a prefix cache has them.
    """

    def __init__(self, shares: FairShare, aging_s: float) -> None:
        """
        Args:
            aging_s: a sequence that waits so long counts as one priority higher, twice as long as two, …
        """
        self._shares = shares
        self._aging_s = aging_s
        self._lines: dict[tuple[str, int], list[Sequence]] = {}
        self._count = 0
        self.tokens = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line

    def clients(self) -> set[str]:
        """Whose sequences wait; any thread."""
        return {client for client, _ in list(self._lines)}

    def push(self, sequence: Sequence) -> None:
        """Adds a sequence where its age says."""
        line = self._lines.setdefault(_line_of(sequence), [])
        insort(line, sequence, key=_number)
        self._count += 1
        self.tokens += len(sequence.token_ids)

    def remove(self, sequence: Sequence) -> None:
        """
        Raises:
            ValueError: it does not wait.
        """
        line = self._lines.get(_line_of(sequence), [])
        index = bisect_left(line, sequence.number, key=_number)
        if index >= len(line) or line[index] is not sequence:
            raise ValueError(f"sequence {sequence.number} is not waiting")
        del line[index]
        if not line:
            del self._lines[_line_of(sequence)]
        self._count -= 1
        self.tokens -= len(sequence.token_ids)

    def ranked(self, now_s: float, passed: Set[str]) -> list[Sequence]:
        """The first of each line, in order, adapters in `passed` left out; all stay in the queue."""
        heads = (line[0] for (adapter, _), line in self._lines.items() if adapter not in passed)
        return sorted(heads, key=lambda head: self._rank(head, now_s))

    def aged_priority(self, sequence: Sequence, now_s: float) -> int:
        """A sequence's priority and what its age adds."""
        return sequence.request.priority + int((now_s - sequence.submitted_s) / self._aging_s)

    def _rank(self, head: Sequence, now_s: float) -> tuple[int, float, int]:
        return -self.aged_priority(head, now_s), self._shares.served(head.client), head.number


def _line_of(sequence: Sequence) -> tuple[str, int]:
    return sequence.client, sequence.request.priority


def _number(sequence: Sequence) -> int:
    return sequence.number
