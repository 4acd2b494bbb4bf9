"""The Prometheus surface: exactly the promised names, capped labels, nothing stale."""

import math
import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.lora_info import LoraInfo
from server.metrics import Metrics, MetricsEndpoint, ResidentAdapter
from tests.server.promised import LORA_INFO, PROMISED, found_in


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(adapter_series_cap=2)


@pytest.fixture
def endpoint(metrics: Metrics) -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint(metrics, "127.0.0.1", 0)
    yield endpoint
    endpoint.close()


def page_of(endpoint: MetricsEndpoint) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics") as answer:
        return str(answer.read().decode())


def scrape(endpoint: MetricsEndpoint) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(page_of(endpoint)):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def use_everything(metrics: Metrics) -> None:
    metrics.observe_queue(0.1)
    metrics.observe_first_token(0.2)
    metrics.observe_inter_token(0.01)
    metrics.observe_finished("stop", "OK", 1.5, 7, 5, "sql")
    metrics.count_rejected("QUEUE_FULL")
    metrics.observe_step("mixed", 0.02, 3, 2)
    metrics.count_prefix_cache(64, 48)
    metrics.count_preemptions(2), metrics.count_preemptions(3)
    metrics.set_engine_gauges(running=1, waiting=2, kv_used_ratio=0.5)
    metrics.set_engine_up(True)
    metrics.describe_build(
        version="1", base_model="m", quantization="nf4", device="cpu", base_model_bytes=1000
    )
    metrics.observe_adapter_load("disk", "ok", 0.3)
    metrics.count_eviction("device")
    metrics.count_upload("created", 512)
    metrics.count_validation_failure("INVALID_ADAPTER")
    metrics.residents_from(lambda: [ResidentAdapter("sql", "device", True, 64)])
    metrics.store_from(lambda: 4096, lambda: 8192)


def test_names_types_and_labels_are_exactly_the_promised_ones(
    metrics: Metrics, endpoint: MetricsEndpoint
) -> None:
    use_everything(metrics)
    assert found_in(page_of(endpoint)) == PROMISED
    metrics.add_lora_info(lambda: LoraInfo(4, ["sql"], []))
    assert found_in(page_of(endpoint)) == PROMISED | LORA_INFO


def test_what_is_known_beforehand_begins_at_zero(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    metrics.begin_at_zero()
    seen = scrape(endpoint)
    assert set(seen["quickchange_rejected_total"].values()) == {0}
    assert (("code", "OK"), ("reason", "stop")) in seen["quickchange_requests_finished_total"]
    assert set(seen["quickchange_adapter_load_seconds_count"].values()) == {0}
    metrics.observe_step("decode", 0.01, 1, 0)
    assert scrape(endpoint)["quickchange_engine_step_seconds_count"][(("phase", "decode"),)] == 1


def test_a_store_that_does_not_answer_takes_no_other_series_along(
    metrics: Metrics, endpoint: MetricsEndpoint
) -> None:
    def broken() -> int:
        raise OSError(5, "Input/output error")

    use_everything(metrics)
    metrics.store_from(broken, lambda: 8192)
    seen = scrape(endpoint)
    assert math.isnan(seen["quickchange_store_bytes"][()])
    assert seen["quickchange_store_free_bytes"] == {(): 8192}
    assert seen["quickchange_engine_up"] == {(): 1}


def test_the_lora_info_is_one_series_whatever_it_listed_before(
    metrics: Metrics, endpoint: MetricsEndpoint
) -> None:
    infos = iter([LoraInfo(2, ["b", "a"], ["c"]), LoraInfo(3, ["c"], [])])
    metrics.add_lora_info(lambda: next(infos))
    began_s = time.time()
    expected = [("2", "a,b", "c"), ("3", "c", "")]
    for fitting, running, waiting in expected:
        ((labels, value),) = scrape(endpoint)["quickchange_lora_requests_info"].items()
        assert dict(labels) == {
            "max_lora": fitting,
            "running_lora_adapters": running,
            "waiting_lora_adapters": waiting,
        }
        assert began_s <= value <= time.time()


def test_values_arrive(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    use_everything(metrics)
    seen = scrape(endpoint)
    assert seen["quickchange_requests_finished_total"] == {(("code", "OK"), ("reason", "stop")): 1}
    assert seen["quickchange_prompt_tokens_total"] == {(): 7}
    assert seen["quickchange_generated_tokens_total"] == {(): 5}
    assert seen["quickchange_prefix_cache_queries_total"] == {(): 64}
    assert seen["quickchange_prefix_cache_hits_total"] == {(): 48}
    assert seen["quickchange_preemptions_total"] == {(): 3}
    assert seen["quickchange_requests_waiting"] == {(): 2}
    assert seen["quickchange_kv_blocks_used_ratio"] == {(): 0.5}
    assert seen["quickchange_engine_up"] == {(): 1}
    assert seen["quickchange_batch_adapters_sum"] == {(): 2}
    assert seen["quickchange_adapter_upload_bytes_total"] == {(): 512}
    assert seen["quickchange_store_bytes"] == {(): 4096}
    assert seen["quickchange_store_free_bytes"] == {(): 8192}
    assert seen["quickchange_adapters_resident"] == {(("tier", "device"),): 1, (("tier", "host"),): 0}
    assert seen["quickchange_adapter_bytes"] == {(("tier", "device"),): 64, (("tier", "host"),): 0}


def test_adapters_past_the_cap_share_a_series(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    for name in ["", "a", "b", "c", "d", "a", ""]:
        metrics.observe_finished("stop", "OK", 1.0, 1, 1, name)
    seen = scrape(endpoint)["quickchange_adapter_requests_total"]
    assert {dict(labels)["adapter"]: value for labels, value in seen.items()} == {
        "_base": 2,
        "a": 2,
        "b": 1,
        "_other": 2,
    }


def test_an_adapter_that_left_leaves_no_series(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    residents = [ResidentAdapter(name, "device", False, 8) for name in ("a", "b", "c", "d")]
    metrics.residents_from(lambda: residents)
    first = {
        dict(labels)["adapter"]: v for labels, v in scrape(endpoint)["quickchange_adapter_loaded"].items()
    }
    assert first == {"a": 1, "b": 1, "_other": 2}
    residents[:] = [ResidentAdapter("d", "device", True, 8)]
    assert scrape(endpoint)["quickchange_adapter_loaded"] == {
        (("adapter", "d"), ("pinned", "true"), ("tier", "device")): 1
    }


def test_ten_thousand_adapters_do_not_make_a_scrape_longer() -> None:
    metrics = Metrics()
    metrics.residents_from(lambda: [ResidentAdapter(f"a{i}", "device", False, 8) for i in range(10_000)])
    for index in range(10_000):
        metrics.observe_finished("stop", "OK", 1.0, 1, 1, f"a{index}")
    endpoint = MetricsEndpoint(metrics, "127.0.0.1", 0)
    try:
        seen = scrape(endpoint)
    finally:
        endpoint.close()
    assert len(seen["quickchange_adapter_requests_total"]) == 101
    assert len(seen["quickchange_adapter_loaded"]) == 101
    assert sum(map(len, seen.values())) < 1000, "what a scrape costs goes with the series it writes"


def test_a_taken_port_is_an_error(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsEndpoint(metrics, "127.0.0.1", endpoint.port)
