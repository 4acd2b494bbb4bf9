"""A real server's /metrics under load and after errors, beside what is promised."""

import contextlib
import re
import shutil
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quickchange import Client, Delta, QuickchangeError, Started
from tests.e2e.process import ServerProcess, eventually
from tests.server.promised import LORA_INFO, PROMISED, found_in

PROMPT = "measured"
PREFIX = "quickchange_"


def page_of(server: ServerProcess) -> str:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def lora_info(server: ServerProcess) -> tuple[int, set[str], set[str]]:
    """How many fit, what is there, what is awaited."""
    (name,) = (name for name in server.scrape() if name.startswith(f"{PREFIX}lora_requests_info"))
    labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
    running, waiting = (
        set(filter(None, labels[f"{k}_lora_adapters"].split(","))) for k in ("running", "waiting")
    )
    return int(labels["max_lora"]), running, waiting


def refused(client: Client, **request: object) -> None:
    with pytest.raises(QuickchangeError):
        client.generate(PROMPT, **request)  # type: ignore[arg-type]  # wrong on purpose


def overload(client: Client) -> int:
    """Requests that a server for 4 and a queue of 4 refuses."""

    def ask(_: int) -> int:
        with contextlib.suppress(QuickchangeError):
            client.generate(PROMPT, max_new_tokens=300, ignore_eos=True)
            return 0
        return 1

    with ThreadPoolExecutor(24) as pool:
        return sum(pool.map(ask, range(24)))


def test_all_that_is_promised_and_nothing_else_under_load_and_after_errors(
    own_server: Callable[..., ServerProcess], adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    server = own_server(metrics__lora_info_gauge="on")
    broken = shutil.copytree(adapters["a"], tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{}")
    with server.client() as client:
        for name in adapters:
            client.adapters.push(adapters[name], name)
        before = server.scrape()
        assert before[f'{PREFIX}adapter_uploads_total{{result="created"}}'] == 3
        for adapter in ("", *adapters, "a"):
            assert client.generate(PROMPT, adapter=adapter, max_new_tokens=6, ignore_eos=True).token_ids
        refused(client, adapter="nobody")
        refused(client, temperature=-1.0)
        refused(client, max_new_tokens=15000, ignore_eos=True, timeout_s=3)  # queued by then, not over
        with pytest.raises(QuickchangeError):
            client.adapters.push(broken, "broken")
        with client.stream(PROMPT, max_new_tokens=9000, ignore_eos=True) as stream:
            assert isinstance(next(stream), Started)
            assert isinstance(next(stream), Delta)
            busy = server.scrape()
        full = overload(client)
        client.adapters.unload("b")
    eventually(lambda: server.scrape()[f"{PREFIX}requests_running"] == 0)
    assert found_in(page_of(server)) == PROMISED | LORA_INFO

    after = server.scrape()

    def grew(name: str) -> float:
        return after[PREFIX + name] - before.get(PREFIX + name, 0.0)

    assert busy[f"{PREFIX}requests_running"] == 1
    assert 0 < busy[f"{PREFIX}kv_blocks_used_ratio"] <= 1
    assert full > 0
    assert grew('rejected_total{reason="QUEUE_FULL"}') == full
    assert grew('rejected_total{reason="ADAPTER_NOT_FOUND"}') == 1
    assert grew('rejected_total{reason="INVALID_REQUEST"}') == 1
    assert grew('adapter_requests_total{adapter="a"}') == 2
    assert grew('adapter_requests_total{adapter="_base"}') == 1 + 2 + 24 - full
    assert grew('requests_finished_total{code="OK",reason="length"}') == 5 + 24 - full
    late = grew('requests_finished_total{code="DEADLINE_EXCEEDED",reason="failed"}')
    assert late + grew('requests_finished_total{code="CANCELLED",reason="cancelled"}') == 2
    assert grew("generated_tokens_total") >= 5 * 6 + 300 * (24 - full)
    assert grew("request_duration_seconds_count") == 5 + 2 + 24 - full
    assert grew("time_to_first_token_seconds_count") == grew("request_queue_seconds_count")
    assert grew('adapter_load_seconds_count{result="ok",source="disk"}') == 3
    assert sum(grew(name.removeprefix(PREFIX)) for name in after if "validation_failures" in name) == 1
    assert after[f'{PREFIX}adapters_resident{{tier="device"}}'] == 2
    assert after[f"{PREFIX}store_bytes"] == sum(
        file.stat().st_size for path in adapters.values() for file in path.iterdir() if file.suffix != ".md"
    )
    assert after[f"{PREFIX}engine_up"] == 1


def test_the_lora_info_is_true_of_what_is_on_the_device(
    own_server: Callable[..., ServerProcess], adapters: Mapping[str, Path]
) -> None:
    server = own_server(metrics__lora_info_gauge="on")
    with server.client() as client:
        for name in "ab":
            client.adapters.push(adapters[name], name)
        assert lora_info(server) == (4, set(), set()), "nothing was asked for, as many as may run would fit"
        client.generate(PROMPT, adapter="a", max_new_tokens=2)
        client.generate(PROMPT, adapter="a@1", max_new_tokens=2)
        client.adapters.load("b")
        eventually(lambda: lora_info(server)[1:] == ({"a", "a@1", "b"}, set()))
        assert lora_info(server)[0] > 2, "idle or not, it is what is there that is listed"

        client.adapters.push(adapters["c"], "a")
        client.generate(PROMPT, adapter="a", max_new_tokens=2)
        client.adapters.unload("a@1")
        eventually(lambda: lora_info(server)[1] == {"a", "b"})
        client.adapters.unload("a")
        client.adapters.unload("b")
        eventually(lambda: lora_info(server)[1:] == (set(), set()))
        client.adapters.pin("b")
        client.adapters.pin("a@1")  # an older version: "a" means another one
    server.process.terminate()
    assert server.wait() == 0
    server = own_server(server.store, metrics__lora_info_gauge="on")
    assert lora_info(server)[1:] == ({"b"}, set()), "pinned ones are loaded before anyone asks"


def test_an_adapter_that_requests_wait_for_is_named_as_such(
    own_server: Callable[..., ServerProcess], adapters: Mapping[str, Path]
) -> None:
    sizes = {name: (path / "adapter_model.safetensors").stat().st_size for name, path in adapters.items()}
    large = max(sizes.values())
    server = own_server(
        metrics__lora_info_gauge="on", engine__adapter_device_bytes=large, engine__adapter_host_bytes=0
    )
    with server.client() as client:
        for name in adapters:
            client.adapters.push(adapters[name], name)
        first = max(sizes, key=lambda name: sizes[name])
        second = min(sizes, key=lambda name: sizes[name])
        with client.stream(PROMPT, adapter=first, max_new_tokens=9000, ignore_eos=True) as holding:
            assert isinstance(next(holding), Started)
            with client.stream(PROMPT, adapter=second, max_new_tokens=2) as waiting:
                eventually(lambda: lora_info(server) == (1, {first}, {second}))
                holding.close()
                assert isinstance(next(waiting), Started)
        eventually(lambda: lora_info(server)[1:] == ({second}, set()))


def test_without_the_flag_there_is_no_lora_info(server: ServerProcess) -> None:
    """By its name: adapters of other tests may have anything in theirs."""
    assert "quickchange_lora_requests_info" not in page_of(server)
