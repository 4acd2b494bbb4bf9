"""Limits of what one request may ask for and of what may wait; many times more requests than are answered."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from quickchange import Client, DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError, Started
from tests.e2e.process import ServerProcess, eventually

PROMPT = "over and over"
RUNNING, WAITING = 4, 8
LONG = 16000

StartServer = Callable[..., ServerProcess]


@pytest.fixture
def start(own_server: StartServer) -> Callable[..., ServerProcess]:
    return lambda **changes: own_server(
        engine__max_running_requests=RUNNING, engine__max_waiting_requests=WAITING, **changes
    )


def hasty(server: ServerProcess) -> Client:
    """A client that asks once."""
    return Client(server.grpc, timeout_s=60, retry_window_s=0)


def moment_of(error: ResourceExhaustedError) -> float:
    """When a full queue says to come back, in seconds."""
    assert error.reason == "QUEUE_FULL"
    assert error.retry_after_s is not None
    return error.retry_after_s


def is_idle(client: Client) -> bool:
    capacity = client.server_info().capacity
    return capacity.requests_waiting + capacity.requests_running == 0


@contextmanager
def all_running(client: Client, count: int = RUNNING) -> Iterator[ExitStack]:
    """So many endless requests; whoever comes now waits."""
    with ExitStack() as streams:
        for _ in range(count):
            stream = streams.enter_context(client.stream(PROMPT, max_new_tokens=LONG, ignore_eos=True))
            assert isinstance(next(stream), Started)
        yield streams


def queue(client: Client, streams: ExitStack, prompt: list[int]) -> None:
    before = client.server_info().capacity.requests_waiting
    streams.callback(client.stream(prompt, max_new_tokens=1).close)
    eventually(lambda: client.server_info().capacity.requests_waiting == before + 1)


def test_limits_of_one_request(start: StartServer) -> None:
    server = start(engine__max_prompt_tokens=50, engine__max_new_tokens=20, engine__max_answers=2)
    with hasty(server) as client:
        told = client.server_info().limits
        assert (told.max_prompt_tokens, told.max_new_tokens, told.max_answers) == (50, 20, 2)
        assert told.max_waiting_tokens is None
        for options, field in (
            ({"prompt": [7] * 51}, "prompt"),
            ({"prompt": PROMPT, "max_new_tokens": 21}, "sampling.max_new_tokens"),
        ):
            with pytest.raises(InvalidArgumentError) as caught:
                client.generate(**options)  # type: ignore[arg-type]  # each of its own type
            assert [violation.field for violation in caught.value.field_violations] == [field]
        with pytest.raises(InvalidArgumentError, match="must be at most 2"):
            client.generate_many(PROMPT, 3)
        answers = client.generate_many([7] * 50, 2, max_new_tokens=20, ignore_eos=True)
        assert [answer.usage.completion_tokens for answer in answers] == [20, 20]
        # Who says nothing of the length gets what is allowed.
        assert client.generate(PROMPT, ignore_eos=True).usage.completion_tokens == 20


def test_prompts_that_wait_are_limited_by_their_tokens(start: StartServer) -> None:
    server = start(engine__max_waiting_tokens=100)
    with hasty(server) as client, all_running(client) as streams:
        assert client.server_info().limits.max_waiting_tokens == 100
        queue(client, streams, [7] * 150)  # longer than all that may wait, but nothing else does
        with pytest.raises(ResourceExhaustedError) as caught:
            client.generate([8] * 10, max_new_tokens=1)
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_s
    with hasty(server) as client:
        eventually(lambda: is_idle(client))
        with all_running(client) as streams:
            for _ in range(3):
                queue(client, streams, [9] * 30)
            with pytest.raises(ResourceExhaustedError):
                client.generate([8] * 11, max_new_tokens=1)
            queue(client, streams, [8] * 10)
        eventually(lambda: is_idle(client))
        assert client.generate([8] * 11, max_new_tokens=1).token_ids


def test_a_queued_request_that_is_cancelled_or_late_leaves_the_queue(start: StartServer) -> None:
    server = start()
    with hasty(server) as client, all_running(client) as streams:
        queue(client, streams, [7] * 10)
        waiting = client.stream(PROMPT, max_new_tokens=4)
        eventually(lambda: client.server_info().capacity.requests_waiting == 2)
        waiting.close()
        eventually(lambda: client.server_info().capacity.requests_waiting == 1)
        with pytest.raises(DeadlineExceededError):
            client.generate(PROMPT, max_new_tokens=4, timeout_s=0.3)
        eventually(lambda: client.server_info().capacity.requests_waiting == 1)


def test_a_deadline_in_the_middle_of_a_prompt_gives_everything_back(start: StartServer) -> None:
    """Its chunks take many steps; the deadline passes between two of them."""
    server = start(engine__prefill_chunk_tokens=8, engine__kv_bytes="64MiB")
    with hasty(server) as client:
        began = client.server_info().steps.tokens_computed
        with pytest.raises(DeadlineExceededError):
            client.generate([7] * LONG, max_new_tokens=4, timeout_s=0.5)
        eventually(lambda: is_idle(client))
        info = client.server_info()
        assert 0 < info.steps.tokens_computed - began < LONG  # it had begun, and was not to the end
        assert info.capacity.kv_tokens_free == info.capacity.kv_tokens_total
        assert client.generate(PROMPT, max_new_tokens=4).token_ids


def test_whoever_comes_back_when_told_to_gets_in(start: StartServer) -> None:
    """Ten times what may run and wait; each asks again after the time that it was told, and no sooner."""
    server = start()
    callers = 10 * (RUNNING + WAITING)

    def until_served(index: int) -> tuple[int, ...]:
        with hasty(server) as client:
            while True:
                try:
                    return client.generate(
                        [index % 64 + 70] * 8, max_new_tokens=16, ignore_eos=True
                    ).token_ids
                except ResourceExhaustedError as error:
                    time.sleep(moment_of(error))

    with ThreadPoolExecutor(callers) as pool:
        answers = list(pool.map(until_served, range(callers)))
    assert all(len(answer) == 16 for answer in answers)
    with hasty(server) as client:
        assert is_idle(client)


@pytest.mark.slow
def test_ten_times_overload_for_a_while(start: StartServer) -> None:
    """Everybody is served in full or told when to come back; afterwards it is as if nothing had been."""
    server = start()
    with hasty(server) as client:
        alone = client.generate(PROMPT, max_new_tokens=64, ignore_eos=True).token_ids
        over_s = time.monotonic() + 20

        def insist(_: int) -> Counter[str]:
            seen: Counter[str] = Counter()
            with hasty(server) as mine:
                while time.monotonic() < over_s:
                    try:
                        answer = mine.generate(PROMPT, max_new_tokens=64, ignore_eos=True)
                    except ResourceExhaustedError as error:
                        seen["refused"] += moment_of(error) > 0
                    else:
                        assert answer.token_ids == alone
                        seen["served"] += 1
            return seen

        callers = 10 * RUNNING
        with ThreadPoolExecutor(callers) as pool:
            seen = sum(pool.map(insist, range(callers)), Counter())
        ended_s = time.monotonic()
        eventually(lambda: is_idle(client), 2)
        assert client.generate(PROMPT, max_new_tokens=64, ignore_eos=True).token_ids == alone
        print(f"{dict(seen)}, idle and serving after {time.monotonic() - ended_s:.2f} s")
        assert seen["refused"] > seen["served"] > RUNNING
        capacity = client.server_info().capacity
        assert capacity.kv_tokens_free == capacity.kv_tokens_total
