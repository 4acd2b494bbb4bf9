"""Messages of the wire to our own values and back. Does no work and keeps no state."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from adapters.facts import AdapterFacts, AdapterRecord
from adapters.retention import Collection
from adapters.tier import TierName, Whereabouts
from quickchange.v1 import adapters_pb2, inference_pb2, server_pb2
from server.errors import InvalidRequestError
from server.merged import Answerer, MergedAdapter
from server.request import (
    AdapterIdentity,
    Delta,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    Started,
    Timings,
    TokenLogprob,
)
from server.services.changes import AdapterEvent, Deleted

DEFAULT_MAX_NEW_TOKENS: Final = 256
_MAX_REQUEST_ID_CHARACTERS: Final = 128

_FINISH_REASONS: Final = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
}


def request_id_of(request: inference_pb2.GenerateRequest) -> str:
    """The caller's id, or a new one.

    Raises:
        InvalidRequestError: it is too long, or could forge lines of the log.
    """
    given = request.request_id
    if not given:
        return secrets.token_hex(8)
    if len(given) > _MAX_REQUEST_ID_CHARACTERS or not given.isprintable():
        raise InvalidRequestError(
            "request_id", f"must be at most {_MAX_REQUEST_ID_CHARACTERS} printable characters"
        )
    return given


def request_of(
    message: inference_pb2.GenerateRequest,
    request_id: str,
    prompt_token_ids: tuple[int, ...],
    answerer: Answerer,
    *,
    room_tokens: int,
    deadline_s: float | None,
    tenant: str | None,
    traceparent: str = "",
) -> Request:
    """What the caller wants of the engine.

    Args:
        room_tokens: most that the answer may have here; bounds the default, not the caller's own number.
        tenant: the caller's; None if it is no tenant's.

    Raises:
        InvalidRequestError: a value is out of its range.
    """
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        sampling=sampling_of(message, room_tokens),
        adapter=answerer.applied,
        merged=answerer.merged,
        adapter_scale=message.adapter_scale if message.HasField("adapter_scale") else 1.0,
        n=message.sampling.n if message.sampling.HasField("n") else 1,
        priority=message.priority,
        cache_salt=message.cache_salt,
        tenant=tenant or "",
        deadline_s=deadline_s,
        traceparent=traceparent,
    )


def sampling_of(request: inference_pb2.GenerateRequest, room_tokens: int) -> SamplingParams:
    """How the caller wants tokens to be chosen.

    Args:
        room_tokens: most that the answer may have here; bounds the default, not the caller's own number.

    Raises:
        InvalidRequestError: a value is out of its range.
    """
    sampling, stopping, output = request.sampling, request.stopping, request.output
    given = {descriptor.name: value for descriptor, value in sampling.ListFields() if descriptor.name != "n"}
    default = {"max_new_tokens": max(1, min(DEFAULT_MAX_NEW_TOKENS, room_tokens))}
    return SamplingParams(
        **(default | given),
        stop=tuple(stopping.stop),
        stop_token_ids=frozenset(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
    )


def identity_of(record: AdapterRecord | None) -> AdapterIdentity | None:
    """What the engine and the answer need of an adapter; None for the base."""
    if record is None:
        return None
    return AdapterIdentity(record.name, record.version, record.facts.digest)


def resolved(identity: AdapterIdentity | None) -> inference_pb2.ResolvedAdapter:
    if identity is None:
        return inference_pb2.ResolvedAdapter()
    return inference_pb2.ResolvedAdapter(name=identity.name, version=identity.version, digest=identity.digest)


def merged(adapter: MergedAdapter) -> server_pb2.MergedAdapter:
    return server_pb2.MergedAdapter(
        adapter=resolved(adapter.identity), into=adapter.into, bare_base_fingerprint=adapter.bare_fingerprint
    )


def started(event: Started, request_id: str, identity: AdapterIdentity | None) -> inference_pb2.Started:
    return inference_pb2.Started(
        request_id=request_id,
        adapter=resolved(identity),
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        queue_time=_duration(event.queue_s),
    )


def delta(event: Delta) -> inference_pb2.Delta:
    return inference_pb2.Delta(
        index=event.index, text=event.text, token_ids=event.token_ids, logprobs=logprobs(event.logprobs)
    )


def finished(event: Finished) -> inference_pb2.Finished:
    return inference_pb2.Finished(
        index=event.index,
        finish_reason=finish_reason(event),
        usage=usage(event),
        timings=timings(event.timings),
    )


def finish_reason(event: Finished) -> "inference_pb2.FinishReason.ValueType":
    return _FINISH_REASONS[event.reason]


def usage(event: Finished) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        cached_tokens=event.cached_tokens,
    )


def total_usage(ends: Sequence[Finished]) -> inference_pb2.Usage:
    """Of a request with several answers: its prompt counts once, as the first of them found it."""
    first = min(ends, key=lambda end: end.index)
    return inference_pb2.Usage(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=sum(end.completion_tokens for end in ends),
        cached_tokens=first.cached_tokens,
    )


def total_timings(ends: Sequence[Finished]) -> inference_pb2.Timings:
    """Of a request with several answers: the first one's, and the time until the last one's end."""
    first = min(ends, key=lambda end: end.index)
    return timings(replace(first.timings, total_s=max(end.timings.total_s for end in ends)))


def timings(values: Timings) -> inference_pb2.Timings:
    return inference_pb2.Timings(
        queue=_duration(values.queue_s),
        adapter_load=_duration(values.adapter_load_s),
        time_to_first_token=_duration(values.time_to_first_token_s),
        total=_duration(values.total_s),
    )


def logprobs(values: Iterable[TokenLogprob]) -> list[inference_pb2.TokenLogprob]:
    return [
        inference_pb2.TokenLogprob(
            token_id=value.token_id,
            logprob=value.logprob,
            alternatives=[
                inference_pb2.TokenAlternative(token_id=token_id, logprob=logprob)
                for token_id, logprob in value.alternatives
            ],
        )
        for value in values
    ]


def tier_to_load(residency: "adapters_pb2.Residency.ValueType") -> TierName:
    """Where LoadAdapter is to bring an adapter.

    Raises:
        InvalidRequestError
    """
    if residency in (adapters_pb2.RESIDENCY_UNSPECIFIED, adapters_pb2.RESIDENCY_DEVICE):
        return "device"
    if residency == adapters_pb2.RESIDENCY_HOST:
        return "host"
    raise InvalidRequestError("tier", f"is {residency}; an adapter is loaded to DEVICE or HOST")


def is_kept_on_host(residency: "adapters_pb2.Residency.ValueType") -> bool:
    """Whether UnloadAdapter is to keep an adapter in host memory.

    Raises:
        InvalidRequestError
    """
    if residency in (adapters_pb2.RESIDENCY_UNSPECIFIED, adapters_pb2.RESIDENCY_DISK):
        return False
    if residency == adapters_pb2.RESIDENCY_HOST:
        return True
    raise InvalidRequestError("tier", f"is {residency}; an adapter is unloaded to HOST or DISK")


def adapter(record: AdapterRecord, residency: Whereabouts) -> adapters_pb2.Adapter:
    """The message of one version, which is in that tier."""
    message = adapters_pb2.Adapter(
        name=record.name,
        version=record.version,
        etag=record.etag,
        state=adapters_pb2.AdapterState.Value(f"ADAPTER_STATE_{record.state.name}"),
        residency=adapters_pb2.Residency.Value(f"RESIDENCY_{residency.upper()}"),
        pinned=record.pinned,
        aliases=record.aliases,
        labels=record.labels,
        description=record.description,
        create_time=_timestamp(record.created_s),
        update_time=_timestamp(record.updated_s),
        error=record.error,
    )
    _set_facts(message, record.facts)
    return message


def adapter_event(event: AdapterEvent) -> adapters_pb2.WatchAdaptersResponse:
    if isinstance(event, Deleted):
        gone = adapters_pb2.Adapter(
            name=event.name,
            version=event.version,
            digest=event.digest,
            state=adapters_pb2.ADAPTER_STATE_DELETING,
        )
        return adapters_pb2.WatchAdaptersResponse(adapter=gone, deleted=True)
    return adapters_pb2.WatchAdaptersResponse(adapter=adapter(event.record, event.residency))


def collection(collected: Collection) -> adapters_pb2.CollectGarbageResponse:
    versions = [
        adapters_pb2.CollectedVersion(
            name=version.name,
            version=version.version,
            digest=version.digest,
            reason=version.reason,
            freed_bytes=version.freed_bytes,
        )
        for version in collected.versions
    ]
    quarantined = [
        adapters_pb2.CollectedQuarantine(
            place=entry.place, digest=entry.digest, reason=entry.reason, freed_bytes=entry.size_bytes
        )
        for entry in collected.quarantined
    ]
    return adapters_pb2.CollectGarbageResponse(
        versions=versions, freed_bytes=collected.freed_bytes, quarantined=quarantined
    )


def _set_facts(message: adapters_pb2.Adapter, facts: AdapterFacts) -> None:
    message.digest = facts.digest
    message.rank = facts.rank
    message.alpha = facts.alpha
    message.target_modules.extend(facts.target_modules)
    message.method = adapters_pb2.AdapterMethod.Value(f"ADAPTER_METHOD_{facts.method.upper()}")
    message.size_bytes = facts.size_bytes
    message.base_fingerprint = facts.base_fingerprint


def validated(
    name: str, labels: Mapping[str, str], description: str, facts: AdapterFacts
) -> adapters_pb2.Adapter:
    """What an upload would have become: no version, no state, nowhere."""
    message = adapters_pb2.Adapter(name=name, labels=labels, description=description)
    _set_facts(message, facts)
    return message


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def _timestamp(seconds: float) -> Timestamp:
    message = Timestamp()
    message.FromNanoseconds(round(seconds * 1e9))
    return message
