"""Adapters that are needed soon come nearer, and never at the cost of what is needed sooner."""

from collections.abc import Callable, Iterator

import pytest
from transformers import PreTrainedModel

from adapters.layout import BaseLayout
from tests.adapters.test_residency import Library, Tiers


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

    def make(**sizes: int) -> Tiers:
        made.append(Tiers(library, **sizes))
        return made[-1]

    yield make
    for each in made:
        each.residency.close()


def prepare(held: Tiers, *names: str) -> None:
    """Until nothing is on its way any more."""
    digests = [held.library.digests[name] for name in names]
    held.residency.prepare(digests)
    while any(map(held.residency.is_loading, digests)):
        assert all(outcome.error is None for outcome in held.collected())
    held.residency.collect()


def test_what_is_needed_soon_takes_the_room_of_what_is_not(
    tiers: Callable[..., Tiers], library: Library
) -> None:
    held = tiers(device_bytes=library.sizes["b"] + library.sizes["c"], host_bytes=0)
    held.use("a"), held.use("b")
    prepare(held, "b", "c")
    assert held.where() == {"a": "disk", "b": "device", "c": "device", "d": "disk"}
    assert held.evicted == ["device"]


def test_what_is_needed_sooner_or_in_use_stays(tiers: Callable[..., Tiers], library: Library) -> None:
    held = tiers(device_bytes=library.sizes["b"] + library.sizes["c"], host_bytes=0)
    assert held.use("b")[1][0].error is None
    assert held.residency.acquire(library.digests["b"]) is not None
    held.use("c")
    prepare(held, "c", "d", "a")
    assert held.where() == {"a": "disk", "b": "device", "c": "device", "d": "disk"}
    assert held.evicted == []
    prepare(held, "a")  # now nobody needs c sooner
    assert held.where() == {"a": "device", "b": "device", "c": "disk", "d": "disk"}
    held.residency.release(library.digests["b"])


def test_where_the_device_is_full_it_comes_to_the_host(tiers: Callable[..., Tiers], library: Library) -> None:
    held = tiers(device_bytes=library.sizes["d"], host_bytes=library.sizes["a"] + library.sizes["b"])
    held.use("d")
    assert held.residency.acquire(library.digests["d"]) is not None
    prepare(held, "b", "a", "c")
    assert held.where() == {"a": "host", "b": "host", "c": "disk", "d": "device"}
    prepare(held, "b", "c")  # a is not needed any more, and b sooner than c; there is room for one of them
    assert held.where()["b"] == "host"
    held.residency.release(library.digests["d"])


def test_who_leaves_the_device_drives_nobody_from_the_host_who_is_needed_sooner(
    tiers: Callable[..., Tiers], library: Library
) -> None:
    held = tiers(device_bytes=library.sizes["b"], host_bytes=library.sizes["b"])
    held.use("b")
    held.residency.demote(library.digests["b"])
    while held.residency.has_news:
        held.residency.collect()
    held.use("c")
    assert held.residency.acquire(library.digests["c"]) is not None
    prepare(held, "b")
    assert (held.where()["b"], held.where()["c"]) == ("host", "device")
    held.residency.release(library.digests["c"])
