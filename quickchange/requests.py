"""What a caller may ask for, as messages of the wire. Knows nothing of channels or of answers."""

import reprlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypedDict, TypeVar

from google.protobuf.message import Message as WireMessage

from quickchange.errors import FieldViolation, InvalidArgumentError
from quickchange.types import AdapterState, Residency
from quickchange.v1 import adapters_pb2, inference_pb2

ChatMessage = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": "…"}"""

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids, or the messages of a chat."""

WireMessageT = TypeVar("WireMessageT", bound=WireMessage)


class GenerateOptions(TypedDict, total=False):
    """What may go with a prompt; whatever is left out keeps the server's default.

    adapter: empty for the base, or "name" (its newest version), "name@3", "name:alias", "sha256:…".
    max_new_tokens: at most this many; the server's default is 256.
    temperature: 0 is greedy decoding, the default.
    top_p, top_k, min_p: keep the likeliest tokens only.
    repetition_penalty, presence_penalty, frequency_penalty: against repetition.
    seed: the same seed, prompt and adapter give the same answer.
    stop: ends the answer before the first of these strings.
    stop_token_ids: ends the answer at one of these tokens.
    ignore_eos: goes on past the model's end token.
    logprobs: alternatives to report per token; 0 reports the chosen token alone.
    echo: returns the prompt's text before the answer.
    adapter_scale: multiplies the adapter's update; 1 is the default, 0 answers as the base does.
    priority: -10 to 10, larger goes first; 0 is the default.
    cache_salt: separates users in caches of prompts; tenants are separate without it.
    request_id: comes back in the answer and stands in the server's log.
    """

    adapter: str
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    echo: bool
    adapter_scale: float
    priority: int
    cache_salt: str
    request_id: str


_PLAIN = frozenset({"adapter", "adapter_scale", "priority", "cache_salt", "request_id"})
_PARTS: tuple[tuple[str, type[WireMessage], tuple[str, ...]], ...] = (
    ("sampling", inference_pb2.SamplingParams, tuple(inference_pb2.SamplingParams.DESCRIPTOR.fields_by_name)),
    ("stopping", inference_pb2.Stopping, tuple(inference_pb2.Stopping.DESCRIPTOR.fields_by_name)),
    ("output", inference_pb2.OutputOptions, tuple(inference_pb2.OutputOptions.DESCRIPTOR.fields_by_name)),
)


def generate_request(
    prompt: Prompt, options: GenerateOptions, *, n: int = 1
) -> inference_pb2.GenerateRequest:
    """The request for n answers.

    Raises:
        InvalidArgumentError: a value that the wire cannot carry; ranges are the server's to check.
        TypeError: an option that does not exist.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if n != 1:
        given["n"] = n
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    parts: dict[str, WireMessage] = {}
    for part, message, names in _PARTS:
        chosen = {name: given.pop(name) for name in names if name in given}
        if chosen:
            parts[part] = _built(message, chosen)
    _refuse_unknown(given)
    request = _built(inference_pb2.GenerateRequest, given | parts)
    _put_prompt(request, prompt)
    return request


def tokenize_request(prompt: Prompt, adapter: str) -> inference_pb2.TokenizeRequest:
    """The request to tokenize text or a chat."""
    request = _built(inference_pb2.TokenizeRequest, {"adapter": adapter})
    _put_prompt(request, prompt)
    return request


def list_adapters_request(
    name: str | None, state: AdapterState | str | None, labels: Mapping[str, str] | None, page_token: str
) -> adapters_pb2.ListAdaptersRequest:
    """The request for one page of adapters."""
    return adapters_pb2.ListAdaptersRequest(
        page_token=page_token,
        state=None if state is None else _wire_state(state),
        labels=labels,
        name=name,
    )


def _wire_state(state: AdapterState | str) -> adapters_pb2.AdapterState.ValueType:
    name = f"ADAPTER_STATE_{str(state).upper()}"
    if name not in adapters_pb2.AdapterState.keys():  # noqa: SIM118 - the wrapper is no mapping
        known = ", ".join(member for member in AdapterState if member is not AdapterState.UNKNOWN)
        raise _invalid("state", f"is {state}; there are {known}")
    return adapters_pb2.AdapterState.Value(name)


def load_adapter_request(reference: str, tier: Residency | str) -> adapters_pb2.LoadAdapterRequest:
    """The request to bring an adapter to a tier."""
    return adapters_pb2.LoadAdapterRequest(adapter=reference, tier=_wire_tier(tier))


def unload_adapter_request(reference: str, tier: Residency | str) -> adapters_pb2.UnloadAdapterRequest:
    """The request to let an adapter go down to a tier."""
    return adapters_pb2.UnloadAdapterRequest(adapter=reference, tier=_wire_tier(tier))


def _wire_tier(tier: Residency | str) -> adapters_pb2.Residency.ValueType:
    name = f"RESIDENCY_{str(tier).upper()}"
    if name not in adapters_pb2.Residency.keys():  # noqa: SIM118 - the wrapper is no mapping
        known = ", ".join(member for member in Residency if member is not Residency.UNKNOWN)
        raise _invalid("tier", f"is {tier}; there are {known}")
    return adapters_pb2.Residency.Value(name)


def update_adapter_request(
    reference: str,
    *,
    etag: str | None = None,
    set_aliases: Sequence[str] = (),
    remove_aliases: Sequence[str] = (),
    pinned: bool | None = None,
    labels: Mapping[str, str] | None = None,
    aliases_from: int | None = None,
) -> adapters_pb2.UpdateAdapterRequest:
    """The request to change what points at a version."""
    return adapters_pb2.UpdateAdapterRequest(
        adapter=reference,
        etag=etag,
        set_aliases=set_aliases,
        remove_aliases=remove_aliases,
        pinned=pinned,
        labels=None if labels is None else adapters_pb2.Labels(values=labels),
        aliases_from=aliases_from,
    )


def collect_garbage_request(
    keep_versions: int | None, min_age_s: float | None, *, dry_run: bool
) -> adapters_pb2.CollectGarbageRequest:
    """The request to collect old versions; None is the server's setting."""
    request = _built(adapters_pb2.CollectGarbageRequest, {"dry_run": dry_run})
    if keep_versions is not None:
        request.MergeFrom(_built(adapters_pb2.CollectGarbageRequest, {"keep_versions": keep_versions}))
    if min_age_s is not None:
        try:
            request.min_age.FromTimedelta(timedelta(seconds=min_age_s))
        except (OverflowError, ValueError) as error:
            raise _invalid("min_age", f"is {min_age_s} seconds: {error}") from None
    return request


def _put_prompt(
    request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, prompt: Prompt
) -> None:
    if isinstance(prompt, str):
        try:
            request.text = prompt
        except ValueError as error:  # half of a surrogate pair
            raise _invalid("prompt", f"is {reprlib.repr(prompt)}: {error}") from None
        return
    if not prompt:
        raise _invalid("prompt", "is empty; give text, token ids or chat messages")
    if isinstance(prompt[0], Mapping):
        request.chat.messages.extend(_chat_message(message) for message in prompt)
    elif isinstance(request, inference_pb2.GenerateRequest):
        request.token_ids.CopyFrom(_built(inference_pb2.TokenIds, {"ids": prompt}))
    else:
        raise _invalid("prompt", "is token ids already; give text or chat messages")


def _chat_message(message: object) -> inference_pb2.ChatMessage:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise _invalid(
            "prompt", f"has the message {reprlib.repr(message)}; each one is {{'role': …, 'content': …}}"
        )
    return _built(inference_pb2.ChatMessage, message)


def _built(message: type[WireMessageT], fields: Mapping[str, Any]) -> WireMessageT:
    """The message with these fields; the error of a bad one names it."""
    built = message()
    for name, value in fields.items():
        try:
            built.MergeFrom(message(**{name: value}))
        except (TypeError, ValueError) as error:
            raise _invalid(name, f"is {reprlib.repr(value)}: {error}") from None
    return built


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    unknown = sorted(set(given) - _PLAIN)
    if unknown:
        raise TypeError(f"no such option: {', '.join(unknown)}; GenerateOptions lists what there is")


def _invalid(field: str, description: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field}: {description}",
        reason="INVALID_REQUEST",
        field_violations=(FieldViolation(field, description),),
    )
