"""A real Prometheus, for tests of what it finds. No test lives here."""

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


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`; the test skips without it."""
    binary = shutil.which(name)
    if binary is None:
        pytest.skip(f"needs {name} (Debian's package prometheus)")
    return binary


@contextmanager
def scraping(config: Path, folder: Path) -> Iterator[str]:
    """The address of a Prometheus with this configuration; it must have found nothing wrong with a scrape."""
    address = f"127.0.0.1:{_free_port()}"
    command = [tool("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with _running([*command, f"--web.listen-address={address}"], folder / "log"):
        yield address
    complaints = [line for line in (folder / "log").read_text().splitlines() if "level=warn" in line]
    assert not [line for line in complaints if "scrape" in line], complaints


def ask(address: str, path: str, **query: str) -> Any:
    """What Prometheus' API answers; None while it does not."""
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]
    except OSError:  # not up yet
        return None


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
