"""Token ids to text, a piece at a time: whole characters only, nothing that may become a stop string.

Knows a tokenizer's `decode`, not the model.
"""

from typing import Protocol

_INCOMPLETE = "\ufffd"
_CONTEXT_TOKENS = 6
"""Tokens decoded again before each new one, at least, because a token's text may depend on its neighbours.
At most twice as many: what was decoded for one token serves the next as long as the first of them stays."""


class Decoder(Protocol):
    """The part of a tokenizer that is needed."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of the tokens, special ones left out."""


class Detokenizer:
    """Text of one sequence. The pieces joined are the text of all tokens decoded at once, up to the stop."""

    def __init__(self, decoder: Decoder, stop: tuple[str, ...]) -> None:
        self._decoder = decoder
        self._stop = stop
        self._ids: list[int] = []
        self._context_start = 0
        self._before = ""
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """Takes a token, returns the text that is certain now; sets `stopped` when a stop string appears."""
        self._ids.append(token_id)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """The text held back so far; call once, at the end."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        after = self._decoder.decode(self._ids[self._context_start :])
        if after.endswith(_INCOMPLETE) and not final:
            return ""  # an unfinished character, or invalid bytes: the next tokens will tell
        text, self._before = after[len(self._before) :], after
        if len(self._ids) - self._context_start > 2 * _CONTEXT_TOKENS:
            self._context_start = len(self._ids) - _CONTEXT_TOKENS
            self._before = self._decoder.decode(self._ids[self._context_start :])
        return text

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        ends = [self._held.index(stop) for stop in self._stop if stop in self._held]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)], ""
            return text
        keep = 0 if final else self._possible_stop()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
