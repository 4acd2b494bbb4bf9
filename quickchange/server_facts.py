"""What a server tells of itself: frozen values, decoded from the wire. Knows nothing of gRPC."""

from dataclasses import dataclass

from quickchange.types import ResolvedAdapter


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """What an upload is held to.

    Attributes:
        max_concurrent: uploads at once.
        idle_timeout_s: the longest wait for a chunk.
        min_bytes_per_s: the slowest rate, on average over the idle time-out; 0 for any.
        resume_ttl_s: how long an upload that broke can be resumed; 0 for not at all.
        max_store_bytes, max_bytes_per_name, max_versions_per_name: None for no limit.
    """

    max_chunk_bytes: int
    max_concurrent: int
    idle_timeout_s: float
    min_bytes_per_s: int
    resume_ttl_s: float
    max_store_bytes: int | None
    max_bytes_per_name: int | None
    max_versions_per_name: int | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server refuses beyond.

    Attributes:
        max_prompt_tokens, max_new_tokens: None for as many as the context holds.
        max_waiting_tokens: of prompts that wait; None for no limit.
        max_answers: to one request.
    """

    max_context_tokens: int
    max_running_requests: int
    max_waiting_requests: int
    max_batch_tokens: int
    max_upload_bytes: int
    max_adapter_rank: int
    max_waiting_tokens: int | None
    max_prompt_tokens: int | None
    max_new_tokens: int | None
    max_answers: int
    uploads: UploadLimits


@dataclass(frozen=True, slots=True)
class Capacity:
    """What is in use now."""

    kv_tokens_total: int
    kv_tokens_free: int
    adapter_device_bytes_total: int
    adapter_device_bytes_used: int
    adapter_host_bytes_total: int
    adapter_host_bytes_used: int
    requests_running: int
    requests_waiting: int


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """Forward passes since the start; a mixed one served two or more different adapters at once."""

    steps: int
    mixed_steps: int
    max_adapters_in_step: int
    tokens_computed: int


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """What is folded into a server's base and answers requests that name it, or no adapter.

    Attributes:
        adapter: the version; of a folder its name, and version 0.
        into: "dequantized" is the live adapter; "requantized", in 4 bits again, is not quite it.
        bare_base_fingerprint: of the base without it.
    """

    adapter: ResolvedAdapter
    into: str
    bare_base_fingerprint: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What serves, and how full it is.

    Attributes:
        base_fingerprint: adapters must have been made for it; with an adapter merged in, of both together.
        merged: None if the base is bare.
    """

    version: str
    base_model: str
    base_fingerprint: str
    quantization: str
    device: str
    dtype: str
    limits: Limits
    capacity: Capacity
    steps: StepStatistics
    merged: MergedAdapter | None = None
