"""Processes that are measured: started, waited for, paused while another one's turn is, stopped."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

import psutil

STOP_S = 60.0


class StartError(Exception):
    """A process did not come up; the message names its log."""


class Process:
    """A program and everything it starts, in a process group of its own."""

    def __init__(self, popen: "subprocess.Popen[str]", log: Path) -> None:
        self._popen = popen
        self.log = log

    @property
    def stdin(self) -> IO[str]:
        assert self._popen.stdin is not None
        return self._popen.stdin

    def line(self) -> str:
        """The next line of standard output.

        Raises:
            StartError: it ended.
        """
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise StartError(f"it ended before it answered; see {self.log}")
        return line

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def pause(self) -> None:
        """Takes it off the processors, helper threads and all."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def resident_bytes(self) -> int:
        """Resident memory of all its processes; what they share is counted once (proportional set size)."""
        root = psutil.Process(self._popen.pid)
        return sum(each.memory_full_info().pss for each in [root, *root.children(recursive=True)])

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        root = psutil.Process(self._popen.pid)
        clocks = [each.cpu_times() for each in [root, *root.children(recursive=True)]]
        return float(sum(clock.user + clock.system for clock in clocks))

    def memory(self) -> tuple[int, int]:
        """Resident bytes of the first process, and those of them that are files mapped into it."""
        info = psutil.Process(self._popen.pid).memory_info()
        return info.rss, info.shared

    def stop(self) -> None:
        self.resume()
        self._signal(signal.SIGTERM)
        try:
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(STOP_S)
        finally:
            self._signal(signal.SIGKILL)  # whatever did not go, and what the program left behind

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, number)


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    output: Literal["pipe", "log"] = "pipe",
) -> Iterator[Process]:
    """The program until the block ends; its errors go to the log, and so may its output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE if output == "pipe" else subprocess.DEVNULL,
            stdout=subprocess.PIPE if output == "pipe" else errors,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        ) as popen,
    ):
        process = Process(popen, log)
        try:
            yield process
        finally:
            process.stop()


def wait_until(process: Process, ready: Callable[[], bool], timeout_s: float) -> None:
    """Asks `ready` until it says yes.

    Raises:
        StartError: the process ended, or took too long.
    """
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        if not process.is_running():
            raise StartError(f"it ended before it was ready; see {process.log}")
        if time.monotonic() > deadline_s:
            raise StartError(f"it was not ready within {timeout_s:g} s; see {process.log}")
        time.sleep(0.2)
