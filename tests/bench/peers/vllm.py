"""vLLM's server on the same base, in bfloat16: it has no NF4 for a CPU."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.answers import Ask
from tests.bench.peers.http_server import HttpServer, free_port, own_environment, wait_until_healthy
from tests.bench.processes import running
from tests.bench.subject import Pool, Subject

_BASE = "base"
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class VllmServer(HttpServer):
    path = "/v1/completions"

    def body(self, ask: Ask, new_tokens: int) -> dict[str, Any]:
        return {
            "model": ask.adapter or _BASE,
            "prompt": list(ask.prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }

    def tokens_so_far(self, event: Mapping[str, Any], before: int) -> int:
        usage = event.get("usage")
        return int(usage["completion_tokens"]) if usage else before


@contextmanager
def vllm_server(
    program: str, subject: Subject, pool: Pool, scratch: Path, *, slots: int, context: int, rank: int
) -> Iterator[VllmServer]:
    """A server with all adapters of the pool, every one of them in memory.

    Args:
        program: the `vllm` command, or the Python that has the package.
        slots: requests in one step.
        context: tokens of prompt and answer.
    """
    command = [program]
    if Path(program).name.startswith("python"):
        command += ["-m", "vllm.entrypoints.cli.main"]
    port = free_port()
    command += ["serve", str(subject.folder), "--served-model-name", _BASE, "--dtype", "bfloat16"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(context)]
    command += ["--max-num-seqs", str(slots), "--no-enable-prefix-caching"]
    count = str(len(pool.folders))
    command += ["--enable-lora", "--max-loras", count, "--max-cpu-loras", count, "--max-lora-rank", str(rank)]
    command += ["--lora-modules", *(f"{name}={folder}" for name, folder in pool.folders.items())]
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    environment = own_environment(VLLM_CPU_OMP_THREADS_BIND=cores, **_ENVIRONMENT)
    with running(command, scratch / "vllm.log", environment=environment, output="log") as process:
        wait_until_healthy(process, port)
        yield VllmServer("vllm", process, port, list(pool.folders))
