"""The scripted server and a folder with an adapter."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from quickchange import Client
from tests.quickchange.scripted import Script, serving


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def target(script: Script) -> Iterator[str]:
    with serving(script) as address:
        yield address


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout_s=20) as connected:
        yield connected


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUICKCHANGE_SERVER", raising=False)
    monkeypatch.delenv("QUICKCHANGE_TOKEN", raising=False)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder with weights of several chunks, and files that are nobody's business."""
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_config.json").write_text('{"r": 8}')
    (made / "adapter_model.safetensors").write_bytes(os.urandom(1_300_000))
    (made / "optimizer.pt").write_bytes(b"not to be sent")
    (made / ".env").write_text("SECRET=1")
    return made
