"""A server as a process of its own, and what the tests need to know about it. No test lives here."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from quickchange import Client

READY = re.compile(r"ready grpc=(\S+) metrics=(\S+)\n")
START_LIMIT_S = 120.0


class ServerProcess:
    """`quickchange serve` on a base and a store; settings without a flag come from the environment."""

    def __init__(
        self,
        base: Path,
        store: Path,
        settings: Mapping[str, object] | None = None,
        command: tuple[str, ...] = ("-m", "quickchange", "serve"),
        flags: tuple[str, ...] = (),
    ) -> None:
        usual = ["--base", str(base), "--store", str(store), "--port", "0", "--metrics-port", "0"]
        usual += ["--quantization", "none", "--dtype", "float32", "--device", "cpu"]
        self.store = store
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *command, *usual, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(settings or {}),
        )
        self._readers = [
            threading.Thread(target=_drain, args=(self.process.stdout, self.stdout.append), daemon=True),
            threading.Thread(target=_drain, args=(self.process.stderr, self.stderr.append), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self.grpc, self.metrics = "", ""

    def wait_ready(self) -> "ServerProcess":
        """Until it prints its one line."""
        eventually(lambda: self.stdout or self.process.poll() is not None, START_LIMIT_S)
        match = READY.fullmatch(self.stdout[0]) if self.stdout else None
        assert match is not None, f"not ready: {self.stdout} {self.log}"
        self.grpc, self.metrics = match[1], match[2]
        return self

    @property
    def log(self) -> str:
        """Standard error so far."""
        return "".join(self.stderr)

    @property
    def memory_kib(self) -> int:
        """Resident memory."""
        return self._memory_kib("VmRSS")

    @property
    def peak_memory_kib(self) -> int:
        """The most there was of it since the start, or since `forget_peak_memory`."""
        return self._memory_kib("VmHWM")

    def forget_peak_memory(self) -> None:
        (self._proc / "clear_refs").write_text("5")

    @property
    def _proc(self) -> Path:
        return Path(f"/proc/{self.process.pid}")

    def _memory_kib(self, field: str) -> int:
        status = (self._proc / "status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1])  # type: ignore[index]  # always there

    def scrape(self) -> dict[str, float]:
        """Every sample of /metrics, by its name with labels as they are written."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def client(self, **options: Any) -> Client:
        return Client(self.grpc, timeout_s=60, **options)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code, once it has ended by itself."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(10)
        return code

    def close(self) -> None:
        """Ends it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


@contextmanager
def running(server: ServerProcess) -> Iterator[ServerProcess]:
    """The server, ready; killed afterwards if it still runs."""
    try:
        yield server.wait_ready()
    finally:
        server.close()


@contextmanager
def killed_after(process: "subprocess.Popen[str]") -> Iterator[None]:
    """Whatever happened in the block, the process does not outlive it."""
    try:
        yield
    finally:
        process.kill()


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Ours, with "section.field" settings as variables, one thread, and nothing of the caller's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QUICKCHANGE_")}
    given = {f"QUICKCHANGE_{path.replace('.', '_').upper()}": str(value) for path, value in settings.items()}
    return kept | {"OMP_NUM_THREADS": "1"} | given


def eventually(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits until the condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.02)


def _drain(pipe: IO[str], keep: Callable[[str], None]) -> None:
    for line in pipe:
        keep(line)
