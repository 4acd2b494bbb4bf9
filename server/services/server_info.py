"""quickchange.v1.ServerService: what this server is, and asking it to go. Knows no requests."""

from collections.abc import Callable
from typing import Any

import grpc.aio

from quickchange.v1 import server_pb2, server_pb2_grpc
from server.engine import Engine

Context = grpc.aio.ServicerContext[Any, Any]


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """
    Args:
        facts: what does not change while the server runs.
        drain: begins the shutdown; called in the event loop, returns at once.
    """

    def __init__(
        self, engine: Engine, facts: server_pb2.GetServerInfoResponse, drain: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._facts = facts
        self._drain = drain

    async def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: Context
    ) -> server_pb2.GetServerInfoResponse:
        stats = self._engine.stats()
        answer = server_pb2.GetServerInfoResponse()
        answer.CopyFrom(self._facts)
        answer.capacity.CopyFrom(
            server_pb2.Capacity(
                kv_tokens_total=stats.kv_tokens_total,
                kv_tokens_free=stats.kv_tokens_free,
                adapter_device_bytes_total=stats.adapter_device_bytes_total,
                adapter_device_bytes_used=stats.adapter_device_bytes_used,
                adapter_host_bytes_total=stats.adapter_host_bytes_total,
                adapter_host_bytes_used=stats.adapter_host_bytes_used,
                requests_running=stats.running,
                requests_waiting=stats.waiting,
            )
        )
        answer.steps.CopyFrom(
            server_pb2.StepStatistics(
                steps=stats.steps,
                mixed_steps=stats.mixed_steps,
                max_adapters_in_step=stats.max_adapters_in_step,
                tokens_computed=stats.tokens_computed,
            )
        )
        return answer

    async def Drain(self, request: server_pb2.DrainRequest, context: Context) -> server_pb2.DrainResponse:
        self._drain()
        stats = self._engine.stats()
        return server_pb2.DrainResponse(requests_running=stats.running + stats.waiting)
