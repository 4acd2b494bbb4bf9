"""Turns every error that leaves a handler into its status, in one place. Knows nothing of the handlers."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.rpc import status_pb2
from grpc_status import rpc_status

from adapters.errors import AdapterError
from server.errors import InvalidRequestError
from server.services.statuses import clipped, reason_of, status_of

log = logging.getLogger(__name__)

_OURS = "/quickchange."

Behaviour = Callable[..., Awaitable[Any]]


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
