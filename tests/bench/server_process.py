"""A real server as a process of its own, for measurements."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY = re.compile(r"ready grpc=(\S+) metrics=(\S+)")


@contextmanager
def running_server(base: str, store: Path, log: Path, *flags: str) -> Iterator[tuple[str, str]]:
    """Yields the gRPC and the metrics address of a server that answers."""
    command = [sys.executable, "-m", "quickchange", "serve", "--base", base, "--store", str(store)]
    command += ["--port", "0", "--metrics-port", "0", *flags]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            match = READY.match(process.stdout.readline())
            if match is None:
                raise RuntimeError(f"the server did not start; see {log}")
            yield match[1], match[2]
        finally:
            process.terminate()
            process.wait(60)
