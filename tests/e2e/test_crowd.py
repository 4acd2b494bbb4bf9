"""Ten thousand adapters in the catalogue: the server starts, lists, scrapes and answers as with ten."""

import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.store import AdapterStore
from adapters.validate import validate_adapter
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc
from tests.adapters.builders import layout_of
from tests.adapters.crowd import crowd
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, running

COUNT = 10_000
SERIES = 5
PROMPT = "who of you"

MakeStore = Callable[[Path, int], Path]


@pytest.fixture(scope="module")
def make_store(base: Path, adapters: Mapping[str, Path]) -> MakeStore:
    """Makes a store of one real adapter and so many copies of it."""
    layout = layout_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))

    def make(root: Path, count: int) -> Path:
        with AdapterStore(root) as store:
            staged = store.new_staging()
            for file in adapters["a"].iterdir():
                (staged / file.name).write_bytes(file.read_bytes())
            store.publish("first", staged, validate_adapter(staged, layout, max_rank=64))
        crowd(root, count, names=count)
        return root

    return make


@pytest.fixture(scope="module")
def many(make_store: MakeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("crowd") / "store", COUNT)


@pytest.fixture(scope="module")
def crowded(base: Path, many: Path) -> Iterator[ServerProcess]:
    settings = SMALL | {"metrics.adapter_series_cap": SERIES}
    with running(ServerProcess(base, many, settings)) as server:
        yield server


def test_it_opens_quickly(many: Path) -> None:
    began_s = time.perf_counter()
    AdapterStore(many).close()
    assert time.perf_counter() - began_s < 3


def test_it_is_listed_in_pages(crowded: ServerProcess) -> None:
    before = crowded.memory_kib
    with crowded.client() as client:
        names = [adapter.reference for adapter in client.adapters.list()]
        assert names == [*(f"crowd-{index:05}@1" for index in range(COUNT)), "first@1"]
        assert len(client.models()) == COUNT + 2
        stub = adapters_pb2_grpc.AdapterServiceStub(client._calls.channel)
        assert len(stub.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters) == 100
        page = stub.ListAdapters(adapters_pb2.ListAdaptersRequest(page_size=1000))
        assert len(page.adapters) == 1000
        with client.adapters.watch(send_initial=True) as events:
            assert [next(events).adapter.reference for _ in names] == names
    print(f"memory_kib={crowded.memory_kib} grew_kib={crowded.memory_kib - before}")
    assert crowded.memory_kib - before < 100_000


def test_its_scrape_is_quick_and_its_series_are_capped(crowded: ServerProcess) -> None:
    with crowded.client() as client:
        for index in range(0, COUNT, COUNT // (3 * SERIES)):
            client.generate(PROMPT, adapter=f"crowd-{index:05}", max_new_tokens=1)
    seconds = []
    for _ in range(5):
        began_s = time.perf_counter()
        with urllib.request.urlopen(f"http://{crowded.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        seconds.append(time.perf_counter() - began_s)
    print(f"scrape_s={min(seconds):.4f}")
    assert min(seconds) < 0.1
    # Past the cap adapters share one series, and the base has one.
    for family in ("quickchange_adapter_requests_total{", "quickchange_adapter_loaded{"):
        assert 1 < sum(line.startswith(family) for line in text.splitlines()) <= SERIES + 2
    assert 'adapter="_other"' in text


@pytest.mark.slow
def test_it_starts_as_soon_as_with_ten(base: Path, many: Path, make_store: MakeStore, tmp_path: Path) -> None:
    few = make_store(tmp_path / "few", 10)

    def start_s(root: Path) -> float:
        began_s = time.perf_counter()
        with running(ServerProcess(base, root, SMALL)):
            return time.perf_counter() - began_s

    start_s(few)  # whatever is read for the first time is read now
    few_s, many_s = min(start_s(few) for _ in range(2)), min(start_s(many) for _ in range(2))
    print(f"few_s={few_s:.2f} many_s={many_s:.2f}")
    assert many_s < few_s + 3
