"""The server as a process of its own, as anyone would start it. Knows no requests."""

import contextlib
import re
import selectors
import signal
import subprocess
import sys
import time
from typing import IO, Final

from quickchange.demo.errors import DemoError
from quickchange.demo.workspace import Workspace

_READY: Final = re.compile(r"ready grpc=(\S+) metrics=(\S+)")
_START_LIMIT_S: Final = 180.0
_STOP_LIMIT_S: Final = 40.0


class ServerProcess:
    """`python -m quickchange serve` on free ports.

    Attributes:
        grpc, metrics: HOST:PORT.
        command: what was run.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self.command = [
            *(sys.executable, "-m", "quickchange", "serve", "--base", "smollm2"),
            *("--store", str(workspace.store), "--port", "0", "--metrics-port", "0"),
        ]
        with workspace.server_log.open("w") as log:
            # In a session of its own: Ctrl-C is for the demo, which then stops the server.
            self._process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        try:
            self.grpc, self.metrics = self._wait_ready()
        except BaseException:
            self.stop()
            raise
        workspace.remember_server(self.pid, self.grpc)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """Lets what runs end, then ends the process."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_LIMIT_S)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._workspace.forget_server()

    def _wait_ready(self) -> tuple[str, str]:
        assert self._process.stdout is not None
        line = _first_line(self._process.stdout, _START_LIMIT_S)
        match = _READY.match(line)
        if match is None:
            raise DemoError(
                f"the server did not start ({self._last_words()}); all it said is in "
                f"{self._workspace.server_log}"
            )
        return match[1], match[2]

    def _last_words(self) -> str:
        lines = self._workspace.server_log.read_text().splitlines()
        return lines[-1] if lines else f"no line within {_START_LIMIT_S:.0f} s"


def _first_line(pipe: IO[str], limit_s: float) -> str:
    """The first line; empty if none comes in time or the pipe ends."""
    deadline_s = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        ready = selector.select(max(0.0, deadline_s - time.monotonic()))
    return pipe.readline() if ready else ""
