"""Requests that are cancelled, late, too many, or not read: nobody else notices, everything comes back."""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest

from quickchange import (
    CancelledError,
    Client,
    DeadlineExceededError,
    Delta,
    GenerationStream,
    QuickchangeError,
    ResourceExhaustedError,
    Started,
)
from quickchange.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.process import ServerProcess, eventually

PROMPT = "under pressure"
LONG = 16000


def begun(client: Client, adapter: str = "") -> GenerationStream:
    """A long stream whose first token has come."""
    stream = client.stream(PROMPT, adapter=adapter, max_new_tokens=LONG, ignore_eos=True)
    assert isinstance(next(stream), Started)
    return stream


def wait_until_idle(client: Client) -> None:
    def idle() -> bool:
        capacity = client.server_info().capacity
        return (
            capacity.requests_running + capacity.requests_waiting == 0
            and capacity.kv_tokens_free == capacity.kv_tokens_total
        )

    eventually(idle)


def test_a_cancelled_stream_gives_everything_back(client: Client, pushed: Mapping[str, str]) -> None:
    stream = begun(client, "a")
    assert client.server_info().capacity.kv_tokens_free < client.server_info().capacity.kv_tokens_total
    stream.close()
    with pytest.raises(CancelledError):
        stream.result()
    wait_until_idle(client)
    eventually(lambda: client.adapters.unload("a").residency == "disk")  # nobody holds it


def test_a_cancelled_unary_call_gives_everything_back(server: ServerProcess, client: Client) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(text=PROMPT, sampling={"max_new_tokens": LONG})
        request.stopping.ignore_eos = True
        call = stub.Generate.future(request)
        eventually(lambda: client.server_info().capacity.requests_running == 1)
        call.cancel()
        wait_until_idle(client)


def test_a_cut_connection_gives_everything_back(server: ServerProcess, client: Client) -> None:
    other = server.client()
    begun(other)
    other.close()
    wait_until_idle(client)


def test_a_deadline_ends_a_request_that_runs(client: Client, server: ServerProcess) -> None:
    before = finished(server, "DEADLINE_EXCEEDED") + finished(server, "CANCELLED")
    with pytest.raises(DeadlineExceededError):
        client.generate(PROMPT, max_new_tokens=LONG, ignore_eos=True, timeout_s=0.5)
    wait_until_idle(client)
    assert finished(server, "DEADLINE_EXCEEDED") + finished(server, "CANCELLED") == before + 1


def finished(server: ServerProcess, code: str) -> float:
    counts = server.scrape().items()
    return sum(v for n, v in counts if "requests_finished_total" in n and f'code="{code}"' in n)


def test_a_full_queue_says_when_to_come_back_and_empties_again(client: Client) -> None:
    with ExitStack() as streams:
        for _ in range(4):
            streams.enter_context(begun(client))
        for _ in range(4):
            stream = client.stream(PROMPT, max_new_tokens=LONG)
            streams.callback(stream.close)
        eventually(lambda: client.server_info().capacity.requests_waiting == 4)
        with pytest.raises(ResourceExhaustedError) as caught:
            client.generate(PROMPT, max_new_tokens=1)
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 0
    wait_until_idle(client)
    assert client.generate(PROMPT, max_new_tokens=1).token_ids


def test_ten_times_too_many_requests_are_served_or_refused_at_once(client: Client) -> None:
    def ask(index: int) -> str:
        try:
            client.generate(f"{PROMPT} {index}", max_new_tokens=64, ignore_eos=True)
        except ResourceExhaustedError as error:
            return error.reason
        return "served"

    with ThreadPoolExecutor(80) as pool:
        outcomes = list(pool.map(ask, range(80)))
    assert set(outcomes) == {"served", "QUEUE_FULL"}
    assert outcomes.count("served") >= 8  # what runs and what waits
    wait_until_idle(client)


def test_a_reader_that_never_reads_costs_nobody_anything(server: ServerProcess, client: Client) -> None:
    """The sender stops at the socket's buffers; what piles up behind it is the request's own tokens."""
    with grpc.insecure_channel(server.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(text=PROMPT, sampling={"max_new_tokens": LONG})
        request.stopping.ignore_eos = True
        request.output.logprobs = 20  # many bytes a token
        client.generate(PROMPT, max_new_tokens=64, ignore_eos=True)
        memory_kib = server.memory_kib
        unread = stub.GenerateStream(inference_pb2.GenerateStreamRequest(request=request))
        tokens_before = client.server_info().steps.tokens_computed
        answers = set()
        while client.server_info().steps.tokens_computed < tokens_before + 2000:
            answers.add(client.generate(PROMPT, max_new_tokens=4, ignore_eos=True).token_ids)
        assert len(answers) == 1
        assert client.server_info().capacity.requests_running == 1
        assert server.memory_kib - memory_kib < 100 * 1024
        unread.cancel()
    wait_until_idle(client)


def test_a_bad_neighbour_does_not_change_a_stream(client: Client, pushed: Mapping[str, str]) -> None:
    """Cancels, refusals and other adapters come and go; the stream's tokens stay what they are alone."""
    alone = client.generate(PROMPT, adapter="b", max_new_tokens=200, ignore_eos=True).token_ids
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            for adapter in ("a", "", "c"):
                begun(client, adapter).close()
            with pytest.raises(QuickchangeError):
                client.generate(PROMPT, adapter="nobody")

    neighbour = threading.Thread(target=disturb)
    neighbour.start()
    try:
        stream = client.stream(PROMPT, adapter="b", max_new_tokens=200, ignore_eos=True)
        tokens = [token for event in stream if isinstance(event, Delta) for token in event.token_ids]
    finally:
        over.set()
        neighbour.join()
    assert tuple(tokens) == alone
    wait_until_idle(client)


def test_other_calls_answer_while_a_long_prompt_is_tokenized(client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.tokenize, "x" * (1 << 20))
        waits_s = []
        while not slow.done():
            began_s = time.monotonic()
            client.server_info()
            waits_s.append(time.monotonic() - began_s)
        assert len(slow.result().token_ids) == 1 << 20
    assert len(waits_s) > 5
    assert sorted(waits_s)[len(waits_s) // 2] < 0.2
