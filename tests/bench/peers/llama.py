"""llama.cpp's server on the same base as Q4_0, adapters in 16 bits."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.answers import Ask
from tests.bench.peers.http_server import HttpServer, free_port, own_environment, wait_until_healthy
from tests.bench.peers.llama_files import LlamaFiles
from tests.bench.processes import running


class LlamaServer(HttpServer):
    path = "/completion"

    def body(self, ask: Ask, new_tokens: int) -> dict[str, Any]:
        chosen = self._adapters.index(ask.adapter) if ask.adapter else None
        lora = {"id": 0, "scale": 0.0} if chosen is None else {"id": chosen, "scale": 1.0}
        return {
            "prompt": list(ask.prompt),
            "n_predict": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "lora": [lora],  # adapters that are not listed have scale 0
            "stream": True,
        }

    def tokens_so_far(self, event: Mapping[str, Any], before: int) -> int:
        """Pieces wait for whole characters, so the last event's count is the one that holds."""
        if event.get("stop"):
            return int(event["tokens_predicted"])
        return before + max(1, len(event.get("tokens", ())))


@contextmanager
def llama_server(
    program: Path, files: LlamaFiles, scratch: Path, *, slots: int, context: int
) -> Iterator[LlamaServer]:
    """A server with all adapters of the files in memory.

    Args:
        slots: requests at once.
        context: tokens of prompt and answer.
    """
    port, threads = free_port(), str(os.cpu_count())
    command = [str(program), "-m", str(files.model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", threads, "-tb", threads, "-np", str(slots), "-c", str(slots * context)]
    command += ["--no-cache-prompt", "--lora-init-without-apply"]
    command += ["--lora", ",".join(str(path) for path in files.adapters.values())]
    log = scratch / "llama-server.log"
    with running(command, log, environment=own_environment(), output="log") as process:
        wait_until_healthy(process, port)
        yield LlamaServer("llama-server", process, port, list(files.adapters))
