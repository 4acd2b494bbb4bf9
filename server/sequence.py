"""A request while the engine works on it: tokens, blocks, slot, progress. Knows neither torch nor grpc."""

import enum
from dataclasses import dataclass, field

from server.prefix import PrefixChain
from server.request import FinishReason, Request


class Phase(enum.Enum):
    """Where a sequence is; NEW ones are not queued yet, FINISHED is for ever."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one of a request's answers, owned by the engine's thread.

    Attributes:
        number: by age; given by the scheduler.
        token_ids: prompt, then answer; of one that is given all that leads to its last token, at once.
        reported: so many of them are prompt, or have left as an answer.
        computed: so many leading tokens have their keys and values in the cache.
        cached_tokens: so many of the prompt were there already when it was first admitted.
        blocks: indices of its cache blocks, in order of position.
        published: so many leading blocks are known to the prefix cache, or came from it.
        preemptions: how often it had to give its blocks up.
        chain: keys of its blocks; None without a prefix cache.
        slot: adapter slot while RUNNING; 0 is the base.
        urgency: its priority and what waiting added to it, as of its admission.
        adapter_waits: when it began and ended to wait for its adapter, on time.monotonic().
        submitted_s, admitted_s: on time.monotonic(); admitted for the first time.
    """

    request: Request
    max_total_tokens: int
    submitted_s: float
    number: int = 0
    token_ids: list[int] = field(init=False)
    reported: int = field(init=False)
    computed: int = 0
    cached_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    published: int = 0
    preemptions: int = 0
    chain: PrefixChain | None = None
    slot: int = 0
    urgency: int = 0
    phase: Phase = Phase.NEW
    adapter_wait_s: float = 0.0
    adapter_waits: list[tuple[float, float]] = field(default_factory=list)
    adapter_wait_began_s: float | None = None
    admitted_s: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_token_ids, *self.request.given[:-1]]
        self.reported = self.prompt_length

    @property
    def digest(self) -> str | None:
        """Content digest of its adapter; None for the base."""
        return self.request.adapter.digest if self.request.adapter else None

    @property
    def client(self) -> str:
        """Whose share of the engine it uses: its adapter's digest, empty for the base."""
        return self.digest or ""

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_length(self) -> int:
        return self.reported - self.prompt_length

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length : self.reported]

    def given_after(self, count: int) -> int | None:
        """Which token comes so many after the last one that was reported; None if it is to be chosen."""
        place = self.output_length + count
        return self.request.given[place] if self.request.given else None

    def take(self, token_id: int) -> None:
        """Reports the next token of the answer."""
        if self.reported == len(self.token_ids):
            self.token_ids.append(token_id)
        self.reported += 1

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 while decoding."""
        return len(self.token_ids) - self.computed

    def expired(self, now_s: float) -> bool:
        """Whether its deadline has passed."""
        deadline_s = self.request.deadline_s
        return deadline_s is not None and now_s >= deadline_s

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why its newest token ends it, stop strings aside; None if it goes on."""
        sampling = self.request.sampling
        newest = self.token_ids[self.reported - 1]
        if newest in sampling.stop_token_ids or (newest in eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        if self.reported >= self.max_total_tokens:
            return FinishReason.LENGTH
        return None
