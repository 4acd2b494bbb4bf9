"""Messages to values: presence, ranges, and what is refused because it is not there yet."""

from dataclasses import replace

import pytest

from quickchange.v1 import inference_pb2
from server.errors import InvalidRequestError
from server.merged import Answerer
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
from server.services import convert


def request(**sampling: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(sampling=inference_pb2.SamplingParams(**sampling))  # type: ignore[arg-type]


def test_unset_fields_keep_the_defaults() -> None:
    assert convert.sampling_of(inference_pb2.GenerateRequest(), 1000) == SamplingParams()


def test_the_default_length_is_bounded_by_the_context_and_an_explicit_one_is_not() -> None:
    assert convert.sampling_of(request(), 17).max_new_tokens == 17
    assert (
        convert.sampling_of(request(), -3).max_new_tokens == 1
    )  # the engine says that the prompt is too long
    assert convert.sampling_of(request(max_new_tokens=300), 17).max_new_tokens == 300


def test_every_field_arrives() -> None:
    message = request(
        max_new_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_k=5,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        seed=2**63,
        n=1,
    )
    message.stopping.stop.extend(["\n", "END"])
    message.stopping.stop_token_ids.extend([3, 4])
    message.stopping.ignore_eos = True
    message.output.logprobs = 2
    assert convert.sampling_of(message, 1000) == SamplingParams(
        max_new_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_k=5,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        seed=2**63,
        stop=("\n", "END"),
        stop_token_ids=frozenset({3, 4}),
        ignore_eos=True,
        logprobs=2,
    )


def test_an_explicit_zero_is_a_value() -> None:
    assert convert.sampling_of(request(seed=0), 9).seed == 0
    message = request()
    message.output.logprobs = 0
    assert convert.sampling_of(message, 9).logprobs == 0
    with pytest.raises(InvalidRequestError, match=r"max_new_tokens: is 0"):
        convert.sampling_of(request(max_new_tokens=0), 9)
    with pytest.raises(InvalidRequestError, match=r"top_p: is 0"):
        convert.sampling_of(request(top_p=0.0), 9)


def request_of(message: inference_pb2.GenerateRequest) -> Request:
    return convert.request_of(
        message, "r", (1, 2), Answerer(None), room_tokens=100, deadline_s=None, tenant="acme"
    )


def test_what_goes_beside_sampling_arrives() -> None:
    message = request(n=3)
    message.priority, message.cache_salt, message.adapter_scale = -2, "tenant", 0.0
    made = request_of(message)
    assert (made.n, made.priority, made.cache_salt, made.adapter_scale) == (3, -2, "tenant", 0.0)
    assert made.tenant == "acme"
    made = request_of(request())
    assert (made.n, made.priority, made.cache_salt, made.adapter_scale) == (1, 0, "", 1.0)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (request(n=0), "sampling.n"),
        (inference_pb2.GenerateRequest(priority=11), "priority"),
        (inference_pb2.GenerateRequest(adapter_scale=17.0), "adapter_scale"),
        (inference_pb2.GenerateRequest(adapter_scale=float("nan")), "adapter_scale"),
        (inference_pb2.GenerateRequest(cache_salt="x" * 257), "cache_salt"),
    ],
)
def test_what_is_out_of_range_is_refused(message: inference_pb2.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        request_of(message)
    assert caught.value.field == field


def test_a_request_id_is_kept_or_made() -> None:
    assert convert.request_id_of(inference_pb2.GenerateRequest(request_id="mine")) == "mine"
    made = {convert.request_id_of(inference_pb2.GenerateRequest()) for _ in range(100)}
    assert len(made) == 100
    assert all(made)


@pytest.mark.parametrize("bad", ["x" * 129, "a\nERROR forged line", "\x1b[31m"])
def test_a_request_id_cannot_forge_the_log(bad: str) -> None:
    with pytest.raises(InvalidRequestError, match="request_id"):
        convert.request_id_of(inference_pb2.GenerateRequest(request_id=bad))


def test_events_become_messages() -> None:
    identity = AdapterIdentity("sql", 3, "sha256:00")
    started = convert.started(Started(5, 2, 0.25), "r1", identity)
    assert (started.request_id, started.prompt_tokens, started.cached_tokens) == ("r1", 5, 2)
    assert (started.adapter.name, started.adapter.version, started.adapter.digest) == ("sql", 3, "sha256:00")
    assert started.queue_time.ToMilliseconds() == 250

    delta = convert.delta(Delta("hi", (1, 2), (TokenLogprob(1, -0.5, ((1, -0.5), (9, -2.0))),)))
    assert (delta.text, list(delta.token_ids)) == ("hi", [1, 2])
    assert [(a.token_id, a.logprob) for a in delta.logprobs[0].alternatives] == [(1, -0.5), (9, -2.0)]

    timings = Timings(queue_s=0.5, adapter_load_s=0.125, time_to_first_token_s=1.5, total_s=61.25)
    finished = convert.finished(Finished(FinishReason.LENGTH, 5, 7, 2, timings))
    assert finished.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 7)
    assert finished.usage.cached_tokens == 2
    assert (finished.timings.total.seconds, finished.timings.total.nanos) == (61, 250_000_000)
    assert finished.timings.adapter_load.ToMilliseconds() == 125


def test_usage_of_several_answers_counts_the_prompt_once() -> None:
    timings = Timings(queue_s=0.5, adapter_load_s=0.0, time_to_first_token_s=1.0, total_s=2.0)
    ends = [
        Finished(FinishReason.STOP, 5, 7, 4, replace(timings, total_s=9.0), index=1),
        Finished(FinishReason.LENGTH, 5, 3, 0, timings, index=0),
    ]
    usage = convert.total_usage(ends)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 10, 0)
    assert convert.total_timings(ends).total.seconds == 9


def test_the_base_is_an_empty_adapter() -> None:
    assert convert.resolved(convert.identity_of(None)) == inference_pb2.ResolvedAdapter()


def test_every_finish_reason_has_a_message() -> None:
    timings = Timings(0, 0, 0, 0)
    seen = {convert.finish_reason(Finished(reason, 1, 1, 0, timings)) for reason in FinishReason}
    assert len(seen) == len(FinishReason)
    assert inference_pb2.FINISH_REASON_UNSPECIFIED not in seen
