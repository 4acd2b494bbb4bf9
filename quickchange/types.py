"""What calls return: frozen values, decoded from the wire. Knows nothing of gRPC."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


class FinishReason(enum.StrEnum):
    """Why an answer ended. UNKNOWN is one that this client is too old to know; so in every enum here."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class AdapterState(enum.StrEnum):
    """Where a version stands; only READY ones answer requests."""

    VALIDATING = "validating"
    READY = "ready"
    FAILED = "failed"
    DELETING = "deleting"
    UNKNOWN = "unknown"


class Residency(enum.StrEnum):
    """The nearest place to the model where an adapter's weights are."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"
    UNKNOWN = "unknown"


class AdapterMethod(enum.StrEnum):
    """How an adapter's weights change the base."""

    LORA = "lora"
    RSLORA = "rslora"
    DORA = "dora"
    UNKNOWN = "unknown"


class CheckOutcome(enum.StrEnum):
    """How a check of an adapter ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """The one version that answered. For the base: no name, version 0, no digest."""

    name: str
    version: int
    digest: str

    @property
    def is_base(self) -> bool:
        return not self.digest

    def __str__(self) -> str:
        return "base" if self.is_base else f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens; cached ones are prompt tokens whose keys and values were still there."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, measured by the server from the request's arrival."""

    queue_s: float
    adapter_load_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of the chosen token's probability, and of the likeliest ones by token id."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer, the `index`th to its prompt. `logprobs` is empty unless they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    adapter: ResolvedAdapter
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...]
    request_id: str
    index: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a stream: what the request resolved to."""

    request_id: str
    adapter: ResolvedAdapter
    prompt_tokens: int
    cached_tokens: int
    queue_s: float


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of the `index`th answer; `text` may be empty while a character is incomplete."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of the `index`th answer."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    index: int = 0


StreamEvent = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A prompt as the model sees it: `text` is what was tokenized, after the chat template."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Model:
    """Something that a request may name in `adapter`; the base is the empty reference."""

    reference: str
    adapter: ResolvedAdapter
    is_base: bool
    description: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """One immutable version of an adapter, with what points at it.

    Attributes:
        etag: give it back to an update to detect that somebody else was faster.
        rank: the largest of any module.
        error: why the state is FAILED; empty otherwise.
    """

    name: str
    version: int
    digest: str
    etag: str
    state: AdapterState
    residency: Residency
    pinned: bool
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    method: AdapterMethod
    size_bytes: int
    base_fingerprint: str
    aliases: tuple[str, ...]
    labels: Mapping[str, str]
    description: str
    create_time: datetime | None
    update_time: datetime | None
    error: str

    @property
    def reference(self) -> str:
        """Names exactly this version in any request."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class ValidationCheck:
    """One check of an adapter.

    Attributes:
        detail: what was seen, what is wrong, or why it was skipped.
        reason: UPPER_SNAKE code of a failure.
        problems: all that is wrong, `detail` first; the first ones of `problem_count`.
    """

    name: str
    outcome: CheckOutcome
    detail: str
    reason: str = ""
    problems: tuple[str, ...] = ()
    problem_count: int = 0


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """What an adapter does to one module of the base.

    Attributes:
        scaling: factor on B A.
        norm: Frobenius norm of the update, scaling included; None if its values were not looked at.
    """

    module: str
    rank: int
    scaling: float
    norm: float | None


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """A version as it is now; of a deleted one only name, version and digest are known."""

    adapter: Adapter
    deleted: bool


@dataclass(frozen=True, slots=True)
class CollectedVersion:
    """A version that a collection took away, or would take.

    Attributes:
        reason: why, for people.
        freed_bytes: of its files, unless a version that stays has the same.
    """

    name: str
    version: int
    digest: str
    reason: str
    freed_bytes: int

    @property
    def reference(self) -> str:
        """ "name@3"."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class CollectedQuarantine:
    """Damaged files that a collection took away, or would take.

    Attributes:
        place: their folder, from the store's on.
        reason: what is wrong with them.
    """

    place: str
    digest: str
    reason: str
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Collection:
    """What a collection of old versions took away, or would take; bytes of earlier deletions included."""

    versions: tuple[CollectedVersion, ...]
    freed_bytes: int
    quarantined: tuple[CollectedQuarantine, ...]


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """What the server's checks found. Of a refusal lists hold the first ones; the counts say how many.

    Attributes:
        matched_modules: modules of the base that the adapter changes.
        delta_norm: Frobenius norm of the whole update, scaling included; 0 if it was not looked at.
        dtype: storage type of the tensors, such as "F32".
        checks: in the order in which they ran.
        modules: what it does to each matched module.
        unmatched_tensors: tensors of the file that no matched module has.
        base_fingerprint: of the server's base.
        declared_base_fingerprint: of the base that the adapter says it was made for; None if it does not say.
    """

    matched_modules: tuple[str, ...]
    rank: int
    delta_norm: float
    dtype: str
    checks: tuple[ValidationCheck, ...] = ()
    modules: tuple[ModuleUpdate, ...] = ()
    matched_module_count: int = 0
    unmatched_tensors: tuple[str, ...] = ()
    unmatched_tensor_count: int = 0
    base_fingerprint: str = ""
    declared_base_fingerprint: str | None = None
    method: AdapterMethod = AdapterMethod.UNKNOWN

    def check(self, name: str) -> ValidationCheck | None:
        """The check of this name; None if the server did not get to it."""
        return next((check for check in self.checks if check.name == name), None)


@dataclass(frozen=True, slots=True)
class UploadResult:
    """What became of an upload. Of a validation only: version 0, and `created` is False."""

    adapter: Adapter
    created: bool
    report: ValidationReport


@dataclass(frozen=True, slots=True)
class PullResult:
    """A downloaded adapter and the folder that holds it.

    Attributes:
        resumed_bytes: what of `size_bytes` an earlier pull, which did not get to its end, had left.
    """

    adapter: Adapter
    directory: Path
    size_bytes: int
    resumed_bytes: int
