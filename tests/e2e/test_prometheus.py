"""A real Prometheus scrapes a real server, and finds nothing to complain about."""

import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.process import ServerProcess, eventually
from tests.e2e.prometheus import ask, scraping, tool

CONFIG = """
global: {scrape_interval: 1s}
scrape_configs:
  - job_name: quickchange
    static_configs: [{targets: ["TARGET"]}]
"""


@pytest.fixture
def prometheus(server: ServerProcess, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes the server."""
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.replace("TARGET", server.metrics))
    with scraping(config, tmp_path) as address:
        yield address


def test_a_scrape_is_healthy_and_holds_what_happened(server: ServerProcess, prometheus: str) -> None:
    with server.client() as client:
        client.generate("hello", max_new_tokens=3)

    def scraped() -> bool:
        found = ask(prometheus, "query", query="quickchange_generated_tokens_total > 0")
        return bool(found and found["result"])

    eventually(scraped, 30)
    (target,) = ask(prometheus, "targets")["activeTargets"]
    assert target["health"] == "up"
    assert target["lastError"] == ""
    up = ask(prometheus, "query", query="quickchange_engine_up")["result"]
    assert up[0]["value"][1] == "1"


def test_promtool_has_no_objection(server: ServerProcess) -> None:
    promtool = tool("promtool")
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        page = answer.read()
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert not done.stderr, done.stderr.decode()
