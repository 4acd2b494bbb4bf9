"""`quickchange serve` whose engine breaks for real when a request's id says so. No test lives here.

python -m tests.e2e.faulty serve …

    die          the engine's thread ends with an error that nobody catches
    hang         a forward pass calls into native code that never returns
    slow-S       one forward pass takes S seconds more, in native code, and goes on
    SIGUSR1      from now on the process may have no more than ROOM_MIB of address space besides what it has
    SIGUSR2      as much as it likes again
"""

import ctypes
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

COMMAND = ("-m", "tests.e2e.faulty", "serve")
ROOM_MIB = 24
"""Enough for stacks of threads and Python's own objects, and for no large tensor."""


def _break(request_id: str, done: set[str]) -> None:
    if request_id == "die":
        raise SystemExit("the device is gone")
    if request_id == "hang":
        ctypes.CDLL(None).pause()
    elif request_id.startswith("slow-") and request_id not in done:
        done.add(request_id)
        ctypes.CDLL(None).usleep(int(float(request_id.removeprefix("slow-")) * 1e6))


def _main() -> int:
    from quickchange.cli import main
    from server.runner import ModelRunner

    route, done = ModelRunner._route, set[str]()

    def breaking(self: ModelRunner, batch: Any) -> None:
        for row in batch.rows:
            _break(row.sequence.request.request_id, done)
        route(self, batch)

    ModelRunner._route = breaking  # type: ignore[method-assign]  # the fault is real, and comes when it should
    signal.signal(signal.SIGUSR1, lambda *_: _limit_memory())
    signal.signal(signal.SIGUSR2, lambda *_: _set_limit(resource.RLIM_INFINITY, "unlimited"))
    return main(sys.argv[1:])


def _limit_memory() -> None:
    status = Path("/proc/self/status").read_text()
    used_kib = int(re.search(r"VmSize:\s+(\d+) kB", status)[1])  # type: ignore[index]  # always there
    _set_limit((used_kib + ROOM_MIB * 1024) * 1024, "limited")


def _set_limit(size_bytes: int, word: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.write(2, f"memory {word}\n".encode())


if __name__ == "__main__":
    sys.exit(_main())
