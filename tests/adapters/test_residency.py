"""Adapters on their way between disk, host and device: real files, real threads, faults where they happen."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.copies import FactorCopies
from adapters.errors import AdapterCorruptError, AdapterNotFoundError, CapacityError
from adapters.factors import AdapterFactors, bytes_of, read_factors
from adapters.layers import AdapterSlots, Routing
from adapters.layout import BaseLayout, ModuleShape
from adapters.residency import AdapterResidency, LoadOutcome
from adapters.spec import parse_spec
from adapters.store import AdapterStore
from adapters.tier import TierBudgets
from adapters.validate import validate_adapter
from adapters.weights import load_pairs
from kernels.lora import LoraFactors
from tests.adapters.builders import make_adapter

RANKS = {"a": 2, "b": 4, "c": 4, "d": 8}


class Library:
    """A store with four adapters."""

    def __init__(self, folder: Path, model: PreTrainedModel, layout: BaseLayout) -> None:
        self.store, self.layout = AdapterStore(folder / "store"), layout
        self.digests: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        for seed, (name, rank) in enumerate(RANKS.items()):
            path = make_adapter(model, folder / name, r=rank, seed=seed)
            facts = validate_adapter(path, layout, max_rank=8)
            staged = self.store.new_staging()
            for file in path.iterdir():
                (staged / file.name).write_bytes(file.read_bytes())
            self.store.publish(name, staged, facts)
            self.digests[name] = facts.digest
            self.sizes[name] = bytes_of(facts, layout, torch.float32)

    def stored(self, name: str) -> AdapterFactors:
        """The factors as the files have them."""
        folder = self.store.path_of(self.digests[name])
        spec = parse_spec((folder / "adapter_config.json").read_bytes())
        pairs = load_pairs(folder / "adapter_model.safetensors", spec, self.layout)
        return read_factors(pairs, spec, torch.float32, page_locked=False)


class SeenSlots(AdapterSlots):
    """Slots of a model without layers, which tells what they hold."""

    def __init__(self) -> None:
        super().__init__(Routing(), Routing(), {})
        self.filled: dict[int, Mapping[str, LoraFactors]] = {}

    def fill(self, slot: int, factors: Mapping[str, LoraFactors]) -> None:
        assert slot not in self.filled
        self.filled[slot] = factors

    def clear(self, slot: int) -> None:
        del self.filled[slot]


class Tiers:
    """Residency over a library, by name, with waiting."""

    def __init__(self, library: Library, **options: Any) -> None:
        self.library = library
        self.slots = SeenSlots()
        self.evicted: list[str] = []
        self.woken = threading.Event()
        sizes = {"device_bytes": 10**6, "host_bytes": 10**6} | {
            name: options.pop(name) for name in ("device_bytes", "host_bytes") if name in options
        }
        self.residency = AdapterResidency(
            library.store,
            library.layout,
            self.slots,
            device=torch.device("cpu"),
            dtype=torch.float32,
            budgets=TierBudgets(**sizes),
            eviction=options.pop("eviction", "lru"),
            wake=self.woken.set,
            on_eviction=self.evicted.append,
        )

    def use(self, name: str) -> tuple[int, list[LoadOutcome]]:
        """Acquires an adapter, however long that takes, and gives it back: its slot, and the loads."""
        outcomes: list[LoadOutcome] = []
        digest = self.library.digests[name]
        while (slot := self.residency.acquire(digest)) is None:
            outcomes += self.collected()
        self.residency.release(digest)
        return slot, outcomes

    def collected(self) -> list[LoadOutcome]:
        """The next outcomes."""
        deadline_s = time.monotonic() + 20
        while not self.residency.has_news:
            assert time.monotonic() < deadline_s
            self.woken.wait(0.01)
        return self.residency.collect()

    def where(self) -> dict[str, str]:
        return {name: self.residency.whereabouts(digest) for name, digest in self.library.digests.items()}

    def applied(self, name: str) -> Tensor:
        """What the layers have in the adapter's slot."""
        return flat(self.slots.filled[self.use(name)[0]])


def flat(factors: Mapping[str, LoraFactors]) -> Tensor:
    return torch.cat([t.flatten() for pair in factors.values() for t in (pair.a_RD, pair.b_RO)])


@pytest.fixture(scope="module")
def library(
    llama: PreTrainedModel, layout: BaseLayout, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Library]:
    library = Library(tmp_path_factory.mktemp("library"), llama, layout)
    yield library
    library.store.close()


@pytest.fixture
def tiers(library: Library) -> Iterator[Callable[..., Tiers]]:
    made: list[Tiers] = []

    def make(**options: Any) -> Tiers:
        made.append(Tiers(library, **options))
        return made[-1]

    yield make
    for each in made:
        each.residency.close()


def test_who_had_to_go_waits_on_the_host_and_comes_back_without_the_disk(
    tiers: Callable[..., Tiers], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tiers(device_bytes=library.sizes["b"])
    assert [outcome.source for outcome in held.use("b")[1]] == ["disk"]
    assert [outcome.source for outcome in held.use("c")[1]] == ["disk"]
    assert held.where() == {"a": "disk", "b": "host", "c": "device", "d": "disk"}
    monkeypatch.setattr(library.store, "path_of", lambda digest: pytest.fail("the disk was asked"))
    assert [outcome.source for outcome in held.use("b")[1]] == ["host"]
    assert held.where() == {"a": "disk", "b": "device", "c": "host", "d": "disk"}
    assert held.evicted == ["device", "device"]


@pytest.mark.parametrize("eviction", ["lru", "cost"])
def test_any_journey_keeps_bits_and_budgets(
    tiers: Callable[..., Tiers], library: Library, eviction: str
) -> None:
    """Loads, hints, pins and deletions at random: what a slot applies is always what the file says."""
    want = {name: flat(library.stored(name).by_module) for name in RANKS}
    held = tiers(
        device_bytes=library.sizes["c"] + library.sizes["d"],
        host_bytes=library.sizes["a"] + library.sizes["d"],
        eviction=eviction,
    )
    residency, choose = held.residency, random.Random(eviction)
    for _ in range(300):
        name = choose.choice(tuple(RANKS))
        digest = library.digests[name]
        match choose.randrange(6):
            case 0:
                residency.demote(digest)
            case 1:
                residency.evict(digest)
            case 2:
                residency.prefetch_to_host(digest)
            case _:
                assert torch.equal(held.applied(name), want[name])
        residency.collect()
        by_tier = {"device": 0, "host": 0}
        for resident in residency.residents():
            by_tier[resident.tier] += resident.size_bytes
        assert by_tier["device"] <= residency.used_bytes <= residency.budgets.device_bytes
        assert by_tier["host"] <= residency.host_used_bytes <= residency.budgets.host_bytes
    for name, digest in library.digests.items():
        while not residency.evict(digest):
            held.collected()
        assert held.where()[name] == "disk"
    assert (residency.used_bytes, residency.host_used_bytes) == (0, 0)
    assert not held.slots.filled


def test_what_is_charged_is_what_the_memory_has(library: Library) -> None:
    for name, size_bytes in library.sizes.items():
        assert library.stored(name).memory.nbytes == size_bytes


def test_padding_is_charged_where_features_do_not_fill_cache_lines(library: Library) -> None:
    facts = library.store.resolve("a").facts
    odd = BaseLayout({name: ModuleShape(5, 7) for name in facts.matched_modules}, None, "")
    even = bytes_of(facts, library.layout, torch.float32)
    assert bytes_of(facts, odd, torch.float32) == even + 2 * len(facts.matched_modules) * 60


def test_without_a_host_tier_whoever_goes_is_on_disk(tiers: Callable[..., Tiers], library: Library) -> None:
    held = tiers(device_bytes=library.sizes["b"], host_bytes=0)
    held.use("b"), held.use("c")
    assert held.where() == {"a": "disk", "b": "disk", "c": "device", "d": "disk"}
    with pytest.raises(CapacityError, match="--adapter-host-bytes") as caught:
        held.residency.prefetch_to_host(library.digests["a"])
    assert caught.value.reason == "NO_HOST_TIER"


def test_pinned_ones_stay_where_they_are(tiers: Callable[..., Tiers], library: Library) -> None:
    held = tiers(device_bytes=library.sizes["d"], host_bytes=library.sizes["b"])
    held.use("b")
    held.residency.demote(library.digests["b"])
    held.residency.pin(library.digests["b"], True)  # on the host
    held.use("a")
    held.residency.pin(library.digests["a"], True)  # on the device
    for _ in range(2):
        held.use("c")
        held.residency.demote(library.digests["c"])
    assert held.where() == {"a": "device", "b": "host", "c": "disk", "d": "disk"}
    with pytest.raises(CapacityError, match="pinned"):
        held.residency.prefetch_to_host(library.digests["c"])
    held.residency.prefetch(library.digests["d"])
    (refused,) = held.collected()
    assert isinstance(refused.error, CapacityError)
    assert refused.error.reason == "ADAPTERS_PINNED"


def test_a_hint_brings_it_to_the_host_and_a_request_from_there(
    tiers: Callable[..., Tiers], library: Library
) -> None:
    held = tiers()
    held.residency.prefetch_to_host(library.digests["a"])
    assert held.residency.is_loading(library.digests["a"])
    (outcome,) = held.collected()
    assert (outcome.tier, outcome.source, held.where()["a"]) == ("host", "disk", "host")
    assert [outcome.source for outcome in held.use("a")[1]] == ["host"]
    held.residency.prefetch_to_host(library.digests["a"])  # it is in a better place already
    assert held.where()["a"] == "device"


def test_one_in_use_is_neither_demoted_nor_evicted(tiers: Callable[..., Tiers], library: Library) -> None:
    held, digest = tiers(), library.digests["a"]
    held.use("a")
    assert held.residency.acquire(digest) is not None
    held.residency.demote(digest)
    assert not held.residency.evict(digest)
    assert held.where()["a"] == "device"
    held.residency.release(digest)
    assert held.residency.evict(digest)


def test_no_memory_on_the_host_leaves_it_on_disk(
    tiers: Callable[..., Tiers], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FactorCopies, factors: AdapterFactors) -> AdapterFactors:
        raise MemoryError("no page-locked memory")

    held = tiers(device_bytes=library.sizes["b"])
    held.use("b")
    monkeypatch.setattr(FactorCopies, "to_host", full)
    held.use("c")
    while held.where()["b"] == "host":
        held.collected()
    assert held.residency.host_used_bytes == 0
    assert [outcome.source for outcome in held.use("b")[1]] == ["disk"]


def test_one_that_never_arrived_on_the_host_is_read_from_disk(
    tiers: Callable[..., Tiers], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for again while its copy was under way, which then failed."""
    failing, asked_again = threading.Event(), threading.Event()

    def full(self: FactorCopies, factors: AdapterFactors) -> AdapterFactors:
        failing.set()
        assert asked_again.wait(20)
        raise MemoryError("no page-locked memory")

    held, digest = tiers(), library.digests["b"]
    held.use("b")
    monkeypatch.setattr(FactorCopies, "to_host", full)
    held.residency.demote(digest)
    assert failing.wait(20)
    assert not held.residency.evict(digest)  # it is moving
    held.residency.prefetch(digest)
    asked_again.set()
    (outcome,) = held.collected()
    assert outcome.error is None
    assert held.where()["b"] == "device"
    assert held.residency.host_used_bytes == 0


def test_no_memory_on_the_device_leaves_it_on_the_host(
    tiers: Callable[..., Tiers], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FactorCopies, factors: AdapterFactors) -> AdapterFactors:
        raise torch.OutOfMemoryError("CUDA out of memory")

    held, digest = tiers(), library.digests["b"]
    held.use("b")
    held.residency.demote(digest)
    with monkeypatch.context() as broken:
        broken.setattr(FactorCopies, "to_device", full)
        held.residency.prefetch(digest)
        (outcome,) = held.collected()
    assert isinstance(outcome.error, CapacityError)
    assert (held.where()["b"], held.residency.used_bytes) == ("host", 0)
    assert [outcome.error for outcome in held.use("b")[1]] == [None]


def test_what_cannot_be_read_is_told(
    tiers: Callable[..., Tiers], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, errors = tiers(), []
    monkeypatch.setattr(library.store, "mark_failed", lambda digest, error: None)
    for problem in (AdapterCorruptError("bit rot"), FileNotFoundError(), OSError(5, "I/O"), MemoryError()):

        def verify(digest: str, problem: Exception = problem) -> None:
            raise problem

        monkeypatch.setattr(library.store, "verify", verify)
        held.residency.prefetch(library.digests["a"])
        (outcome,) = held.collected()
        errors.append(type(outcome.error))
    assert errors == [AdapterCorruptError, AdapterNotFoundError, CapacityError, CapacityError]
    assert held.residency.used_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_journey_to_a_gpu_and_back_keeps_every_bit(library: Library) -> None:
    copies, stored = FactorCopies(torch.device("cuda")), library.stored("d")
    on_device = copies.to_device(stored)
    back = copies.to_host(on_device)
    assert on_device.memory.is_cuda
    assert back.memory.is_pinned()
    assert torch.equal(back.memory, stored.memory)
    for module, pair in stored.by_module.items():
        assert torch.equal(back.by_module[module].a_RD, pair.a_RD)
        assert torch.equal(on_device.by_module[module].b_RO.cpu(), pair.b_RO)
