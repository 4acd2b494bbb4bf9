"""Every setting of the server: its default and its range. Does not know how any of them is used, or given."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from server.access_settings import AccessSettings, TlsSettings
from server.sections import About, RangeError, Section

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_CPU_BATCH_TOKENS = 128
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class BaseSettings(Section):
    """The base model: what adapters/base.py loads."""

    source: Annotated[str, About("folder, GGUF file, hub id, or smollm2")]
    quantization: Annotated[Literal["nf4", "none"], About("how linear layers are stored")] = "nf4"
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], About("type of activations")] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], About("where the base lives")] = "auto"
    kernels: Annotated[
        Literal["auto", "native", "torch"],
        About("what computes on a CPU; auto: native code where it is there"),
    ] = "auto"
    matmul_precision: Annotated[
        Literal["auto", "highest", "medium"],
        About("of native products; medium: activations in bfloat16; auto: medium where that is faster"),
    ] = "auto"
    cache_dir: Annotated[
        Path | None, About("where converted bases are kept; unset: ~/.cache/quickchange")
    ] = None
    merged: Annotated[
        str | None,
        About(
            "adapter to fold into the base: as requests name one in the store, or a folder such as ./sql-lora"
        ),
    ] = None
    merged_into: Annotated[
        Literal["dequantized", "requantized"],
        About("what it is folded into; dequantized: the live adapter; requantized: in nf4, nearly it"),
    ] = "dequantized"

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.merged_into == "requantized" and self.quantization == "none":
            raise RangeError(
                "merged_into",
                "is requantized, but a base of quantization none has no 4-bit weights; leave it unset",
            )


@dataclass(frozen=True, slots=True)
class StoreSettings(Section):
    """The adapter store."""

    root: Annotated[Path | str, About("folder of the adapter store, or a URL it was published at")] = (
        Path.home() / ".local/share/quickchange/store"
    )
    cache: Annotated[Path | None, About("folder for copies of a store by URL, which needs one")] = None
    refresh_s: Annotated[float, About("seconds between looks at a store by URL", 0.1, 86400)] = 30.0
    max_bytes: Annotated[int | None, About("bytes of all adapters; unset: what the disk takes", 1)] = None
    max_bytes_per_name: Annotated[
        int | None, About("bytes of all versions of one name; unset: no limit", 1)
    ] = None
    max_versions_per_name: Annotated[int | None, About("versions of one name; unset: no limit", 1)] = None
    reserve_bytes: Annotated[int, About("bytes of the disk that uploads leave free", 0)] = 256 * MIB
    gc_interval_s: Annotated[
        float | None, About("seconds between collections of old versions; unset: only when asked for", 1)
    ] = None
    gc_keep_versions: Annotated[
        int, About("newest READY versions of a name that a collection keeps", 1, 1_000_000)
    ] = 5
    gc_min_age_s: Annotated[float, About("seconds that a collection keeps any version", 0)] = 7 * 86400.0

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if isinstance(self.root, Path):
            return
        if self.cache is None:
            raise RangeError("cache", f"is not set: give a folder for copies of {self.root}")
        if self.gc_interval_s is not None:
            raise RangeError(
                "gc_interval_s", f"is {self.gc_interval_s}, but {self.root} is changed elsewhere; unset it"
            )


@dataclass(frozen=True, slots=True)
class EngineSettings(Section):
    """The engine: queues, batches, memory."""

    max_running_requests: Annotated[int, About("requests in one forward pass", 1, 4096)] = 32
    max_waiting_requests: Annotated[int, About("queue length; more is refused", 1, 1_000_000)] = 256
    max_waiting_tokens: Annotated[
        int | None, About("tokens of prompts that wait; more is refused; unset: no limit", 1)
    ] = None
    max_prompt_tokens: Annotated[
        int | None, About("longest prompt; unset: what the context holds", 1, 1_000_000_000)
    ] = None
    max_new_tokens: Annotated[
        int | None, About("longest answer that may be asked for; unset: what the context holds", 1)
    ] = None
    max_answers: Annotated[
        int | None, About("answers to one request (n); unset: max_running_requests", 1, 4096)
    ] = None
    max_batch_tokens: Annotated[
        int | None, About("tokens computed in one step; unset: 128 on a CPU, else 2048", 1, 1_000_000)
    ] = None
    prefill_chunk_tokens: Annotated[
        int | None, About("tokens of one prompt in one step; unset: all of the step's", 1, 1_000_000)
    ] = None
    block_tokens: Annotated[int, About("tokens of one key-value block", 1, 1024)] = 16
    kv_bytes: Annotated[int | None, About("memory for keys and values; unset: chosen at start", 1)] = None
    adapter_device_bytes: Annotated[
        int | None, About("device memory for adapters; unset: chosen at start", 1)
    ] = None
    adapter_host_bytes: Annotated[
        int | None,
        About("host memory for adapters that left the device; 0: none; unset: none on a CPU, else chosen", 0),
    ] = None
    adapter_eviction: Annotated[
        Literal["cost", "lru"],
        About("who leaves first; cost: who saves least loading time for its bytes; lru: the longest unused"),
    ] = "cost"
    max_adapter_rank: Annotated[int, About("largest rank that an adapter may have", 1, 4096)] = 256
    max_context_tokens: Annotated[int | None, About("prompt and answer; unset: what the base allows", 1)] = (
        None
    )
    prefix_cache: Annotated[
        Literal["on", "off"], About("whether prompts that begin alike share keys and values")
    ] = "on"
    priority_aging_s: Annotated[
        float, About("seconds of waiting that count as one priority more", 0.01, 86400)
    ] = 10.0
    fused_layers: Annotated[
        Literal["auto", "off"], About("whole decoder layers in one native call, where that computes the same")
    ] = "auto"
    screened_head: Annotated[
        Literal["auto", "off"],
        About("a copy of the output head in 7 bits that finds likeliest tokens faster; half of its memory"),
    ] = "auto"
    spin_us: Annotated[
        int, About("microseconds that a helper thread looks for work before it sleeps", 0, 1_000_000)
    ] = 50
    watchdog_s: Annotated[
        float, About("the engine hangs, and the server ends, after so long without progress", 1, 86400)
    ] = 45.0
    threads: Annotated[int | None, About("threads of matrix products; unset: chosen at start", 1, 1024)] = (
        None
    )

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        self._check_fits_a_step("prefill_chunk_tokens", self.prefill_chunk_tokens)
        self._check_fits_a_step("max_running_requests", self.max_running_requests)  # each needs a token
        if self.max_answers is not None and self.max_answers > self.max_running_requests:
            raise RangeError(
                "max_answers",
                f"is {self.max_answers}, must not exceed max_running_requests ({self.max_running_requests})",
            )

    def batch_tokens_on(self, device: str) -> int:
        """Tokens of one step: few on a CPU, which 64 keep busy already, while every stream waits for all."""
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        return max(_CPU_BATCH_TOKENS if device == "cpu" else _BATCH_TOKENS, self.max_running_requests)

    def _check_fits_a_step(self, name: str, value: int | None) -> None:
        if value is not None and self.max_batch_tokens is not None and value > self.max_batch_tokens:
            raise RangeError(name, f"is {value}, must not exceed max_batch_tokens ({self.max_batch_tokens})")


@dataclass(frozen=True, slots=True)
class GrpcSettings(Section):
    """The gRPC face: where it listens and what it accepts."""

    host: Annotated[str, About("address to listen on")] = "127.0.0.1"
    port: Annotated[int, About("port to listen on; 0 picks a free one", 0, 65535)] = 50051
    max_prompt_bytes: Annotated[int, About("largest prompt, before it is tokenized", 1, 64 * MIB)] = MIB
    max_upload_bytes: Annotated[int, About("largest adapter, all files together", 1)] = 2 * GIB
    max_concurrent_uploads: Annotated[int, About("uploads at once; more is refused", 1, 1024)] = 4
    upload_idle_timeout_s: Annotated[float, About("longest wait for an upload's chunk", 0.1, 3600)] = 30.0
    upload_min_bytes_per_s: Annotated[
        int, About("slowest upload, on average over that long; 0: any", 0, GIB)
    ] = 1024
    upload_resume_ttl_s: Annotated[
        float, About("how long an upload that broke can be resumed; 0: not at all", 0, 30 * 86400)
    ] = 3600.0
    max_resumable_uploads: Annotated[
        int, About("uploads kept for that; the oldest goes first", 1, 100_000)
    ] = 256
    canary_timeout_s: Annotated[
        float, About("longest replay of an uploaded adapter's canary, its load included", 0.1, 3600)
    ] = 30.0
    drain_grace_s: Annotated[float, About("how long requests may go on after SIGTERM", 0, 86400)] = 30.0
    worker_threads: Annotated[int, About("threads for tokenizing, hashing and the store", 1, 64)] = 2


@dataclass(frozen=True, slots=True)
class MetricsSettings(Section):
    """The Prometheus endpoint."""

    host: Annotated[str, About("address to listen on")] = "127.0.0.1"
    port: Annotated[int, About("port to listen on; 0 picks a free one", 0, 65535)] = 9464
    adapter_series_cap: Annotated[int, About("adapters with a series of their own", 1, 10_000)] = 100
    lora_info_gauge: Annotated[
        Literal["on", "off"],
        About("quickchange_lora_requests_info, for routers that know where adapters are"),
    ] = "off"


@dataclass(frozen=True, slots=True)
class TelemetrySettings(Section):
    """Logs and traces."""

    log_format: Annotated[Literal["text", "json"], About("lines of the log, for people or programs")] = "text"
    otlp_endpoint: Annotated[
        str | None,
        About("collector of OpenTelemetry traces, such as http://127.0.0.1:4317; unset: no traces"),
    ] = None
    trace_ratio: Annotated[
        float, About("part of the requests that are traced, unless the caller decided", 0, 1)
    ] = 1.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """All settings of one server process."""

    base: BaseSettings
    store: StoreSettings = StoreSettings()
    engine: EngineSettings = EngineSettings()
    grpc: GrpcSettings = GrpcSettings()
    metrics: MetricsSettings = MetricsSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    tls: TlsSettings = TlsSettings()  # noqa: RUF009 - frozen: sharing it is safe
    access: AccessSettings = AccessSettings()  # noqa: RUF009 - frozen: sharing it is safe


SECTIONS: Mapping[str, type[Section]] = {
    "base": BaseSettings,
    "store": StoreSettings,
    "engine": EngineSettings,
    "grpc": GrpcSettings,
    "metrics": MetricsSettings,
    "telemetry": TelemetrySettings,
    "tls": TlsSettings,
    "access": AccessSettings,
}
