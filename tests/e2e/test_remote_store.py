"""A server whose store is a URL: it serves what is published there, as it changes, whatever becomes of it."""

import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.files import WEIGHTS_FILE
from adapters.layout import BaseLayout
from adapters.remote import RemotePlace
from adapters.remote_push import push_store
from adapters.store import AdapterStore
from quickchange import (
    Client,
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
)
from tests.adapters.builders import layout_of, put
from tests.adapters.published import spoil, weights_of
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, eventually
from tests.e2e.test_lifecycle import PROMPT, first_tokens, greedy
from tests.parity.oracle import Oracle

Start = Callable[..., ServerProcess]


class Origin:
    """A store of the test's own, and the folder where it is published."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path], layout: BaseLayout) -> None:
        self.store = AdapterStore(folder / "origin")
        self.remote = folder / "remote"
        self.url = self.remote.as_uri()
        self._adapters, self._layout = adapters, layout

    def put(self, name: str, content: str) -> str:
        return put(self.store, name, self._adapters[content], self._layout)

    def push(self, **options: bool) -> int:
        return push_store(self.store, RemotePlace(self.url), **options).generation

    def weights(self, reference: str) -> Path:
        return weights_of(self.store, reference, self.remote)


@pytest.fixture(scope="module")
def layout(base: Path) -> BaseLayout:
    return layout_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))


@pytest.fixture
def origin(tmp_path: Path, adapters: Mapping[str, Path], layout: BaseLayout) -> Iterator[Origin]:
    """Three names, published."""
    origin = Origin(tmp_path, adapters, layout)
    for name in "abc":
        origin.put(name, name)
    origin.store.update("a", 1, set_aliases=["prod"], labels={"team": "x"})
    origin.push()
    yield origin
    origin.store.close()


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    return tmp_path / "copies"


@pytest.fixture
def start(base: Path, origin: Origin, copies: Path) -> Iterator[Start]:
    """Starts servers whose store is the origin's URL; those that are to fail are not waited for."""
    started: list[ServerProcess] = []

    def begin(url: str = origin.url, ready: bool = True) -> ServerProcess:
        settings = SMALL | {"store.cache": copies, "store.refresh_s": 0.2}
        process = ServerProcess(base, copies, settings, flags=("--store", url))
        started.append(process)
        return process.wait_ready() if ready else process

    yield begin
    for process in started:
        process.close()


def fetched(copies: Path) -> set[str]:
    return {path.name for path in (copies / "blobs/sha256").iterdir()}


def tokens(client: Client, adapter: str) -> tuple[int, ...]:
    return client.generate(PROMPT, adapter=adapter, max_new_tokens=8).token_ids


def test_what_is_published_is_served_and_fetched_when_it_is_needed(
    origin: Origin, start: Start, copies: Path, oracle: Oracle, tokenizer: Any, tmp_path: Path
) -> None:
    server = start()
    with server.client() as client:
        assert [a.reference for a in client.adapters.list()] == ["a@1", "b@1", "c@1"]
        assert client.adapters.get("a").labels == {"team": "x"}
        assert fetched(copies) == set()
        assert server.scrape()["quickchange_store_bytes"] == 0
        assert tokens(client, "a:prod") == greedy(oracle, tokenizer, "a", 8)
        digest = origin.store.get("a").facts.digest
        assert fetched(copies) == {digest[7:]}
        with ThreadPoolExecutor(4) as pool:  # all of whom share one fetch
            answers = list(pool.map(lambda _: tokens(client, "b"), range(8)))
        assert answers == [greedy(oracle, tokenizer, "b", 8)] * 8
        assert len(fetched(copies)) == 2
        client.adapters.pull("c", tmp_path / "down")
        assert (tmp_path / "down" / WEIGHTS_FILE).read_bytes() == origin.weights("c").read_bytes()
        assert len(fetched(copies)) == 3
        client.adapters.load("c")
        assert tokens(client, "c") == greedy(oracle, tokenizer, "c", 8)
    assert len(re.findall("adapter fetched", server.log)) == 3


def test_what_is_pushed_is_taken_over(
    origin: Origin, start: Start, copies: Path, oracle: Oracle, tokenizer: Any
) -> None:
    server = start()
    with server.client() as client, client.adapters.watch() as events:
        with client.stream(PROMPT, adapter="b", max_new_tokens=1500, ignore_eos=True) as running:
            count = len(first_tokens(running, 4))
            gone = origin.store.get("b").facts.digest
            origin.put("a", "c")
            origin.store.update("a", 2, set_aliases=["prod"], pinned=True)
            origin.store.delete("b")
            assert origin.push() == 2
            event = next(event for event in events if event.adapter.reference == "a@2")
            assert event.adapter.digest == origin.store.get("c").facts.digest
            pinned = client.adapters.get("a@2")
            assert (pinned.aliases, pinned.pinned) == (("prod",), True)
            assert tokens(client, "a:prod") == greedy(oracle, tokenizer, "c", 8)
            with pytest.raises(NotFoundError):
                tokens(client, "b")
            assert gone[7:] in fetched(copies)
            assert count + len(running.result().token_ids[count:]) == 1500
        eventually(lambda: gone[7:] not in fetched(copies))
    assert "store refreshed snapshot=2" in server.log


def test_a_pinned_adapter_is_fetched_without_being_asked_for(
    origin: Origin, start: Start, copies: Path
) -> None:
    origin.store.update("c", 1, pinned=True)
    origin.push()
    server = start()
    assert fetched(copies) == {origin.store.get("c").facts.digest[7:]}
    assert "pinned adapter loaded adapter=c" in server.log
    origin.store.update("a", 1, pinned=True)
    origin.push()
    eventually(lambda: origin.store.get("a").facts.digest[7:] in fetched(copies))


def test_changes_are_refused_with_the_remedy(start: Start, adapters: Mapping[str, Path]) -> None:
    with start().client() as client:
        for change in (
            lambda: client.adapters.push(adapters["a"], "mine"),
            lambda: client.adapters.alias("a", "x", 1),
            lambda: client.adapters.pin("a"),
            lambda: client.adapters.delete("a@1"),
            lambda: client.adapters.collect_garbage(keep_versions=1, min_age_s=0),
        ):
            with pytest.raises(FailedPreconditionError, match="quickchange store push") as refusal:
                change()
            assert refusal.value.reason == "STORE_READ_ONLY"
        assert client.adapters.push(adapters["a"], "mine", validate_only=True).report is not None
        assert [a.reference for a in client.adapters.list()] == ["a@1", "b@1", "c@1"]


def test_a_blob_that_is_damaged_there_fails_alone_and_heals(
    origin: Origin, start: Start, oracle: Oracle, tokenizer: Any
) -> None:
    spoil(origin.weights("b"))
    with start().client() as client:
        with pytest.raises(DataLossError, match=r"has SHA-256 .* instead of"):
            tokens(client, "b")
        with pytest.raises(DataLossError, match="b@1 is FAILED") as refusal:
            tokens(client, "b")
        assert refusal.value.reason == "ADAPTER_FAILED"
        failed = client.adapters.get("b")
        assert (failed.state.name, WEIGHTS_FILE in failed.error) == ("FAILED", True)
        assert tokens(client, "a") == greedy(oracle, tokenizer, "a", 8)
        origin.push(verify=True)
        eventually(lambda: client.adapters.get("b").state.name == "READY")
        assert tokens(client, "b") == greedy(oracle, tokenizer, "b", 8)


def test_a_place_that_is_gone(
    origin: Origin, start: Start, tmp_path: Path, oracle: Oracle, tokenizer: Any
) -> None:
    server = start()
    with server.client() as client:
        assert tokens(client, "a") == greedy(oracle, tokenizer, "a", 8)
        shutil.move(origin.remote, tmp_path / "away")
        eventually(lambda: "serving snapshot 1 until the store is back" in server.log)
        assert tokens(client, "a") == greedy(oracle, tokenizer, "a", 8)
        with pytest.raises(UnavailableError, match="there is no store at") as refusal:
            tokens(client, "b")
        assert refusal.value.reason == "STORE_UNREACHABLE"
        assert client.adapters.get("b").state.name == "READY"
        shutil.move(tmp_path / "away", origin.remote)
        eventually(lambda: "the store is back" in server.log)
        assert tokens(client, "b") == greedy(oracle, tokenizer, "b", 8)


@pytest.mark.slow
def test_a_start_without_the_place(
    origin: Origin, start: Start, tmp_path: Path, oracle: Oracle, tokenizer: Any
) -> None:
    first = start()
    with first.client() as client:
        tokens(client, "a")
    first.close()
    shutil.move(origin.remote, tmp_path / "away")
    again = start()
    assert "starting with snapshot 1 of the store" in again.log
    with again.client() as client:
        assert tokens(client, "a") == greedy(oracle, tokenizer, "a", 8)
    again.close()
    shutil.rmtree(again.store)
    fresh = start(ready=False)
    assert fresh.wait() == 1
    assert f"error: --store {origin.url}: there is no store at {origin.url}" in fresh.log


@pytest.mark.slow
def test_a_driver_that_is_not_installed_is_named(start: Start) -> None:
    server = start("s3://bucket/adapters", ready=False)
    assert server.wait() == 1
    assert (
        "s3://bucket/adapters needs the package s3fs, which is not installed: pip install s3fs" in server.log
    )


class Gate(SimpleHTTPRequestHandler):
    """Serves a folder; of one file it gives the first bytes, and the rest when it is told to."""

    folder: Path
    held = ""
    reached = threading.Event()
    open = threading.Event()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=str(self.folder))

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self.held and self.path.endswith(self.held):
            outputfile.write(source.read(1000))
            outputfile.flush()
            self.reached.set()
            self.open.wait(60)
        super().copyfile(source, outputfile)

    def log_request(self, *args: object) -> None:
        pass

    def log_error(self, *args: object) -> None:
        pass


@pytest.fixture
def web(origin: Origin) -> Iterator[tuple[str, type[Gate]]]:
    """The published store over HTTP, and the gate that may hold a file back."""
    gate = type("OwnGate", (Gate,), {"folder": origin.remote, "reached": threading.Event()})
    gate.open = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), gate) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", gate
        gate.open.set()
        server.shutdown()


def test_a_slow_fetch_holds_up_nobody_and_a_kill_in_the_middle_leaves_nothing(
    web: tuple[str, type[Gate]],
    origin: Origin,
    start: Start,
    copies: Path,
    oracle: Oracle,
    tokenizer: Any,
) -> None:
    url, gate = web
    gate.held = f"{origin.store.get('b').facts.digest[7:]}/{WEIGHTS_FILE}"
    server = start(url)
    with server.client() as client, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(tokens, client, "b") for _ in range(3)]
        assert gate.reached.wait(30)
        for name in "ac":  # fetched, loaded and answered meanwhile
            assert tokens(client, name) == greedy(oracle, tokenizer, name, 8)
        assert not any(each.done() for each in waiting)
        server.process.kill()
        for each in waiting:
            with pytest.raises(UnavailableError):
                each.result()
    server.wait()
    assert origin.store.get("b").facts.digest[7:] not in fetched(copies)
    gate.held = ""
    again = start(url)
    assert len(list((copies / "staging").iterdir())) == 2, "the dead server's staging is still there"
    with again.client() as client:
        assert tokens(client, "b") == greedy(oracle, tokenizer, "b", 8)


def test_a_server_that_is_told_to_stop_does_not_wait_for_a_fetch(
    web: tuple[str, type[Gate]], origin: Origin, start: Start
) -> None:
    url, gate = web
    gate.held = f"{origin.store.get('b').facts.digest[7:]}/{WEIGHTS_FILE}"
    server = start(url)
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tokens, client, "b")
        assert gate.reached.wait(30)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        with pytest.raises(UnavailableError):
            waiting.result()
