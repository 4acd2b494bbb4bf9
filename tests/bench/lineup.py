"""Starts the peers that a run was asked to measure."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench.contender import Contender
from tests.bench.options import Options
from tests.bench.peers.llama import llama_server
from tests.bench.peers.llama_files import LlamaFiles
from tests.bench.peers.peft import peft
from tests.bench.peers.vllm import vllm_server
from tests.bench.subject import Pool, Subject


@contextmanager
def peers(
    options: Options, subject: Subject, pool: Pool, scratch: Path, cache: Path, tell: Callable[[str], None]
) -> Iterator[list[Contender]]:
    """All of them, one after the other; each waits without the processors until its turn.

    Args:
        pool: adapters that each of them holds.
        cache: where converted files are kept.
    """
    with ExitStack() as stack:
        started: list[Contender] = []
        slots, context = options.most_clients, options.context
        if options.peft:
            tell("starting PEFT")
            started += stack.enter_context(peft(subject, pool, scratch))
        if options.llama_server:
            files = _llama_files(options, subject, pool, cache, tell)
            tell("starting llama-server")
            server = llama_server(options.llama_server, files, scratch, slots=slots, context=context)
            started.append(stack.enter_context(server))
        if options.vllm:
            tell("starting vLLM")
            vllm = vllm_server(
                options.vllm, subject, pool, scratch, slots=slots, context=context, rank=options.rank
            )
            started.append(stack.enter_context(vllm))
        yield started


def _llama_files(
    options: Options, subject: Subject, pool: Pool, cache: Path, tell: Callable[[str], None]
) -> LlamaFiles:
    assert options.llama_server is not None, "asked for"
    assert options.llama_cpp is not None, "checked with the other options"
    quantize = options.llama_quantize or options.llama_server.with_name("llama-quantize")
    return LlamaFiles.make(
        subject, pool, cache / "gguf", sources=options.llama_cpp, quantize=quantize, tell=tell
    )
