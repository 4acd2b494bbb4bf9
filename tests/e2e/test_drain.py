"""Going away in order: what runs is finished to the last token, and a restart has what it should have."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quickchange import (
    AdapterState,
    Client,
    Delta,
    Finished,
    GenerationStream,
    ResourceExhaustedError,
    Started,
    UnavailableError,
)
from tests.e2e.process import ServerProcess, eventually

STREAMS = 8
TOKENS = 600
PROMPTS = [[70 + index, 71, 72 + 2 * index, 75] for index in range(STREAMS)]

StartServer = Callable[..., ServerProcess]


def rest_of(stream: GenerationStream) -> tuple[int, ...]:
    """Tokens of a stream from here on; it must end as it should."""
    events = list(stream)
    assert isinstance(events[-1], Finished)
    return tuple(token for event in events if isinstance(event, Delta) for token in event.token_ids)


def asked(client: Client, index: int, tokens: int = TOKENS) -> GenerationStream:
    adapter = "a" if index % 2 else ""
    return client.stream(PROMPTS[index], adapter=adapter, max_new_tokens=tokens, ignore_eos=True)


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Listens as systemd does, and wants signs of life from the servers of this test."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        yield listening


def told(systemd: socket.socket) -> Iterator[str]:
    with contextlib.suppress(BlockingIOError):
        while True:
            yield systemd.recv(100).decode()


def test_systemd_is_told_how_the_server_stands(systemd: socket.socket, own_server: StartServer) -> None:
    server = own_server()
    heard = [*told(systemd)]
    assert heard.count("READY=1") == 1
    eventually(lambda: "WATCHDOG=1" in told(systemd))  # and again
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "STOPPING=1" in told(systemd)


@pytest.mark.parametrize("how", ["SIGTERM", "Drain"])
def test_no_stream_loses_a_token(how: str, own_server: StartServer, adapters: Mapping[str, Path]) -> None:
    """Eight streams, four of which wait; their tokens are those of a run that nothing disturbs."""
    server = own_server(grpc__drain_grace_s=120, engine__max_waiting_requests=STREAMS)
    with server.client() as client, ThreadPoolExecutor(STREAMS) as pool:
        client.adapters.push(adapters["a"], "a")
        undisturbed = list(pool.map(lambda index: rest_of(asked(client, index)), range(STREAMS)))
        assert len(set(undisturbed)) == STREAMS
        assert all(len(tokens) == TOKENS for tokens in undisturbed)
        streams = [asked(client, index) for index in range(STREAMS)]
        assert isinstance(next(streams[0]), Started)
        eventually(lambda: busy(client) == STREAMS)
        if how == "SIGTERM":
            server.signal(signal.SIGTERM)
        else:
            assert client.drain() == STREAMS
        eventually(lambda: "draining" in server.log)
        with pytest.raises(UnavailableError) as caught:
            client.generate("new", max_new_tokens=1)
        assert caught.value.reason == "DRAINING"
        assert list(pool.map(rest_of, streams)) == undisturbed
        assert server.wait() == 0


def busy(client: Client) -> int:
    capacity = client.server_info().capacity
    return capacity.requests_running + capacity.requests_waiting


def test_a_pinned_adapter_that_cannot_be_loaded_keeps_nobody_from_starting(
    own_server: StartServer, adapters: Mapping[str, Path]
) -> None:
    server = own_server()
    with server.client() as client:
        for name in ("a", "b"):
            client.adapters.push(adapters[name], name)
            client.adapters.pin(name)
        want = client.generate("pinned", adapter="b", max_new_tokens=8).token_ids
        client.drain()
    assert server.wait() == 0
    spoil(server.store, adapters["a"])
    again = own_server(store=server.store)
    assert "pinned adapter not loaded adapter=a digest=" in again.log
    with again.client() as client:
        assert client.adapters.get("b").residency == "device"  # before anybody asked for it
        assert client.generate("pinned", adapter="b", max_new_tokens=8).token_ids == want
        eventually(lambda: client.adapters.get("a").state is AdapterState.FAILED)
        assert client.adapters.get("a").pinned


def spoil(store: Path, uploaded: Path) -> None:
    """Flips a bit of the weights in the store that equal the uploaded ones."""
    original = (uploaded / "adapter_model.safetensors").read_bytes()
    (path,) = [path for path in store.rglob("*.safetensors") if path.read_bytes() == original]
    path.chmod(0o600)
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))


def test_a_reader_that_never_reads_costs_others_no_step(own_server: StartServer) -> None:
    """Its neighbour gets a token in every step, as if it were alone."""
    server = own_server()
    with server.client() as client:

        def steps_for_an_answer() -> int:
            before = client.server_info().steps.steps
            client.generate("neighbour", max_new_tokens=400, ignore_eos=True)
            return client.server_info().steps.steps - before

        steps_for_an_answer()
        alone = steps_for_an_answer()
        unread = client.stream("never read", max_new_tokens=16000, ignore_eos=True, logprobs=20)
        eventually(lambda: client.server_info().capacity.requests_running == 1)
        # A step or two may pass before the answer's first and after its last one.
        assert steps_for_an_answer() < alone + 20
        assert client.server_info().capacity.requests_running == 1
        unread.close()


def test_a_drain_under_overload_finishes_what_was_accepted(own_server: StartServer) -> None:
    server = own_server(grpc__drain_grace_s=120)
    outcomes: list[str] = []
    begun = threading.Event()

    def ask(index: int) -> None:
        with Client(server.grpc, timeout_s=60, retry_window_s=0) as client:
            try:
                answer = client.generate([70 + index] * 4, max_new_tokens=200, ignore_eos=True)
            except (ResourceExhaustedError, UnavailableError) as error:
                outcomes.append(error.reason)
            else:
                outcomes.append("served" if len(answer.token_ids) == 200 else "cut")
            begun.set()

    with ThreadPoolExecutor(40) as pool:
        for index in range(40):
            pool.submit(ask, index)
        assert begun.wait(60)
        server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert len(outcomes) == 40
    assert set(outcomes) <= {"served", "QUEUE_FULL", "DRAINING", ""}  # the last: it came too late to connect
    assert outcomes.count("served") >= 4
