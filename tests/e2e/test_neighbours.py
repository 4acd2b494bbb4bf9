"""Two servers on one store: what one does the other takes up, and neither takes anything from the other."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from quickchange import AdapterState, Client, FailedPreconditionError, NotFoundError, Residency
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, eventually, running
from tests.e2e.test_lifecycle import PROMPT, blob_exists, first_tokens, greedy
from tests.e2e.test_watch import until
from tests.parity.oracle import Oracle


@pytest.fixture(scope="module")
def neighbour(server: ServerProcess, base: Path) -> Iterator[ServerProcess]:
    """A second server on the store of the shared one."""
    with running(ServerProcess(base, server.store, SMALL)) as process:
        yield process


@pytest.fixture
def other(neighbour: ServerProcess) -> Iterator[Client]:
    with neighbour.client() as connected:
        yield connected


@pytest.fixture
def own_content(adapters: Mapping[str, Path], tmp_path: Path) -> Path:
    """An adapter that no other name has."""
    folder = Path(shutil.copytree(adapters["a"], tmp_path / "own"))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 6'))
    return folder


def test_both_serve_what_either_publishes(
    client: Client, other: Client, adapters: Mapping[str, Path], oracle: Oracle, tokenizer: Any
) -> None:
    assert client.adapters.push(adapters["a"], "both").adapter.version == 1
    assert other.adapters.push(adapters["b"], "both").adapter.version == 2
    client.adapters.alias("both", "prod", 1)
    for each in (client, other):
        assert each.generate(PROMPT, adapter="both", max_new_tokens=8).token_ids == greedy(
            oracle, tokenizer, "b", 8
        )
        assert each.generate(PROMPT, adapter="both:prod", max_new_tokens=8).token_ids == greedy(
            oracle, tokenizer, "a", 8
        )
    client.adapters.delete("both", all_versions=True)
    with pytest.raises(NotFoundError):
        other.generate(PROMPT, adapter="both", max_new_tokens=1)


def test_a_watch_tells_what_the_other_server_does(
    client: Client, other: Client, adapters: Mapping[str, Path]
) -> None:
    with client.adapters.watch() as events:
        other.adapters.push(adapters["a"], "told")
        until(events, lambda e: e.adapter.reference == "told@1")
        other.adapters.alias("told", "prod", 1)
        until(events, lambda e: e.adapter.name == "told" and e.adapter.aliases == ("prod",))
        other.adapters.delete("told@1")
        until(events, lambda e: e.adapter.name == "told" and e.deleted)


def test_a_pin_holds_in_both(
    server: ServerProcess, client: Client, other: Client, adapters: Mapping[str, Path]
) -> None:
    client.adapters.push(adapters["c"], "held")
    client.adapters.load("held")
    other.adapters.pin("held")
    loaded = 'quickchange_adapter_loaded{adapter="held",pinned="%s",tier="device"}'
    eventually(lambda: loaded % "true" in server.scrape())
    other.adapters.unpin("held")
    eventually(lambda: loaded % "false" in server.scrape())
    other.adapters.delete("held@1")


def test_a_deletion_elsewhere_lets_running_requests_finish_and_then_frees_every_tier(
    server: ServerProcess, client: Client, other: Client, own_content: Path
) -> None:
    digest = client.adapters.push(own_content, "shared").adapter.digest
    with client.stream(PROMPT, adapter="shared", max_new_tokens=1500, ignore_eos=True) as running_here:
        tokens = first_tokens(running_here, 4)
        device_before = client.server_info().capacity.adapter_device_bytes_used
        assert other.adapters.delete("shared@1") == 1
        for each in (client, other):
            with pytest.raises(NotFoundError):
                each.generate(PROMPT, adapter="shared", max_new_tokens=1)
        assert blob_exists(server, digest)
        tokens += running_here.result().token_ids[len(tokens) :]
    assert len(tokens) == 1500
    eventually(lambda: not blob_exists(server, digest))
    eventually(lambda: client.server_info().capacity.adapter_device_bytes_used < device_before)


def test_what_is_idle_in_memory_leaves_it_when_another_server_deletes_it(
    client: Client, other: Client, own_content: Path
) -> None:
    client.adapters.push(own_content, "idle")
    assert client.adapters.load("idle").residency is Residency.DEVICE
    before = client.server_info().capacity.adapter_device_bytes_used
    other.adapters.delete("idle@1")
    eventually(lambda: client.server_info().capacity.adapter_device_bytes_used < before)


def test_damage_that_one_server_finds_takes_nothing_from_the_streams_of_the_other(
    server: ServerProcess, client: Client, other: Client, own_content: Path
) -> None:
    digest = client.adapters.push(own_content, "rotten").adapter.digest
    blob = server.store / "blobs/sha256" / digest.removeprefix("sha256:")
    with other.stream(PROMPT, adapter="rotten", max_new_tokens=16000, ignore_eos=True) as stream:
        first_tokens(stream, 4)
        flip_last_bit(blob / "adapter_model.safetensors")
        with pytest.raises(FailedPreconditionError) as found_out:
            client.generate(PROMPT, adapter=digest, max_new_tokens=1)
        assert found_out.value.metadata == {"cause": "CHECKSUM_MISMATCH"}
        assert client.adapters.get("rotten").state is AdapterState.FAILED
        first_tokens(stream, 4)
        assert blob.exists()
    eventually(lambda: not blob.exists())
    eventually(lambda: "were moved to quarantine/" in other.adapters.get("rotten").error)
    assert client.adapters.push(own_content, "rotten").adapter.state is AdapterState.READY
    assert client.generate(PROMPT, adapter="rotten", max_new_tokens=1).token_ids
    client.adapters.delete("rotten@1")


def flip_last_bit(path: Path) -> None:
    path.chmod(0o600)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


@pytest.mark.slow
def test_a_killed_server_keeps_nothing_from_being_removed(
    server: ServerProcess, client: Client, base: Path, own_content: Path
) -> None:
    digest = client.adapters.push(own_content, "orphaned").adapter.digest
    with running(ServerProcess(base, server.store, SMALL)) as doomed, doomed.client() as there:
        stream = there.stream(PROMPT, adapter="orphaned", max_new_tokens=16000, ignore_eos=True)
        first_tokens(stream, 4)
        client.adapters.delete("orphaned@1")
        assert blob_exists(server, digest)
        doomed.process.kill()
    eventually(lambda: not blob_exists(server, digest))


def test_collecting_deletes_by_policy_and_tells_why(
    server: ServerProcess, client: Client, other: Client, adapters: Mapping[str, Path], own_content: Path
) -> None:
    for index, folder in enumerate((own_content, adapters["a"], adapters["b"], adapters["c"])):
        client.adapters.push(folder, "old", labels={"keep": "yes"} if index == 1 else None)
    digest = client.adapters.get("old@1").digest
    for name in ("a", "b", "c"):
        client.adapters.push(adapters[name], f"pinned-{name}", labels={"keep": "yes"})  # their bytes stay
    with client.stream(PROMPT, adapter="old@1", max_new_tokens=1500, ignore_eos=True) as stream:
        first_tokens(stream, 4)
        young = other.adapters.collect_garbage(keep_versions=1, min_age_s=3600, dry_run=True)
        assert young.versions == ()
        would = other.adapters.collect_garbage(keep_versions=1, min_age_s=0, dry_run=True)
        doomed = {version.reference: version for version in would.versions if version.name == "old"}
        assert set(doomed) == {"old@1", "old@3"}
        size = client.adapters.get("old@1").size_bytes
        assert (doomed["old@1"].freed_bytes, doomed["old@3"].freed_bytes) == (size, 0)
        assert "newer" in doomed["old@1"].reason
        assert {a.version for a in client.adapters.list(name="old")} == {1, 2, 3, 4}

        done = other.adapters.collect_garbage(keep_versions=1, min_age_s=0)
        assert {v.reference for v in done.versions} == {v.reference for v in would.versions}
        assert {a.version for a in client.adapters.list(name="old")} == {2, 4}
        assert blob_exists(server, digest)
        assert len(stream.result().token_ids) == 1500
    eventually(lambda: not blob_exists(server, digest))
    for name in ("old", "pinned-a", "pinned-b", "pinned-c"):
        client.adapters.delete(name, all_versions=True)


def test_a_server_collects_by_itself_if_told(
    own_server: Callable[..., ServerProcess], adapters: Mapping[str, Path]
) -> None:
    server = own_server(store__gc_interval_s=1, store__gc_keep_versions=1, store__gc_min_age_s=0)
    with server.client() as client, client.adapters.watch() as events:
        for name in "abc":
            client.adapters.push(adapters[name], "sql")
            client.adapters.alias("sql", "newest", {"a": 1, "b": 2, "c": 3}[name])
        gone: set[str] = set()
        while gone != {"sql@1", "sql@2"}:
            event = next(events)
            if event.deleted:
                gone.add(event.adapter.reference)
        assert [adapter.reference for adapter in client.adapters.list()] == ["sql@3"]
    eventually(lambda: len(list((server.store / "blobs/sha256").iterdir())) == 1)
