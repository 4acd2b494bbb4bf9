"""How one blocking call is made, tried again and ended. Knows nothing of what is called."""

import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import grpc

from quickchange.connection import Attempts, Endpoint
from quickchange.errors import QuickchangeError, translated

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ResponseT_co = TypeVar("ResponseT_co", covariant=True)


class _Future(Protocol[ResponseT_co]):
    def result(self) -> ResponseT_co: ...
    def cancel(self) -> bool: ...
    def add_done_callback(self, fn: Callable[[object], None]) -> None: ...


class _Responses(Protocol[ResponseT_co]):
    def __next__(self) -> ResponseT_co: ...
    def cancel(self) -> bool: ...


class Calls:
    """Blocking calls over one channel; safe to share between threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.channel = endpoint.channel()

    def close(self) -> None:
        self.channel.close()

    def unary(
        self,
        method: "grpc.UnaryUnaryMultiCallable[RequestT, ResponseT]",
        request: RequestT,
        attempts: Attempts | None = None,
        *,
        wait_for_ready: bool = False,
    ) -> ResponseT:
        """Without `attempts` the call is one that may be repeated."""

        def once(timeout_s: float | None) -> ResponseT:
            return _result(
                method.future(
                    request, timeout=timeout_s, metadata=self.endpoint.metadata, wait_for_ready=wait_for_ready
                )
            )

        return _repeated(once, attempts or self.endpoint.attempts(repeatable=True))

    def client_stream(
        self,
        method: "grpc.StreamUnaryMultiCallable[RequestT, ResponseT]",
        requests: Iterator[RequestT],
        timeout_s: float | None,
    ) -> ResponseT:
        """Sends all requests, once; an answer may come before the last of them."""
        source = _Source(requests)
        call = method.future(source, timeout=timeout_s, metadata=self.endpoint.metadata)
        try:
            return _result(call)
        finally:
            source.raise_error()

    def server_stream(
        self,
        method: "grpc.UnaryStreamMultiCallable[RequestT, ResponseT]",
        request: RequestT,
        attempts: Attempts,
    ) -> "ResponseStream[ResponseT]":
        return ResponseStream(
            lambda timeout_s: method(request, timeout=timeout_s, metadata=self.endpoint.metadata), attempts
        )


class ResponseStream(Generic[ResponseT]):
    """Responses as they come; opened again only while none has come. Closing it cancels the call."""

    def __init__(
        self, open_call: Callable[[float | None], _Responses[ResponseT]], attempts: Attempts
    ) -> None:
        self._open = open_call
        self._attempts = attempts
        self._received = False
        self._closed = False
        self._call = open_call(attempts.remaining_s())

    def __iter__(self) -> Iterator[ResponseT]:
        return self

    def __next__(self) -> ResponseT:
        while True:
            try:
                with translated():
                    response = next(self._call)
            except QuickchangeError as error:
                self._open_again_after(error)
            else:
                self._received = True
                return response

    def _open_again_after(self, error: QuickchangeError) -> None:
        if self._received or self._closed:
            raise error
        time.sleep(self._attempts.delay_s(error))
        self._call = self._open(self._attempts.remaining_s())

    def close(self) -> None:
        self._closed = True
        self._call.cancel()


def _repeated(once: Callable[[float | None], ResponseT], attempts: Attempts) -> ResponseT:
    while True:
        try:
            return once(attempts.remaining_s())
        except QuickchangeError as error:
            time.sleep(attempts.delay_s(error))


def _result(call: _Future[ResponseT]) -> ResponseT:
    # Not `call.result()` alone: an interrupt that hits its wait may leave a lock of gRPC's locked for ever.
    done: SimpleQueue[object] = SimpleQueue()
    try:
        call.add_done_callback(done.put)
        done.get()
        with translated():
            return call.result()
    finally:
        call.cancel()  # an interrupted wait must not leave the server working; no effect on a call that ended


class _Source(Generic[RequestT]):
    """An iterator whose own failure is kept: gRPC would only report that the call was cancelled."""

    def __init__(self, items: Iterator[RequestT]) -> None:
        self._items = items
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[RequestT]:
        return self

    def __next__(self) -> RequestT:
        try:
            return next(self._items)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise StopIteration from None  # ends the call; `raise_error` then says why

    def raise_error(self) -> None:
        """Raises what iterating raised, if it did."""
        if self._error is not None:
            raise self._error
