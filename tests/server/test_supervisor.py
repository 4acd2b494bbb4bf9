"""What systemd is told, over a socket of the kind that it listens at."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.supervisor import Supervisor


@pytest.fixture(params=["a path", "an abstract name"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """Who listens, and its address as systemd passes it."""
    is_path = request.param == "a path"
    name = str(tmp_path / "notify") if is_path else f"@{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(20)
        listening.bind(name if is_path else f"\0{tmp_path}")
        yield listening, name


def test_systemd_is_told(listener: tuple[socket.socket, str]) -> None:
    listening, address = listener
    supervisor = Supervisor({"NOTIFY_SOCKET": address})
    supervisor.tell_ready()
    supervisor.tell_stopping()
    assert [listening.recv(100) for _ in range(2)] == [b"READY=1", b"STOPPING=1"]


async def test_signs_of_life_come_until_they_are_not_wanted(listener: tuple[socket.socket, str]) -> None:
    listening, address = listener
    living = asyncio.create_task(
        Supervisor(
            {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}
        ).show_life()
    )
    for _ in range(3):
        assert await asyncio.to_thread(listening.recv, 100) == b"WATCHDOG=1"
    living.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await living


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"},  # meant for another process
    ],
)
async def test_without_systemd_nothing_is_sent(environ: dict[str, str]) -> None:
    supervisor = Supervisor(environ)
    supervisor.tell_ready()
    await asyncio.wait_for(supervisor.show_life(), 20)


def test_nobody_who_listens_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Supervisor({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).tell_ready()
    assert "systemd not told READY=1" in caplog.text
