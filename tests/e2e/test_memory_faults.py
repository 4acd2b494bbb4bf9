"""Memory that is not there when it is needed: the system refuses it for real, by a limit on address space.

Whoever needed it is told so, and nobody else notices; the server goes on, and serves the same when there is
memory again.
"""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quickchange import AdapterState, Client, ResourceExhaustedError
from tests.e2e.faulty import COMMAND
from tests.e2e.process import ServerProcess, eventually, running
from tests.e2e.wide import build_wide_model, write_wide_adapter
from tests.models import rewrite_config

PROMPT = "not enough"
ADAPTER_BYTES = 64 << 20
LONG_TOKENS = 3000
"""Activations of so many tokens in one step take much more than the limit leaves."""

SETTINGS = {
    "engine.kv_bytes": "256MiB",
    "engine.max_running_requests": 8,
    "engine.max_batch_tokens": LONG_TOKENS + 64,
    "engine.adapter_device_bytes": "512MiB",
    "engine.max_adapter_rank": 4096,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_wide_model(tmp_path_factory.mktemp("wide"))
    rewrite_config(folder, max_position_embeddings=2 * LONG_TOKENS)
    return folder


@pytest.fixture(scope="module")
def server(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("short of memory")
    with (
        running(ServerProcess(wide, root / "store", SETTINGS, COMMAND)) as process,
        process.client() as client,
    ):
        client.adapters.push(write_wide_adapter(root / "small", 1 << 20), "small")
        client.adapters.push(write_wide_adapter(root / "large", ADAPTER_BYTES, seed=1), "large")
        client.adapters.unload("large")
        with ThreadPoolExecutor(8) as pool:  # threads that the server makes when it needs them are there
            list(pool.map(lambda _: ask(client, "small"), range(16)))
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with server.client() as connected:
        yield connected


@pytest.fixture
def short_of_memory(server: ServerProcess) -> Iterator[None]:
    tell(server, signal.SIGUSR1, "memory limited")
    yield
    if server.process.poll() is None:
        tell(server, signal.SIGUSR2, "memory unlimited")


def tell(server: ServerProcess, number: signal.Signals, word: str) -> None:
    before = server.log.count(word)
    server.signal(number)
    eventually(lambda: server.log.count(word) > before)


def ask(client: Client, adapter: str = "", tokens: int = 32) -> tuple[int, ...]:
    return client.generate(PROMPT, adapter=adapter, max_new_tokens=tokens, ignore_eos=True).token_ids


@pytest.fixture
def alone(client: Client) -> dict[str, tuple[int, ...]]:
    found = {name: ask(client, name, 150) for name in ("", "small")}
    assert found[""] != found["small"]
    return found


def beside(client: Client, alone: dict[str, tuple[int, ...]], work: object) -> None:
    """Does the work while two answers are under way, whose tokens must not change."""
    with ThreadPoolExecutor(2) as pool:
        going = {name: pool.submit(ask, client, name, 150) for name in alone}
        eventually(lambda: client.server_info().capacity.requests_running >= 2)
        work()  # type: ignore[operator]  # a function
        assert {name: future.result() for name, future in going.items()} == alone


def test_a_prompt_without_memory_fails_alone(
    client: Client, alone: dict[str, tuple[int, ...]], short_of_memory: None, server: ServerProcess
) -> None:
    def too_long() -> None:
        for _ in range(6):  # more than the failures in a row that would mean a broken device
            with pytest.raises(ResourceExhaustedError) as caught:
                client.generate([7] * LONG_TOKENS, max_new_tokens=4, timeout_s=120)
            assert caught.value.reason == "OUT_OF_MEMORY"

    beside(client, alone, too_long)
    too_long()  # and with nobody beside it
    counts = server.scrape()
    assert any('code="RESOURCE_EXHAUSTED"' in name and "finished" in name for name in counts)
    tell(server, signal.SIGUSR2, "memory unlimited")
    assert (
        client.generate([7] * LONG_TOKENS, max_new_tokens=4, ignore_eos=True).usage.prompt_tokens
        == LONG_TOKENS
    )
    assert ask(client, "small", 150) == alone["small"]


def test_an_adapter_without_memory_fails_its_requests_only(
    client: Client, alone: dict[str, tuple[int, ...]], short_of_memory: None, server: ServerProcess
) -> None:
    def load() -> None:
        with pytest.raises(ResourceExhaustedError) as caught:
            ask(client, "large")
        assert caught.value.metadata == {"cause": "OUT_OF_MEMORY"}
        with pytest.raises(ResourceExhaustedError):
            client.adapters.load("large")

    beside(client, alone, load)
    assert client.adapters.get("large").state is AdapterState.READY  # nothing is wrong with it
    tell(server, signal.SIGUSR2, "memory unlimited")
    assert ask(client, "large")
    assert ask(client, "small", 150) == alone["small"]
