"""A small HTTP/1.1 client for streams of server-sent events. Each request has a connection of its own."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

DATA = b"data:"
DONE = b"[DONE]"


class HttpError(Exception):
    """The server said no, or something that is no answer; the message has its words."""


async def events(host: str, port: int, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Posts JSON and yields each event's JSON as it comes.

    Raises:
        HttpError: any status but 200.
        OSError, asyncio.IncompleteReadError: the connection broke.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_request(host, path, json.dumps(body).encode()))
        async for line in _lines(await _opened(reader)):
            if line.startswith(b"error:"):
                raise HttpError(line.decode(errors="replace"))
            if not line.startswith(DATA):
                continue  # comments, names of events, blank lines between them
            payload = line.removeprefix(DATA).strip()
            if payload == DONE:
                return
            yield json.loads(payload)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _request(host: str, path: str, payload: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


async def _opened(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body's bytes, once the head has been read and says 200."""
    status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    chunked = any(field.lower().replace(" ", "") == "transfer-encoding:chunked" for field in fields)
    body = _chunks(reader) if chunked else _rest(reader)
    if status.split(" ")[1] != "200":
        said = b"".join([piece async for piece in body])
        raise HttpError(f"{status}: {said[:300].decode(errors='replace')}")
    return body


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(65536):
        yield piece


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Whole lines; chunks end where they like."""
    pending = b""
    async for piece in pieces:
        *whole, pending = (pending + piece).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
    if pending:
        yield pending
