"""What one request may ask for on a server. Knows no queue and no torch."""

import time
from dataclasses import dataclass

from server.config import EngineSettings
from server.errors import DeadlineError, InvalidRequestError
from server.request import Request


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """
    Attributes:
        max_context_tokens: prompt and answer together: what the base, the settings and the cache allow.
    """

    settings: EngineSettings
    max_context_tokens: int
    vocab_size: int

    def room_for_answer(self, prompt_tokens: int) -> int:
        """Tokens that an answer may have at most after such a prompt."""
        room = self.max_context_tokens - prompt_tokens
        return min(room, self.settings.max_new_tokens or room)

    def check_allowed(self, request: Request) -> None:
        """Whether the settings let a caller ask for so much; what the server asks itself is its own business.

        Raises:
            InvalidRequestError
        """
        allowed, prompt_tokens = self.settings, len(request.prompt_token_ids)
        for field, asked, most in (
            ("prompt", prompt_tokens, allowed.max_prompt_tokens),
            ("sampling.max_new_tokens", request.sampling.max_new_tokens, allowed.max_new_tokens),
            ("sampling.n", request.n, allowed.max_answers),
        ):
            if most is not None and asked > most:
                what = f"has {asked} tokens" if field == "prompt" else f"is {asked}"
                raise InvalidRequestError(field, f"{what}, must be at most {most} on this server")

    def check_possible(self, request: Request) -> None:
        """Whether anybody could have it answered here.

        Raises:
            InvalidRequestError: its prompt is empty, too long, or holds an unknown token, or more answers are
                asked for than may run at once.
            DeadlineError: its deadline has passed already.
        """
        self._check_lengths(request)
        most = self.settings.max_running_requests
        if request.n > most:
            raise InvalidRequestError(
                "sampling.n", f"is {request.n}, must be at most {most}, which is how many run at once"
            )
        if request.deadline_s is not None and time.monotonic() >= request.deadline_s:
            raise DeadlineError("the deadline passed before the request was queued")
        tokens = (*request.prompt_token_ids, *request.given)
        unknown = [token for token in tokens if not 0 <= token < self.vocab_size]
        if unknown:
            raise InvalidRequestError(
                "prompt.token_ids", f"{unknown[0]} is not a token; ids are 0 to {self.vocab_size - 1}"
            )

    def _check_lengths(self, request: Request) -> None:
        count, given, limit = len(request.prompt_token_ids), len(request.given), self.max_context_tokens
        if count == 0:
            raise InvalidRequestError("prompt", "has no tokens; send at least one")
        if count >= limit:
            raise InvalidRequestError(
                "prompt", f"has {count} tokens; the context holds {limit}, the answer included"
            )
        if count + given > limit:
            raise InvalidRequestError(
                "given", f"has {given} tokens after {count} of prompt; the context holds {limit}"
            )
