"""grpc.health.v1: whether this server takes requests. Knows nothing of the engine.

The servicer that comes with grpcio-health-checking forgets its other watchers when one of them leaves, so
this is one of our own.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Response = health_pb2.HealthCheckResponse
Context = grpc.aio.ServicerContext[Any, Any]


class HealthService(health_pb2_grpc.HealthServicer):
    """One answer for the whole server ("") and for each of its services: all serve, or none does."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services) | {""}
        self._serving = False
        self._closed = False
        self._changed = asyncio.Condition()

    async def set_serving(self, serving: bool) -> None:
        """Tells everybody who asks, and everybody who watches."""
        async with self._changed:
            self._serving = serving
            self._changed.notify_all()

    async def close(self) -> None:
        """Ends every watch, so that none holds up the shutdown."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return self._answer(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        while not self._closed:
            answer = self._answer(request.service)
            await context.write(answer)
            async with self._changed:
                while self._answer(request.service) == answer and not self._closed:
                    await self._changed.wait()

    def _answer(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in self._services:
            return _Response(status=_Response.SERVICE_UNKNOWN)
        return _Response(status=_Response.SERVING if self._serving else _Response.NOT_SERVING)
