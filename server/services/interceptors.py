"""What surrounds every handler: who may call it, and errors turned into statuses. Knows no handler."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio
from google.rpc import status_pb2
from grpc_status import rpc_status

from adapters.errors import AdapterError
from server.access import Caller
from server.errors import InvalidRequestError, ServerError
from server.services.statuses import clipped, reason_of, status_of

log = logging.getLogger(__name__)

_OURS = "/quickchange."
_METHOD_CHARACTERS = 128
_CALLER: ContextVar[Caller] = ContextVar("caller")

Behaviour = Callable[..., Awaitable[Any]]


class Doors(Protocol):
    """Who decides."""

    def admit(self, authorization: list[str], method: str) -> Caller | None:
        """The caller, None if it does not matter; or the error that turns the call away."""
        ...


def caller() -> Caller:
    """Who made the call that this code runs for; LookupError outside of calls that were let in."""
    return _CALLER.get()


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Turns calls away before a byte of their requests is read. The first of all interceptors.

    Args:
        on_denied: told the reason of each.
    """

    def __init__(self, doors: Doors, on_denied: Callable[[str], None]) -> None:
        self._doors = doors
        self._on_denied = on_denied

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        given = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        try:
            admitted = self._doors.admit([_text(value) for value in given], method)
        except ServerError as error:
            return self._denial(error, method)
        if admitted is not None:
            _CALLER.set(admitted)  # each call is a task, and has a context of its own
        return await continuation(handler_call_details)

    def _denial(self, error: ServerError, method: str) -> Any:
        self._on_denied(error.reason)

        async def deny(_: Any, context: Any) -> None:
            log.info(
                "call denied method=%r peer=%s reason=%s",
                method[:_METHOD_CHARACTERS],
                context.peer(),
                error.reason,
            )
            await abort(context, status_of(error))

        # Whatever the method's kind: this one reads no request, and the wire is the same.
        return grpc.stream_stream_rpc_method_handler(deny)


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Wraps our handlers; those of health and reflection speak for themselves.

    Every handler of ours is a coroutine that writes a stream with `context.write`, so that its `finally` runs
    when the call is cancelled, wherever it waits.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        return _wrapped(handler, method) if handler and method.startswith(_OURS) else handler


def _wrapped(handler: Any, method: str) -> Any:
    for kind in ("unary_unary", "unary_stream", "stream_unary"):
        behaviour = getattr(handler, kind)
        if behaviour is not None:
            make = getattr(grpc, f"{kind}_rpc_method_handler")
            return make(
                _with_status(behaviour, method), handler.request_deserializer, handler.response_serializer
            )
    raise AssertionError(f"{method} streams both ways; no method of ours does")


def _with_status(behaviour: Behaviour, method: str) -> Behaviour:
    @functools.wraps(behaviour)
    async def call(request: Any, context: Any) -> Any:
        try:
            return await behaviour(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            log.info("call failed method=%s reason=%s about=%s", method, reason_of(error), _about(error))
            await abort(context, status_of(error))

    return call


def _about(error: Exception) -> str:
    """What the log may say of it: messages about requests can quote prompts, those about adapters cannot."""
    if isinstance(error, InvalidRequestError):
        return error.field
    return repr(clipped(str(error))) if isinstance(error, AdapterError) else "-"


async def abort(context: Any, status: status_pb2.Status) -> NoReturn:
    """Ends the call with a rich status."""
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)
    raise AssertionError("abort always raises")
