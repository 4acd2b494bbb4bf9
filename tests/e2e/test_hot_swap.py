"""Adapters are replaced, moved, deleted and evicted while streams run: nobody ever gets a wrong token."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters.layout import BaseLayout
from adapters.store import AdapterStore
from adapters.validate import validate_adapter
from quickchange import (
    Client,
    Completion,
    Delta,
    InvalidArgumentError,
    NotFoundError,
    Residency,
    ResourceExhaustedError,
    Started,
)
from tests.adapters.builders import layout_of, make_adapter
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, eventually, running
from tests.e2e.swapping import ANSWER_TOKENS, PROMPTS, Expected, Streams, Swapper

Digests = Sequence[str]

RANKS = (2, 4, 8, 2, 4, 8, 4)
LARGEST_BYTES = 8 * ((64 + 64) + (64 + 32) + (128 + 64)) * 2 * 4
"""Of rank 8 on q, v and down in two layers, in float32."""

MEMORY_GROWTH_KIB = 24 * 1024


@pytest.fixture(scope="module")
def model(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def layout(model: PreTrainedModel) -> BaseLayout:
    return layout_of(model)


@pytest.fixture(scope="module")
def folders(
    model: PreTrainedModel, layout: BaseLayout, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """Adapters unlike each other, by digest."""
    root, found = tmp_path_factory.mktemp("swapped"), {}
    for seed, rank in enumerate(RANKS):
        folder = make_adapter(model, root / str(seed), r=rank, seed=100 + seed)
        found[validate_adapter(folder, layout, max_rank=8).digest] = folder
    return found


@pytest.fixture(scope="module")
def expected(base: Path, folders: Mapping[str, Path], tokenizer: Any) -> Expected:
    expected = Expected.compute(base, folders, tokenizer)
    assert len(set(expected.tokens.values())) == len(expected.tokens), "every answer is unlike the others"
    return expected


@pytest.mark.parametrize(
    ("swaps", "eviction"), [(100, "cost"), pytest.param(600, "lru", marks=pytest.mark.slow)]
)
def test_swaps_under_load_change_no_token_and_fail_no_request(
    own_server: Callable[..., ServerProcess],
    folders: Mapping[str, Path],
    expected: Expected,
    swaps: int,
    eviction: str,
) -> None:
    server = own_server(
        engine__adapter_device_bytes=LARGEST_BYTES,
        engine__adapter_host_bytes=LARGEST_BYTES,
        engine__adapter_eviction=eviction,
    )
    with server.client() as client:
        steady = client.adapters.push(next(iter(folders.values())), "steady").adapter
        swapper = Swapper(client, folders, expected)
        swapper.begin()
        with Streams(server, expected, ["live", "live:prod", "doomed", "steady", ""]) as streams:
            swapper.swap_until(swaps // 3)
            memory_kib = server.memory_kib
            swapper.swap_until(swaps)
        grown_kib = server.memory_kib - memory_kib
        assert streams.problems == []
        assert set(streams.missing) <= {"doomed"}
        assert min(streams.answers[name] for name in ("live", "live:prod", "doomed", "steady", "")) > 0
        told = {(name, version): digest for name, version, digest in streams.seen if name}
        assert told.items() <= (swapper.published | {("steady", 1): steady.digest}).items()
        assert grown_kib < MEMORY_GROWTH_KIB
        metrics = server.scrape()
        print(
            f"{swapper.swaps} swaps, {streams.answers.total()} streams, {streams.missing.total()} not found, "
            f"memory +{grown_kib} KiB, "
            + ", ".join(
                f"{name.removeprefix('quickchange_')} {metrics.get(name, 0):g}"
                for name in (
                    'quickchange_adapter_evictions_total{tier="device"}',
                    'quickchange_adapter_evictions_total{tier="host"}',
                    'quickchange_adapter_load_seconds_count{result="ok",source="disk"}',
                    'quickchange_adapter_load_seconds_count{result="ok",source="host"}',
                    "quickchange_prefix_cache_hits_total",
                )
            )
        )
        assert metrics['quickchange_adapter_evictions_total{tier="device"}'] > 0
        assert metrics['quickchange_adapter_load_seconds_count{result="ok",source="host"}'] > 0
        assert metrics["quickchange_prefix_cache_hits_total"] > 0

        swapper.delete_all()
        client.adapters.delete("steady", all_versions=True)
        eventually(lambda: nothing_left(server))


@pytest.fixture(scope="module")
def tiered(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with room for one large adapter on the device, and for two on the host."""
    room = {
        "engine.adapter_device_bytes": LARGEST_BYTES,
        "engine.adapter_host_bytes": 2 * LARGEST_BYTES,
    }
    with running(ServerProcess(base, tmp_path_factory.mktemp("tiered"), SMALL | room)) as process:
        yield process


@pytest.fixture
def client(tiered: ServerProcess) -> Iterator[Client]:
    with tiered.client() as connected:
        yield connected
        for name in {adapter.name for adapter in connected.adapters.list()}:
            connected.adapters.delete(name, all_versions=True)
        eventually(lambda: nothing_left(tiered))


@pytest.fixture(scope="module")
def digests(folders: Mapping[str, Path]) -> Digests:
    """In the order of RANKS."""
    return list(folders)


def ask(client: Client, adapter: str, prompt: str = PROMPTS[0], **options: Any) -> Completion:
    return client.generate(prompt, adapter=adapter, max_new_tokens=ANSWER_TOKENS, ignore_eos=True, **options)


def test_keys_and_values_of_an_old_version_are_never_used_for_a_new_one(
    client: Client, folders: Mapping[str, Path], digests: Digests, expected: Expected
) -> None:
    """What a fresh process would answer, with nothing from a cache where nothing may be."""
    for digest in digests[:2]:
        client.adapters.push(folders[digest], "swapped")
        first, second = ask(client, "swapped"), ask(client, "swapped")
        assert (first.adapter.digest, first.usage.cached_tokens) == (digest, 0)
        assert second.usage.cached_tokens > 0
        assert first.token_ids == second.token_ids == expected.tokens[digest, PROMPTS[0]]
    old = ask(client, "swapped@1")
    assert (old.usage.cached_tokens, old.token_ids) == (
        second.usage.cached_tokens, expected.tokens[digests[0], PROMPTS[0]],
    )  # fmt: skip


def test_content_that_was_deleted_and_comes_back_finds_nothing_of_its_own(
    client: Client, tiered: ServerProcess, folders: Mapping[str, Path], digests: Digests, expected: Expected
) -> None:
    for _ in range(2):
        client.adapters.push(folders[digests[0]], "again")
        answer = ask(client, "again")
        assert answer.usage.cached_tokens == 0
        assert answer.token_ids == expected.tokens[digests[0], PROMPTS[0]]
        client.adapters.delete("again", all_versions=True)
        eventually(lambda: nothing_left(tiered))


def test_a_deleted_adapter_leaves_device_host_and_disk(
    client: Client, tiered: ServerProcess, folders: Mapping[str, Path], digests: Digests, expected: Expected
) -> None:
    """One runs, one waits on the host: new requests find neither, the running one ends right."""
    client.adapters.push(folders[digests[0]], "runs")
    client.adapters.push(folders[digests[1]], "waits")
    assert client.adapters.load("waits", "host").residency is Residency.HOST
    with client.stream(PROMPTS[0], adapter="runs", max_new_tokens=3000, ignore_eos=True) as stream:
        assert isinstance(next(stream), Started)
        assert bytes_in(tiered, "device") > 0 < bytes_in(tiered, "host")
        for name in ("runs", "waits"):
            client.adapters.delete(name, all_versions=True)
            with pytest.raises(NotFoundError):
                ask(client, name)
        eventually(lambda: bytes_in(tiered, "host") == 0)
        assert bytes_in(tiered, "device") > 0
        tokens = [token for event in stream if isinstance(event, Delta) for token in event.token_ids]
    assert len(tokens) == 3000
    assert tuple(tokens[:ANSWER_TOKENS]) == expected.tokens[digests[0], PROMPTS[0]]
    eventually(lambda: nothing_left(tiered))


def test_two_adapters_and_the_base_in_turn_with_room_for_one(
    client: Client, tiered: ServerProcess, folders: Mapping[str, Path], digests: Digests, expected: Expected
) -> None:
    """The two of rank 8 do not fit beside each other: every change of turns moves one out and one in."""
    names = {"": "", "a": digests[2], "b": digests[5]}
    for name in "ab":
        client.adapters.push(folders[names[name]], name)
    before = evictions(tiered)
    asks = [(name, prompt) for _ in range(4) for prompt in PROMPTS for name in ("a", "b", "")]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda each: ask(client, *each), asks))
    for (name, prompt), answer in zip(asks, answers, strict=True):
        assert answer.token_ids == expected.tokens[names[name], prompt], (name, prompt)
    assert evictions(tiered) > before + 4


def test_salts_and_adapters_never_meet_in_the_cache(
    client: Client, folders: Mapping[str, Path], digests: Digests
) -> None:
    """A salt may be an adapter's name or digest, with or without that adapter: only its like is a hit."""
    for name, digest in zip("ab", digests, strict=False):
        client.adapters.push(folders[digest], name)
    answers = defaultdict(set)
    for salt in ("", "a", "b", digests[0], "another tenant"):
        for name in ("", "a", "b"):
            first, second = (ask(client, name, "secret, " + PROMPTS[0], cache_salt=salt) for _ in range(2))
            assert (first.usage.cached_tokens, second.usage.cached_tokens > 0) == (0, True), (salt, name)
            answers[name] |= {first.token_ids, second.token_ids}
    assert [len(tokens) for tokens in answers.values()] == [1, 1, 1]
    assert len(set.union(*answers.values())) == 3


def test_hints_move_an_adapter_between_all_tiers(
    client: Client, tiered: ServerProcess, folders: Mapping[str, Path], digests: Digests, expected: Expected
) -> None:
    client.adapters.push(folders[digests[0]], "moved")

    def where() -> Residency:
        (listed,) = client.adapters.list()
        assert listed.residency is client.adapters.get("moved").residency
        return listed.residency

    assert where() is Residency.DISK
    for move, tier, then in (
        (client.adapters.load, "host", Residency.HOST),
        (client.adapters.load, "device", Residency.DEVICE),
        (client.adapters.load, "host", Residency.DEVICE),  # that is better
        (client.adapters.unload, "host", Residency.HOST),
        (client.adapters.unload, "disk", Residency.DISK),
        (client.adapters.load, "device", Residency.DEVICE),
        (client.adapters.unload, "host", Residency.HOST),
    ):
        assert move("moved", tier).residency is then
        assert where() is then
        capacity = client.server_info().capacity
        used = {"host": capacity.adapter_host_bytes_used, "device": capacity.adapter_device_bytes_used}
        for each in ("host", "device"):
            assert (bytes_in(tiered, each) > 0) == (used[each] > 0) == (then == each)
    assert 'quickchange_adapter_loaded{adapter="moved",pinned="false",tier="host"}' in tiered.scrape()
    from_host = loads(tiered, "host")
    assert ask(client, "moved").token_ids == expected.tokens[digests[0], PROMPTS[0]]
    assert (where(), loads(tiered, "host")) == (Residency.DEVICE, from_host + 1)


def test_a_hint_that_cannot_be_followed_says_why(
    client: Client, server: ServerProcess, folders: Mapping[str, Path], digests: Digests
) -> None:
    with server.client() as without_host_tier:
        without_host_tier.adapters.push(folders[digests[0]], "hinted")
        with pytest.raises(ResourceExhaustedError, match="--adapter-host-bytes") as caught:
            without_host_tier.adapters.load("hinted", "host")
        assert caught.value.reason == "NO_HOST_TIER"
        without_host_tier.adapters.load("hinted")
        assert without_host_tier.adapters.unload("hinted", "host").residency is Residency.DISK
        without_host_tier.adapters.delete("hinted@1")
    with pytest.raises(InvalidArgumentError, match="DEVICE or HOST"):
        client.adapters.load("hinted", "disk")
    with pytest.raises(InvalidArgumentError, match="HOST or DISK"):
        client.adapters.unload("hinted", "device")


def test_pinned_adapters_are_there_when_the_server_is_ready(
    own_server: Callable[..., ServerProcess],
    layout: BaseLayout,
    folders: Mapping[str, Path],
    digests: Digests,
    tmp_path: Path,
) -> None:
    """And those that do not fit are named in the log."""
    with AdapterStore(tmp_path / "store") as store:
        for name, digest in (("first", digests[2]), ("second", digests[5]), ("third", digests[0])):
            staged = store.new_staging()
            shutil.copytree(folders[digest], staged, dirs_exist_ok=True)
            store.publish(name, staged, validate_adapter(staged, layout, max_rank=8))
            store.update(name, 1, pinned=name != "third")
    server = own_server(engine__adapter_device_bytes=LARGEST_BYTES)
    assert 'quickchange_adapter_loaded{adapter="first",pinned="true",tier="device"}' in server.scrape()
    with server.client() as client:
        where = {adapter.name: adapter.residency for adapter in client.adapters.list()}
    assert where == {"first": Residency.DEVICE, "second": Residency.DISK, "third": Residency.DISK}
    assert "pinned adapter not loaded adapter=second digest=" in server.log


def bytes_in(server: ServerProcess, tier: str) -> float:
    return server.scrape()[f'quickchange_adapter_bytes{{tier="{tier}"}}']


def evictions(server: ServerProcess) -> float:
    return server.scrape().get('quickchange_adapter_evictions_total{tier="device"}', 0.0)


def loads(server: ServerProcess, source: str) -> float:
    name = f'quickchange_adapter_load_seconds_count{{result="ok",source="{source}"}}'
    return server.scrape().get(name, 0.0)


def nothing_left(server: ServerProcess) -> bool:
    """No byte of any adapter on device, host or disk."""
    metrics = server.scrape()
    in_memory = sum(value for name, value in metrics.items() if "quickchange_adapter_bytes" in name)
    files = [path for path in server.store.rglob("*") if path.name == "adapter_model.safetensors"]
    return not in_memory and not metrics["quickchange_store_bytes"] and not files
