"""An engine that dies, hangs or is only slow: what health, streams and the exit status then say."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quickchange import Client, Delta, UnavailableError
from tests.e2e.conftest import SMALL
from tests.e2e.faulty import COMMAND
from tests.e2e.process import ServerProcess, eventually, running

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PROMPT = "watch me"
BOUND_S = 3.0
LAST_WORDS_S = 5.0


class Health:
    """What a watcher of a server's health was told, and when."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.told: list[tuple[int, float]] = []
        self._watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        eventually(lambda: self.statuses == [SERVING])

    @property
    def statuses(self) -> list[int]:
        return [status for status, _ in self.told]

    def _read(self) -> None:
        try:
            for answer in self._watch:
                self.told.append((answer.status, time.monotonic()))
        except grpc.RpcError:
            pass  # the server is gone


@contextmanager
def watched(base: Path, store: Path, **settings: object) -> Iterator[tuple[ServerProcess, Client, Health]]:
    process = ServerProcess(base, store, SMALL | settings, COMMAND)
    with running(process) as server, server.client() as client, grpc.insecure_channel(server.grpc) as channel:
        yield server, client, Health(channel)


def in_background(client: Client, request_id: str) -> list[float]:
    """Sends the request that breaks the engine; when it was told so."""
    told: list[float] = []

    def ask() -> None:
        with pytest.raises(UnavailableError) as caught:
            client.generate(PROMPT, request_id=request_id, max_new_tokens=4)
        assert caught.value.reason == "ENGINE_DOWN"
        told.append(time.monotonic())

    threading.Thread(target=ask).start()
    return told


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_an_engine_that_dies_or_hangs_is_not_ready_ends_streams_and_the_process(
    fault: str, base: Path, tmp_path: Path
) -> None:
    settings = {"engine.watchdog_s": BOUND_S}
    with watched(base, tmp_path / "store", **settings) as (server, client, health):
        stream = client.stream(PROMPT, max_new_tokens=16000, ignore_eos=True)
        next(stream)
        began_s = time.monotonic()
        told = in_background(client, fault)
        eventually(lambda: len(health.told) > 1)
        status, not_serving_s = health.told[1]
        assert status == NOT_SERVING
        assert not_serving_s - began_s < 1.0
        with pytest.raises(UnavailableError) as caught:
            list(stream)
        assert caught.value.reason == "ENGINE_DOWN"
        eventually(lambda: told)
        assert told[0] - began_s < BOUND_S + 2
        assert server.wait(BOUND_S + LAST_WORDS_S + 5) == 1
        assert health.statuses == [SERVING, NOT_SERVING]
        if fault == "hang":
            assert "the engine hangs" in server.log
            assert "in _break" in server.log  # where it hangs


def test_a_step_that_takes_long_is_no_hang(base: Path, tmp_path: Path) -> None:
    """Not ready while it is overdue, ready again afterwards; nobody loses a token."""
    settings = {"engine.watchdog_s": 60}
    with watched(base, tmp_path / "store", **settings) as (server, client, health):
        alone = client.generate(PROMPT, max_new_tokens=200, ignore_eos=True).token_ids
        stream = client.stream(PROMPT, max_new_tokens=200, ignore_eos=True)
        next(stream)
        client.generate(PROMPT, request_id="slow-2.5", max_new_tokens=4)
        eventually(lambda: len(health.told) == 3)
        assert health.statuses == [SERVING, NOT_SERVING, SERVING]
        tokens = [token for event in stream if isinstance(event, Delta) for token in event.token_ids]
        assert tuple(tokens) == alone[-len(tokens) :]
        assert client.generate(PROMPT, max_new_tokens=200, ignore_eos=True).token_ids == alone
        client.drain()
        assert server.wait() == 0
