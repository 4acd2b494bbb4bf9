"""quickchange.v1.ServerService: what this server is, and asking it to go. Knows no requests."""

from collections.abc import Callable
from typing import Any

import grpc.aio

from adapters.base import Base
from quickchange.v1 import server_pb2, server_pb2_grpc
from server.config import ServerSettings
from server.engine import Engine
from server.merged import MergedAdapter
from server.services import convert
from server.services.uploads import MAX_CHUNK_BYTES

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


def facts_of(
    settings: ServerSettings, version: str, base: Base, engine: Engine, merged: MergedAdapter | None
) -> server_pb2.GetServerInfoResponse:
    """What does not change while a server runs."""
    return server_pb2.GetServerInfoResponse(
        version=version,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        quantization=base.quantization,
        device=base.device.type,
        dtype=str(base.dtype).removeprefix("torch."),
        merged=None if merged is None else convert.merged(merged),
        limits=_limits(settings, engine),
    )


def _limits(settings: ServerSettings, engine: Engine) -> server_pb2.Limits:
    asked = settings.engine
    return server_pb2.Limits(
        max_context_tokens=engine.bounds.max_context_tokens,
        max_running_requests=asked.max_running_requests,
        max_waiting_requests=asked.max_waiting_requests,
        max_batch_tokens=engine.max_batch_tokens,
        max_upload_bytes=settings.grpc.max_upload_bytes,
        max_adapter_rank=asked.max_adapter_rank,
        max_waiting_tokens=asked.max_waiting_tokens,
        max_prompt_tokens=asked.max_prompt_tokens,
        max_new_tokens=asked.max_new_tokens,
        max_answers=asked.max_answers or asked.max_running_requests,
        uploads=_upload_limits(settings),
    )


def _upload_limits(settings: ServerSettings) -> server_pb2.UploadLimits:
    limits = server_pb2.UploadLimits(
        max_chunk_bytes=MAX_CHUNK_BYTES,
        max_concurrent=settings.grpc.max_concurrent_uploads,
        min_bytes_per_s=settings.grpc.upload_min_bytes_per_s,
        max_store_bytes=settings.store.max_bytes,
        max_bytes_per_name=settings.store.max_bytes_per_name,
        max_versions_per_name=settings.store.max_versions_per_name,
    )
    limits.idle_timeout.FromMilliseconds(round(settings.grpc.upload_idle_timeout_s * 1000))
    limits.resume_ttl.FromMilliseconds(round(settings.grpc.upload_resume_ttl_s * 1000))
    return limits
