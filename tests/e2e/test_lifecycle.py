"""Adapters that change while they are in use: replaced, renamed, loaded, deleted, downloaded."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quickchange import (
    AbortedError,
    Client,
    Delta,
    InvalidArgumentError,
    NotFoundError,
    Residency,
    Started,
)
from tests.e2e.process import ServerProcess, eventually
from tests.parity.oracle import Oracle

PROMPT = "swap me"


def greedy(oracle: Oracle, tokenizer: Any, adapter: str, count: int) -> tuple[int, ...]:
    return tuple(oracle.greedy(tokenizer(PROMPT)["input_ids"], adapter, count))


def first_tokens(stream: Any, count: int) -> list[int]:
    tokens: list[int] = []
    for event in stream:
        if isinstance(event, Delta):
            tokens += event.token_ids
        if len(tokens) >= count:
            return tokens
    raise AssertionError("the stream ended too early")


def test_a_replaced_name_changes_new_requests_and_no_running_one(
    client: Client, adapters: Mapping[str, Path], oracle: Oracle, tokenizer: Any
) -> None:
    client.adapters.push(adapters["a"], "swap")
    want_a, want_b = (greedy(oracle, tokenizer, name, 24) for name in "ab")
    with client.stream(PROMPT, adapter="swap", max_new_tokens=2000, ignore_eos=True) as running:
        started = next(running)
        assert isinstance(started, Started)
        assert started.adapter.version == 1
        tokens = first_tokens(running, 4)
        assert client.adapters.push(adapters["b"], "swap").adapter.version == 2
        new = client.generate(PROMPT, adapter="swap", max_new_tokens=24, ignore_eos=True)
        assert (new.adapter.version, new.token_ids[: len(want_b)]) == (2, want_b)
        tokens += first_tokens(running, 24)
    assert tuple(tokens[: len(want_a)]) == want_a
    old = client.generate(PROMPT, adapter="swap@1", max_new_tokens=24, ignore_eos=True)
    assert old.token_ids[: len(want_a)] == want_a != want_b
    client.adapters.delete("swap", all_versions=True)


def test_an_alias_moves_and_back(
    client: Client, adapters: Mapping[str, Path], oracle: Oracle, tokenizer: Any
) -> None:
    for name in "ab":
        client.adapters.push(adapters[name], "staged")

    def answer() -> tuple[int, ...]:
        return client.generate(PROMPT, adapter="staged:prod", max_new_tokens=8).token_ids

    with pytest.raises(NotFoundError):
        answer()
    assert client.adapters.alias("staged", "prod", 1).aliases == ("prod",)
    assert answer() == greedy(oracle, tokenizer, "a", 8)
    client.adapters.alias("staged", "prod", 2)
    assert answer() == greedy(oracle, tokenizer, "b", 8)
    assert client.adapters.get("staged@1").aliases == ()
    client.adapters.alias("staged", "prod", 1)
    assert answer() == greedy(oracle, tokenizer, "a", 8)
    client.adapters.remove_alias("staged", "prod")
    with pytest.raises(NotFoundError):
        answer()
    client.adapters.delete("staged", all_versions=True)


def test_an_alias_that_somebody_else_moved_is_left_there(
    client: Client, adapters: Mapping[str, Path]
) -> None:
    for name in ("a", "b", "c"):
        client.adapters.push(adapters[name], "moved")
    client.adapters.alias("moved", "prod", 1, from_version=0)
    client.adapters.alias("moved", "prod", 2)
    with pytest.raises(AbortedError, match="moved:prod is at moved@2, and was to be moved from moved@1"):
        client.adapters.alias("moved", "prod", 3, from_version=1)
    assert client.adapters.get("moved:prod").version == 2
    assert client.adapters.alias("moved", "prod", 3, from_version=2).aliases == ("prod",)


def test_a_stale_etag_is_refused(client: Client, adapters: Mapping[str, Path]) -> None:
    first = client.adapters.push(adapters["a"], "tagged").adapter
    second = client.adapters.set_labels("tagged", {"k": "1"}, etag=first.etag)
    assert second.etag != first.etag
    with pytest.raises(AbortedError):
        client.adapters.set_labels("tagged", {"k": "2"}, etag=first.etag)
    with pytest.raises(AbortedError):
        client.adapters.delete("tagged@1", etag=first.etag)
    assert dict(client.adapters.get("tagged").labels) == {"k": "1"}
    assert client.adapters.delete("tagged@1", etag=second.etag) == 1


def test_a_deleted_adapter_serves_its_requests_to_the_end_and_then_its_bytes_go(
    server: ServerProcess, client: Client, adapters: Mapping[str, Path], base: Path, tmp_path: Path
) -> None:
    # Content of its own, so that no other name keeps the bytes.
    folder = Path(shutil.copytree(adapters["a"], tmp_path / "own"))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 7'))
    digest = client.adapters.push(folder, "doomed").adapter.digest
    disk_before = store_bytes(server)
    with client.stream(PROMPT, adapter="doomed", max_new_tokens=1500, ignore_eos=True) as running:
        tokens = first_tokens(running, 4)
        assert client.adapters.get("doomed").residency is Residency.DEVICE
        device_before = client.server_info().capacity.adapter_device_bytes_used
        assert client.adapters.delete("doomed@1") == 1
        with pytest.raises(NotFoundError):
            client.generate(PROMPT, adapter="doomed", max_new_tokens=1)
        with pytest.raises(NotFoundError):
            client.generate(PROMPT, adapter=digest, max_new_tokens=1)
        assert blob_exists(server, digest)
        tokens += running.result().token_ids[len(tokens) :]
    assert len(tokens) == 1500
    eventually(lambda: not blob_exists(server, digest))
    eventually(lambda: client.server_info().capacity.adapter_device_bytes_used < device_before)
    eventually(lambda: store_bytes(server) < disk_before)


def store_bytes(server: ServerProcess) -> float:
    return server.scrape()["quickchange_store_bytes"]


def blob_exists(server: ServerProcess, digest: str) -> bool:
    hexadecimal = digest.removeprefix("sha256:")
    return any(hexadecimal in str(path) for path in server.store.rglob("*"))


def test_deleted_bytes_stay_while_another_name_has_them(
    server: ServerProcess, client: Client, pushed: Mapping[str, str], adapters: Mapping[str, Path]
) -> None:
    client.adapters.push(adapters["a"], "second")
    assert client.adapters.delete("second@1") == 1
    assert blob_exists(server, pushed["a"])
    assert client.generate(PROMPT, adapter="a", max_new_tokens=1).adapter.digest == pushed["a"]


def test_what_cannot_be_deleted(
    client: Client, pushed: Mapping[str, str], adapters: Mapping[str, Path]
) -> None:
    with pytest.raises(NotFoundError):
        client.adapters.delete("nobody", all_versions=True)
    with pytest.raises(NotFoundError):
        client.adapters.delete("a@9")
    for name in "ab":
        client.adapters.push(adapters[name], "which")
    client.adapters.alias("which", "prod", 1)
    for reference in ("which", "which:prod", client.adapters.get("which").digest):
        with pytest.raises(InvalidArgumentError):
            client.adapters.delete(reference)
    assert client.adapters.delete("which", all_versions=True) == 2


def test_load_and_unload_move_an_adapter(client: Client, pushed: Mapping[str, str]) -> None:
    client.generate(PROMPT, adapter="c", max_new_tokens=1)
    assert client.adapters.unload("c").residency is Residency.DISK
    assert client.adapters.get("c").residency is Residency.DISK
    assert client.adapters.load("c").residency is Residency.DEVICE
    assert client.adapters.get("c").residency is Residency.DEVICE
    with client.stream(PROMPT, adapter="c", max_new_tokens=2000, ignore_eos=True) as running:
        first_tokens(running, 1)
        assert client.adapters.unload("c").residency is Residency.DEVICE  # a request is using it
    with pytest.raises(InvalidArgumentError):
        client.adapters.load("")


def test_a_pinned_adapter_is_told_as_one(
    server: ServerProcess, client: Client, adapters: Mapping[str, Path]
) -> None:
    client.adapters.push(adapters["c"], "stays")
    assert client.adapters.pin("stays").pinned
    client.adapters.load("stays")
    eventually(lambda: any('pinned="true"' in name for name in server.scrape()))
    assert not client.adapters.unpin("stays").pinned
    client.adapters.delete("stays@1")


def test_a_downloaded_adapter_is_the_uploaded_one(
    client: Client, adapters: Mapping[str, Path], pushed: Mapping[str, str], tmp_path: Path
) -> None:
    for name in "abc":
        client.adapters.pull(name, tmp_path / name)
        for file in adapters[name].iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()
        again = client.adapters.push(tmp_path / name, name)
        assert (again.created, again.adapter.digest) == (False, pushed[name])
    with pytest.raises(NotFoundError):
        client.adapters.pull("nobody", tmp_path / "nobody")


def test_lists_are_filtered(client: Client, adapters: Mapping[str, Path]) -> None:
    for name, labels in (("one", {"team": "x"}), ("two", {"team": "x", "tier": "1"}), ("three", {})):
        client.adapters.push(adapters["a"], f"list-{name}", labels=labels)

    def names(**filters: Any) -> set[str]:
        return {a.name for a in client.adapters.list(**filters) if a.name.startswith("list-")}

    assert names() == {"list-one", "list-two", "list-three"}
    assert names(labels={"team": "x"}) == {"list-one", "list-two"}
    assert names(labels={"team": "x", "tier": "1"}) == {"list-two"}
    assert names(name="list-three") == {"list-three"}
    assert names(state="failed") == set()
    for name in ("one", "two", "three"):
        client.adapters.delete(f"list-{name}@1")
