"""How one call on an event loop is made, tried again and ended. Knows nothing of what is called."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import grpc
import grpc.aio

from quickchange.connection import Attempts, Endpoint
from quickchange.errors import CancelledError, QuickchangeError, translated

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ResponseT_co = TypeVar("ResponseT_co", covariant=True)


class _Responses(Protocol[ResponseT_co]):
    def __aiter__(self) -> AsyncIterator[ResponseT_co]: ...
    def cancel(self) -> bool: ...


class AsyncCalls:
    """Calls over one channel, which belongs to the event loop of the first call."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    @cached_property
    def channel(self) -> grpc.aio.Channel:
        return self.endpoint.aio_channel()

    async def close(self) -> None:
        if "channel" in self.__dict__:  # never make one only to close it
            await self.channel.close()

    async def unary(
        self,
        method: "grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT]",
        request: RequestT,
        attempts: Attempts | None = None,
        *,
        wait_for_ready: bool = False,
    ) -> ResponseT:
        """Without `attempts` the call is one that may be repeated."""

        async def once(timeout_s: float | None) -> ResponseT:
            with translated():
                return await method(
                    request, timeout=timeout_s, metadata=self.endpoint.metadata, wait_for_ready=wait_for_ready
                )

        return await _repeated(once, attempts or self.endpoint.attempts(repeatable=True))

    def server_stream(
        self,
        method: "grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT]",
        request: RequestT,
        attempts: Attempts,
    ) -> "AsyncResponseStream[ResponseT]":
        return AsyncResponseStream(
            lambda timeout_s: method(request, timeout=timeout_s, metadata=self.endpoint.metadata), attempts
        )


class AsyncResponseStream(Generic[ResponseT]):
    """Responses as they come; opened again only while none has come. Closing it cancels the call."""

    def __init__(
        self, open_call: Callable[[float | None], _Responses[ResponseT]], attempts: Attempts
    ) -> None:
        self._open = open_call
        self._attempts = attempts
        self._received = False
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._call = self._open(self._attempts.remaining_s())
        self._iterator = self._call.__aiter__()

    def __aiter__(self) -> AsyncIterator[ResponseT]:
        return self

    async def __anext__(self) -> ResponseT:
        while True:
            try:
                response = await self._next()
            except QuickchangeError as error:
                await self._open_again_after(error)
            else:
                self._received = True
                return response

    async def _next(self) -> ResponseT:
        try:
            with translated():
                return await anext(self._iterator)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            # Somebody closed the stream; the task that reads it was not cancelled and must not look so.
            raise CancelledError("the stream was closed before the answer was complete") from None

    async def _open_again_after(self, error: QuickchangeError) -> None:
        if self._received or self._closed:
            raise error
        await asyncio.sleep(self._attempts.delay_s(error))
        self._start()

    def close(self) -> None:
        self._closed = True
        self._call.cancel()


async def _repeated(once: Callable[[float | None], Awaitable[ResponseT]], attempts: Attempts) -> ResponseT:
    while True:
        try:
            return await once(attempts.remaining_s())
        except QuickchangeError as error:
            await asyncio.sleep(attempts.delay_s(error))
