"""Which adapter is owed service: the virtual token counter. Knows neither queues nor requests.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each client has a counter of the
service it got; whoever has the smallest counter goes next; a client that comes back is lifted to the smallest
counter of those who stayed, so that idling earns no credit. Here a client is an adapter, or the base.
"""

from collections import Counter

PROMPT_WEIGHT = 1.0
ANSWER_WEIGHT = 2.0
"""Cost of a token, as in the paper: a token of an answer takes a step of its own."""


class FairShare:
    """Service that each adapter with unfinished requests has had, in weighted tokens."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._unfinished: Counter[str] = Counter()
        self._floor = 0.0

    def served(self, adapter: str) -> float:
        """The adapter's counter; smaller goes first."""
        return self._served.get(adapter, self._floor)

    def join(self, adapter: str) -> None:
        """One more unfinished request of the adapter."""
        if not self._unfinished[adapter]:
            self._advance()
            self._served[adapter] = max(self._served.get(adapter, 0.0), self._floor)
        self._unfinished[adapter] += 1

    def leave(self, adapter: str) -> None:
        """One request of the adapter has ended."""
        self._advance()
        self._unfinished[adapter] -= 1
        assert self._unfinished[adapter] >= 0, f"{adapter} left more often than it joined"
        if self._unfinished[adapter]:
            return
        del self._unfinished[adapter]
        if not self._unfinished:  # nobody waits, so nobody is owed anything
            self._served.clear()
            self._floor = 0.0

    def charge(self, adapter: str, prompt_tokens: int = 0, answer_tokens: int = 0) -> None:
        """Counts service."""
        self._served[adapter] = (
            self.served(adapter) + PROMPT_WEIGHT * prompt_tokens + ANSWER_WEIGHT * answer_tokens
        )

    def _advance(self) -> None:
        """Lifts the floor to the smallest counter of those with requests; forgets debts that are below it."""
        if self._unfinished:
            self._floor = max(self._floor, min(self._served[adapter] for adapter in self._unfinished))
            for adapter in [a for a, served in self._served.items() if served <= self._floor]:
                if adapter not in self._unfinished:
                    del self._served[adapter]
