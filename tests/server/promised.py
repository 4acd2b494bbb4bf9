"""What dashboards and scripts may count on: every name of /metrics, its type and its labels. No test here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Promise:
    """A family's type, and its labels beside those that the type itself brings."""

    kind: str
    labels: frozenset[str] = frozenset()


def _all(kind: str, labels_by_name: Mapping[str, Sequence[str]]) -> dict[str, Promise]:
    return {name: Promise(kind, frozenset(labels)) for name, labels in labels_by_name.items()}


PROMISED: Mapping[str, Promise] = {
    **_all(
        "histogram",
        {
            "time_to_first_token_seconds": (),
            "inter_token_latency_seconds": (),
            "request_duration_seconds": (),
            "request_queue_seconds": (),
            "adapter_load_seconds": ("source", "result"),
            "engine_step_seconds": ("phase",),
            "batch_size": (),
            "batch_adapters": (),
        },
    ),
    **_all(
        "counter",
        {
            "requests_finished_total": ("reason", "code"),
            "prompt_tokens_total": (),
            "generated_tokens_total": (),
            "prefix_cache_queries_total": (),
            "prefix_cache_hits_total": (),
            "preemptions_total": (),
            "rejected_total": ("reason",),
            "adapter_requests_total": ("adapter",),
            "adapter_evictions_total": ("tier",),
            "adapter_uploads_total": ("result",),
            "adapter_upload_bytes_total": (),
            "adapter_validation_failures_total": ("reason",),
            "certificate_reloads_total": ("result",),
            "token_reloads_total": ("result",),
            "calls_denied_total": ("reason",),
        },
    ),
    **_all(
        "gauge",
        {
            "requests_running": (),
            "requests_waiting": (),
            "kv_blocks_used_ratio": (),
            "adapters_resident": ("tier",),
            "adapter_bytes": ("tier",),
            "adapter_loaded": ("adapter", "tier", "pinned"),
            "store_bytes": (),
            "store_free_bytes": (),
            "engine_up": (),
            "build_info": ("version", "base_model", "quantization", "device"),
            "base_model_bytes": (),
        },
    ),
}
"""The whole interface, but for the two below."""

LORA_INFO: Mapping[str, Promise] = _all(
    "gauge", {"lora_requests_info": ("max_lora", "running_lora_adapters", "waiting_lora_adapters")}
)


CERTIFICATE: Mapping[str, Promise] = _all("gauge", {"certificate_expiry_timestamp_seconds": ()})
"""Of a server that speaks TLS."""


def found_in(page: str) -> dict[str, Promise]:
    """What a page of /metrics shows, the process' own series left out; names without the prefix.

    Raises:
        AssertionError: a family lacks the prefix or a help text, or its samples have different labels.
    """
    families = [f for f in text_string_to_metric_families(page) if not f.name.startswith("process_")]
    return dict(_promise_of(family) for family in families if family.samples)


def _promise_of(family: Metric) -> tuple[str, Promise]:
    assert family.name.startswith("quickchange_"), family.name
    assert family.documentation, family.name
    own = {"le"} if family.type == "histogram" else set()
    sets = {frozenset(sample.labels.keys() - own) for sample in family.samples}
    assert len(sets) == 1, (family.name, sets)
    name = family.name.removeprefix("quickchange_") + ("_total" if family.type == "counter" else "")
    return name, Promise(family.type, sets.pop())
