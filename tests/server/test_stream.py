"""The mailbox between engine and reader."""

import asyncio

from server.errors import DeadlineError
from server.request import Delta, Failed, Started
from server.stream import RequestStream


async def test_deltas_merge_while_nobody_reads() -> None:
    stream = RequestStream(asyncio.get_running_loop(), lambda: None)
    stream.put(Started(3, 0, 0.0))
    for index in range(1000):
        stream.put(Delta(str(index % 10), (index,)))
    stream.put(Failed(DeadlineError("late")))
    events = [event async for event in stream]
    assert len(events) == 3
    assert isinstance(events[1], Delta)
    assert events[1].token_ids == tuple(range(1000))
    assert isinstance(events[2], Failed)


async def test_a_reader_waits_for_the_next_event() -> None:
    stream = RequestStream(asyncio.get_running_loop(), lambda: None)
    reader = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    assert not reader.done()
    stream.put(Delta("x", (1,)))
    assert await reader == Delta("x", (1,))
