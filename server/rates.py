"""Requests and tokens per minute: buckets that fill steadily. Knows neither calls nor who they belong to."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from server.errors import RateLimitError

_PERIOD_S: Final = 60.0


class Bucket:
    """Holds what one minute gives, and begins full. One thread at a time.

    Args:
        per_minute: what it takes in, evenly, and the most that it holds.
        clock: seconds that never go back.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at_s = clock()

    def wait_s(self, amount: int) -> float:
        """How long until so much is in it, if nobody takes anything meanwhile; 0 if it is now."""
        self._fill()
        return max(0.0, amount - self._level) * _PERIOD_S / self.per_minute

    def take(self, amount: int) -> None:
        """Takes it out; a negative amount puts it back."""
        self._fill()
        self._level = min(self._level - amount, float(self.per_minute))

    def _fill(self) -> None:
        now_s = self._clock()
        self._level = min(
            self._level + (now_s - self._at_s) * self.per_minute / _PERIOD_S, float(self.per_minute)
        )
        self._at_s = now_s


class Rates:
    """What is left of one token's limits; None is no limit."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = None if requests_per_minute is None else Bucket(requests_per_minute, clock)
        self._tokens = None if tokens_per_minute is None else Bucket(tokens_per_minute, clock)

    def take_request(self) -> None:
        """
        Raises:
            RateLimitError: there is none left; nothing was taken.
        """
        _take(self._requests, 1, "requests", "REQUESTS_PER_MINUTE")

    def reserve_tokens(self, prompt: int, answer: int) -> "Allowance":
        """Takes what a request may come to; closing the allowance gives back what it did not.

        Args:
            answer: the most that all its answers may have.

        Raises:
            RateLimitError: so much is not left, or never will be; nothing was taken.
        """
        _take(self._tokens, prompt + answer, "tokens", "TOKENS_PER_MINUTE")
        return Allowance(self._tokens, prompt + answer)


class Allowance:
    """Tokens that one request may use."""

    def __init__(self, bucket: Bucket | None, tokens: int) -> None:
        self._bucket = bucket
        self._left = tokens

    def use(self, tokens: int) -> None:
        """Records that the request has used some."""
        self._left -= tokens

    @contextmanager
    def kept_if_all_is_well(self) -> Iterator[None]:
        """Closes it if the block fails."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives back what was not used; harmless to repeat."""
        if self._bucket is not None:
            self._bucket.take(-self._left)
        self._left = 0


def _take(bucket: Bucket | None, amount: int, what: str, reason: str) -> None:
    if bucket is None:
        return
    if amount > bucket.per_minute:
        raise RateLimitError(
            f"the request may come to {amount} {what}, and this token has {bucket.per_minute} per minute; "
            "ask for fewer",
            None,
            reason,
        )
    wait_s = bucket.wait_s(amount)
    if wait_s > 0:
        raise RateLimitError(
            f"this token has {bucket.per_minute} {what} per minute; {amount} are there in {wait_s:.3f} s",
            wait_s,
            reason,
        )
    bucket.take(amount)
