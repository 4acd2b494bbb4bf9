"""Decoding the messages of the wire into typed values. Knows nothing of channels or of requests."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from types import MappingProxyType

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from quickchange import server_facts, types
from quickchange.enums import named
from quickchange.errors import CancelledError, InternalError
from quickchange.reports import validation_report
from quickchange.v1 import adapters_pb2, inference_pb2, server_pb2


def completion(response: inference_pb2.GenerateResponse) -> types.Completion:
    """The one answer of a response."""
    found = completions(response)
    if len(found) != 1:
        raise InternalError(f"the server sent {len(found)} completions, one was asked for")
    return found[0]


def completions(response: inference_pb2.GenerateResponse) -> tuple[types.Completion, ...]:
    """All answers of a response, by index."""
    return tuple(
        types.Completion(
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            adapter=_resolved(response.adapter),
            finish_reason=_finish_reason(answer.finish_reason),
            usage=_usage(answer.usage if answer.HasField("usage") else response.usage),
            timings=_timings(answer.timings if answer.HasField("timings") else response.timings),
            logprobs=_logprobs(answer.logprobs),
            request_id=response.request_id,
            index=answer.index,
        )
        for answer in response.completions
    )


def stream_event(response: inference_pb2.GenerateStreamResponse) -> types.StreamEvent | None:
    """The event of a stream's message; None for a kind that this client is too old to know."""
    match response.WhichOneof("event"):
        case "started":
            return _started(response.started)
        case "delta":
            delta = response.delta
            return types.Delta(delta.text, tuple(delta.token_ids), _logprobs(delta.logprobs), delta.index)
        case "finished":
            end = response.finished
            return types.Finished(
                _finish_reason(end.finish_reason), _usage(end.usage), _timings(end.timings), end.index
            )
        case _:
            return None


class CompletionBuilder:
    """Puts the events of one stream together again."""

    def __init__(self) -> None:
        self._started: types.Started | None = None
        self._deltas: defaultdict[int, list[types.Delta]] = defaultdict(list)
        self._finished: dict[int, types.Finished] = {}

    def add(self, event: types.StreamEvent) -> None:
        match event:
            case types.Started():
                self._started = event
            case types.Delta():
                self._deltas[event.index].append(event)
            case types.Finished():
                self._finished[event.index] = event

    def build_all(self) -> tuple[types.Completion, ...]:
        """Every answer, by index.

        Raises:
            CancelledError: the stream ended before all were complete.
        """
        if self._started is None or not self._finished or self._deltas.keys() - self._finished.keys():
            raise CancelledError("the stream was closed before the answer was complete")
        return tuple(self._answer(self._started, end) for _, end in sorted(self._finished.items()))

    def _answer(self, started: types.Started, end: types.Finished) -> types.Completion:
        deltas = self._deltas[end.index]
        return types.Completion(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            adapter=started.adapter,
            finish_reason=end.finish_reason,
            usage=end.usage,
            timings=end.timings,
            logprobs=tuple(each for delta in deltas for each in delta.logprobs),
            request_id=started.request_id,
            index=end.index,
        )


def tokenization(response: inference_pb2.TokenizeResponse) -> types.Tokenization:
    return types.Tokenization(tuple(response.token_ids), response.text)


def models(response: inference_pb2.ListModelsResponse) -> tuple[types.Model, ...]:
    return tuple(
        types.Model(model.reference, _resolved(model.adapter), model.is_base, model.description)
        for model in response.models
    )


def adapter(message: adapters_pb2.Adapter) -> types.Adapter:
    return types.Adapter(
        name=message.name,
        version=message.version,
        digest=message.digest,
        etag=message.etag,
        state=named(
            types.AdapterState, adapters_pb2.AdapterState.DESCRIPTOR, "ADAPTER_STATE_", message.state
        ),
        residency=named(types.Residency, adapters_pb2.Residency.DESCRIPTOR, "RESIDENCY_", message.residency),
        pinned=message.pinned,
        rank=message.rank,
        alpha=message.alpha,
        target_modules=tuple(message.target_modules),
        method=named(
            types.AdapterMethod, adapters_pb2.AdapterMethod.DESCRIPTOR, "ADAPTER_METHOD_", message.method
        ),
        size_bytes=message.size_bytes,
        base_fingerprint=message.base_fingerprint,
        aliases=tuple(message.aliases),
        labels=MappingProxyType(dict(message.labels)),
        description=message.description,
        create_time=_time(message.create_time) if message.HasField("create_time") else None,
        update_time=_time(message.update_time) if message.HasField("update_time") else None,
        error=message.error,
    )


def upload_result(response: adapters_pb2.UploadAdapterResponse) -> types.UploadResult:
    return types.UploadResult(
        adapter=adapter(response.adapter),
        created=response.created,
        report=validation_report(response.report),
    )


def adapter_event(response: adapters_pb2.WatchAdaptersResponse) -> types.AdapterEvent:
    return types.AdapterEvent(adapter(response.adapter), response.deleted)


def collection(response: adapters_pb2.CollectGarbageResponse) -> types.Collection:
    return types.Collection(
        tuple(
            types.CollectedVersion(
                version.name, version.version, version.digest, version.reason, version.freed_bytes
            )
            for version in response.versions
        ),
        response.freed_bytes,
        tuple(
            types.CollectedQuarantine(entry.place, entry.digest, entry.reason, entry.freed_bytes)
            for entry in response.quarantined
        ),
    )


def _merged(message: server_pb2.MergedAdapter) -> server_facts.MergedAdapter:
    return server_facts.MergedAdapter(_resolved(message.adapter), message.into, message.bare_base_fingerprint)


def server_info(response: server_pb2.GetServerInfoResponse) -> server_facts.ServerInfo:
    limits, capacity, steps = response.limits, response.capacity, response.steps
    return server_facts.ServerInfo(
        version=response.version,
        base_model=response.base_model,
        base_fingerprint=response.base_fingerprint,
        quantization=response.quantization,
        device=response.device,
        dtype=response.dtype,
        limits=server_facts.Limits(
            max_context_tokens=limits.max_context_tokens,
            max_running_requests=limits.max_running_requests,
            max_waiting_requests=limits.max_waiting_requests,
            max_batch_tokens=limits.max_batch_tokens,
            max_upload_bytes=limits.max_upload_bytes,
            max_adapter_rank=limits.max_adapter_rank,
            max_waiting_tokens=_set_or_none(limits, "max_waiting_tokens"),
            max_prompt_tokens=_set_or_none(limits, "max_prompt_tokens"),
            max_new_tokens=_set_or_none(limits, "max_new_tokens"),
            max_answers=limits.max_answers,
            uploads=_upload_limits(limits.uploads),
        ),
        capacity=server_facts.Capacity(
            kv_tokens_total=capacity.kv_tokens_total,
            kv_tokens_free=capacity.kv_tokens_free,
            adapter_device_bytes_total=capacity.adapter_device_bytes_total,
            adapter_device_bytes_used=capacity.adapter_device_bytes_used,
            adapter_host_bytes_total=capacity.adapter_host_bytes_total,
            adapter_host_bytes_used=capacity.adapter_host_bytes_used,
            requests_running=capacity.requests_running,
            requests_waiting=capacity.requests_waiting,
        ),
        steps=server_facts.StepStatistics(
            steps=steps.steps,
            mixed_steps=steps.mixed_steps,
            max_adapters_in_step=steps.max_adapters_in_step,
            tokens_computed=steps.tokens_computed,
        ),
        merged=_merged(response.merged) if response.HasField("merged") else None,
    )


def _upload_limits(message: server_pb2.UploadLimits) -> server_facts.UploadLimits:
    return server_facts.UploadLimits(
        max_chunk_bytes=message.max_chunk_bytes,
        max_concurrent=message.max_concurrent,
        idle_timeout_s=_seconds(message.idle_timeout),
        min_bytes_per_s=message.min_bytes_per_s,
        resume_ttl_s=_seconds(message.resume_ttl),
        max_store_bytes=_set_or_none(message, "max_store_bytes"),
        max_bytes_per_name=_set_or_none(message, "max_bytes_per_name"),
        max_versions_per_name=_set_or_none(message, "max_versions_per_name"),
    )


def _set_or_none(message: server_pb2.Limits | server_pb2.UploadLimits, field: str) -> int | None:
    """The value of a field that is optional in the schema."""
    value: int = getattr(message, field)
    return value if any(each.name == field for each, _ in message.ListFields()) else None


def _started(message: inference_pb2.Started) -> types.Started:
    return types.Started(
        request_id=message.request_id,
        adapter=_resolved(message.adapter),
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        queue_s=_seconds(message.queue_time),
    )


def _resolved(message: inference_pb2.ResolvedAdapter) -> types.ResolvedAdapter:
    return types.ResolvedAdapter(message.name, message.version, message.digest)


def _usage(message: inference_pb2.Usage) -> types.Usage:
    return types.Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def _timings(message: inference_pb2.Timings) -> types.Timings:
    return types.Timings(
        queue_s=_seconds(message.queue),
        adapter_load_s=_seconds(message.adapter_load),
        time_to_first_token_s=_seconds(message.time_to_first_token),
        total_s=_seconds(message.total),
    )


def _logprobs(messages: Iterable[inference_pb2.TokenLogprob]) -> tuple[types.TokenLogprob, ...]:
    return tuple(
        types.TokenLogprob(
            message.token_id,
            message.logprob,
            tuple((other.token_id, other.logprob) for other in message.alternatives),
        )
        for message in messages
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def _finish_reason(value: int) -> types.FinishReason:
    return named(types.FinishReason, inference_pb2.FinishReason.DESCRIPTOR, "FINISH_REASON_", value)
