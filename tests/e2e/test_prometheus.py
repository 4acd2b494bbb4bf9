"""A real Prometheus scrapes a real server, and finds nothing to complain about."""

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.process import ServerProcess, eventually

CONFIG = """
global: {scrape_interval: 1s}
scrape_configs:
  - job_name: quickchange
    static_configs: [{targets: ["TARGET"]}]
"""


@pytest.fixture
def prometheus(server: ServerProcess, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes the server."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("needs Prometheus (Debian's package prometheus)")
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.replace("TARGET", server.metrics))
    address = f"127.0.0.1:{_free_port()}"
    command = [binary, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    with _running([*command, f"--web.listen-address={address}"], tmp_path / "log"):
        yield address
    complaints = [line for line in (tmp_path / "log").read_text().splitlines() if "level=warn" in line]
    assert not [line for line in complaints if "scrape" in line], complaints


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[None]:
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(address: str, path: str, **query: str) -> Any:
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]
    except OSError:  # not up yet
        return None


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
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian's package prometheus)")
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        page = answer.read()
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert not done.stderr, done.stderr.decode()
