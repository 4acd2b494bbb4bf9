"""This project's server as a process of its own, on free ports, as anyone starts it. Knows no requests."""

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

_READY: Final = re.compile(r"ready grpc=(\S+) metrics=(\S+)")
_START_LIMIT_S: Final = 180.0
_STOP_LIMIT_S: Final = 40.0
_FOR_OTHERS: Final = ("QUICKCHANGE_TLS_", "QUICKCHANGE_ACCESS_", "QUICKCHANGE_GRPC_HOST")


class LocalServerError(Exception):
    """The server did not start; the message says what it said last."""


class LocalServer:
    """`python -m quickchange serve`; use as a context manager, or `stop` it.

    Args:
        base: as `serve --base` takes it.
        store: the folder of its adapters.
        log: file that gets all it says.
        flags: further flags of `serve`.

    Attributes:
        grpc, metrics: HOST:PORT.
        command: what was run.

    Raises:
        LocalServerError: it ended, or said nothing for three minutes.
    """

    def __init__(self, base: str, store: Path, log: Path, flags: Sequence[str] = ()) -> None:
        self._log = log
        self.command = [
            *(sys.executable, "-m", "quickchange", "serve", "--base", base, "--store", str(store)),
            *("--port", "0", "--metrics-port", "0", *flags),
        ]
        with log.open("w") as file:
            # In a session of its own: Ctrl-C is for whoever started it, who then stops the server.
            self._process = subprocess.Popen(
                self.command,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
                env=_open_here(os.environ),
            )
        try:
            self.grpc, self.metrics = self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

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

    def _wait_ready(self) -> tuple[str, str]:
        assert self._process.stdout is not None
        line = _first_line(self._process.stdout, _START_LIMIT_S)
        match = _READY.match(line)
        if match is None:
            raise LocalServerError(
                f"the server did not start ({self._last_words()}); all it said is in {self._log}"
            )
        return match[1], match[2]

    def _last_words(self) -> str:
        lines = self._log.read_text().splitlines()
        return lines[-1] if lines else f"no line within {_START_LIMIT_S:.0f} s"


def _open_here(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what a server for others was told: this one is for whoever started it, on this machine."""
    return {name: value for name, value in environ.items() if not name.startswith(_FOR_OTHERS)}


def _first_line(pipe: IO[str], limit_s: float) -> str:
    """The first line; empty if none comes in time or the pipe ends."""
    deadline_s = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        ready = selector.select(max(0.0, deadline_s - time.monotonic()))
    return pipe.readline() if ready else ""
