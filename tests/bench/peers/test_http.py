"""Streams of events, however the bytes are cut; refusals; what peers' events mean."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from tests.bench.answers import Ask
from tests.bench.peers.http import HttpError, events
from tests.bench.peers.llama import LlamaServer
from tests.bench.peers.vllm import VllmServer

BODY = (
    b'data: {"n": 1}\n\n: comment\r\n\r\ndata:{"n": 2}\r\n\r\ndata: {"text": "\xc3\xa4"}\n\ndata: [DONE]\n\n'
)
EXPECTED = [{"n": 1}, {"n": 2}, {"text": "ä"}]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(body: bytes, size: int) -> list[bytes]:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]


async def answer_of(pieces: Sequence[bytes]) -> list[dict[str, Any]]:
    """What the client makes of a server that sends these pieces."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert await reader.readexactly(length) == b'{"a": 1}'
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return [event async for event in events("127.0.0.1", port, "/x", {"a": 1})]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_chunks_end_where_they_like(size: int) -> None:
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    assert await answer_of([head, *chunked(BODY, size)]) == EXPECTED


async def test_a_body_without_chunks_ends_with_the_connection() -> None:
    assert await answer_of([OK + b"\r\n", BODY[:20], BODY[20:]]) == EXPECTED


async def test_a_refusal_is_an_error_with_its_words() -> None:
    with pytest.raises(HttpError, match=r"400 Bad Request.*too long"):
        await answer_of([b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"error": "too long"}'])


async def test_a_broken_stream_is_an_error() -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        await answer_of([OK + b"Transfer-Encoding: chunked\r\n\r\n", b'20\r\ndata: {"n"'])


def test_llama_counts_tokens_of_pieces_and_believes_the_last_event() -> None:
    server = LlamaServer.__new__(LlamaServer)
    assert server.tokens_so_far({"content": "a", "tokens": [1]}, 3) == 4
    assert server.tokens_so_far({"content": "ab", "tokens": [1, 2]}, 3) == 5
    assert server.tokens_so_far({"stop": True, "tokens_predicted": 64}, 5) == 64


def test_vllm_counts_as_the_server_does() -> None:
    server = VllmServer.__new__(VllmServer)
    assert server.tokens_so_far({"usage": {"completion_tokens": 7}}, 5) == 7
    assert server.tokens_so_far({"choices": []}, 5) == 5


def test_peers_are_asked_for_the_adapter_by_their_own_name_for_it() -> None:
    llama = LlamaServer("llama-server", None, 0, ["a", "b"])  # type: ignore[arg-type]  # no process is needed
    assert llama.body(Ask((1, 2), "b"), 8)["lora"] == [{"id": 1, "scale": 1.0}]
    assert llama.body(Ask((1, 2), ""), 8)["lora"] == [{"id": 0, "scale": 0.0}]
    vllm = VllmServer("vllm", None, 0, ["a", "b"])  # type: ignore[arg-type]  # no process is needed
    assert vllm.body(Ask((1,), ""), 8)["model"] == "base"
    assert vllm.body(Ask((1,), "b"), 8)["model"] == "b"
