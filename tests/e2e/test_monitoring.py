"""Files of deploy/ for Prometheus and Grafana: every rule and every panel finds what it asks a server for."""

import contextlib
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from quickchange import QuickchangeError, tls_credentials
from tests.e2e.certificates import Authority
from tests.e2e.process import ServerProcess, eventually, running
from tests.e2e.prometheus import ask, scraping, tool

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/quickchange.json").read_text())
VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}

COMPARISON = re.compile(r"\s(==|!=|<|>)\s\S+\s*$")
CONJUNCTION = re.compile(r"\sand\s(?:on \([^)]*\))?")


def rules(kind: str) -> Iterator[Mapping[str, Any]]:
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from (rule for rule in group["rules"] if kind in rule)


def measured(alert: str) -> list[str]:
    """What an alert compares, without what it compares it with: a healthy server answers this too."""
    return [COMPARISON.sub("", part).strip() for part in CONJUNCTION.split(alert)]


def panel_queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            yield f"{panel['title']} {target['refId']}", query


def shipped_config(server: ServerProcess, folder: Path) -> Path:
    """prometheus.yml as it is shipped, but for the address and for a second instead of fifteen."""
    text = (DEPLOY / "prometheus/prometheus.yml").read_text()
    for shipped, here in (
        ("127.0.0.1:9464", server.metrics),
        ("interval: 15s", "interval: 1s"),
        ("rules/*.yml", str(DEPLOY / "prometheus/rules/*.yml")),
    ):
        assert shipped in text
        text = text.replace(shipped, here)
    config = folder / "prometheus.yml"
    config.write_text(text)
    return config


@pytest.mark.parametrize("arguments", [
    ("check", "config", DEPLOY / "prometheus/prometheus.yml"),
    ("check", "config", DEPLOY / "prometheus/compose.yml"),
    ("check", "rules", "--lint=all", *RULES),
    ("test", "rules", DEPLOY / "prometheus/tests/alerts.yml"),
], ids=["config", "config of compose", "rules", "tests of rules"])  # fmt: skip
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_of_its_own() -> None:
    tested = (DEPLOY / "prometheus/tests/alerts.yml").read_text()
    assert [rule["alert"] for rule in rules("alert") if f"alertname: {rule['alert']}\n" not in tested] == []


def test_dashboard_names_no_data_source_of_its_own() -> None:
    text = json.dumps(DASHBOARD)
    uids = set(re.findall(r'"uid": "([^"]+)"', text)) - {DASHBOARD["uid"]}
    assert uids == {"${datasource}"}
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Engine", "Adapters", "Errors"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.fixture(scope="module")
def observed(
    base: Path, adapters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A Prometheus that has watched a server being asked, overloaded, and given adapters good and bad."""
    tool("prometheus")
    folder = tmp_path_factory.mktemp("observed")
    largest = max((path / "adapter_model.safetensors").stat().st_size for path in adapters.values())
    settings = {
        "engine.max_running_requests": 4,
        "engine.max_waiting_requests": 4,
        "engine.kv_bytes": "64MiB",
        "engine.adapter_device_bytes": largest,
        "metrics.lora_info_gauge": "on",
    }
    authority = Authority(folder, "ours")
    pair = authority.pair("server")
    flags = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key))
    with (
        running(ServerProcess(base, folder / "store", settings, flags=flags)) as server,
        scraping(shipped_config(server, folder), folder) as address,
    ):
        # The first scrape is before the load, as it would be at any server: a rate needs two.
        eventually(lambda: _value(address, "quickchange_engine_up"), 30)
        _load(server, tls_credentials(authority.file), adapters, seconds=15)
        eventually(lambda: _value(address, "instance:quickchange_adapter_load_seconds:p99_5m"), 30)
        yield address


def _load(
    server: ServerProcess,
    credentials: grpc.ChannelCredentials,
    adapters: Mapping[str, Path],
    seconds: float,
) -> None:
    with server.client(credentials=credentials) as client:
        for name, path in adapters.items():
            client.adapters.push(path, name)
        names = ["", *adapters, "nobody"]
        end_s = time.monotonic() + seconds

        def ask_on(number: int) -> None:
            while time.monotonic() < end_s:
                try:
                    client.generate("watched " * 8, adapter=names[number % len(names)], max_new_tokens=12)
                except QuickchangeError:  # no such adapter, or no room: that is to be seen
                    time.sleep(0.02)

        with ThreadPoolExecutor(20) as pool:
            for future in [pool.submit(ask_on, number) for number in range(20)]:
                future.result()


def _value(address: str, query: str) -> bool:
    """Whether the query finds numbers."""
    found = ask(address, "query", query=query)
    return bool(found) and any(not math.isnan(float(series["value"][1])) for series in found["result"])


@pytest.mark.slow
def test_every_recording_rule_records(observed: str) -> None:
    names = [rule["record"] for rule in rules("record")]
    assert [name for name in names if not _value(observed, name)] == []


@pytest.mark.slow
def test_every_rule_is_evaluated_without_an_error(observed: str) -> None:
    groups = ask(observed, "rules")["groups"]
    loaded = [rule for group in groups for rule in group["rules"]]
    assert len(loaded) == len([*rules("record"), *rules("alert")])
    assert {(rule["health"], rule.get("lastError")) for rule in loaded} == {("ok", None)}


@pytest.mark.slow
def test_what_every_alert_compares_is_there(observed: str) -> None:
    parts = [part for rule in rules("alert") for part in measured(rule["expr"])]
    assert len(parts) > len(list(rules("alert"))), "some have two"
    assert [part for part in parts if not _value(observed, part)] == []


@pytest.mark.slow
def test_every_panel_shows_something(observed: str) -> None:
    queries = dict(panel_queries())
    assert len(queries) > 40

    def empty() -> list[str]:
        return [title for title, query in queries.items() if not _value(observed, query)]

    # On a busy machine a scrape may come late, and what it would show is stale until then.
    with contextlib.suppress(AssertionError):
        eventually(lambda: not empty())
    assert empty() == []


@pytest.mark.slow
def test_an_overload_is_an_alert(observed: str) -> None:
    """Not yet firing, since it has to last five minutes; nothing else is the matter."""
    alerts = {(alert["labels"]["alertname"], alert["state"]) for alert in ask(observed, "alerts")["alerts"]}
    assert ("QuickchangeRefusing", "pending") in alerts
    assert not {name for name, _ in alerts} & {
        "QuickchangeDown",
        "QuickchangeEngineStuck",
        "QuickchangeFailing",
    }
