"""The server process: start-up, drain and shutdown, in the order in which they happen."""

import asyncio
import contextlib
import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from adapters.base import Base
from adapters.errors import AdapterError, BaseModelError
from adapters.memory import is_out_of_memory
from adapters.replica import ReplicaStore
from adapters.retention import RetentionPolicy
from adapters.store import AdapterStore
from quickchange.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from server.chat import PromptEncoder
from server.config import MIB, ServerSettings
from server.engine import Engine
from server.logs import configure_logging
from server.memory import OutOfMemoryAtStartError
from server.merged import MergedAdapter
from server.metrics import Metrics, MetricsEndpoint
from server.opening import (
    StartError,
    address_of,
    cannot_listen,
    check_certificate,
    check_exposure,
    check_free,
    check_tokens,
    doors_of,
    no_memory,
    open_audit_log,
    open_store,
)
from server.request import Failed, Request, SamplingParams
from server.resident import load_bare, load_merged
from server.services.adapters import AdapterService
from server.services.admission import Admission
from server.services.catalogue import Catalogue
from server.services.changes import ChangeFeed
from server.services.health import HealthService
from server.services.housekeeping import Housekeeper
from server.services.inference import InferenceService
from server.services.ingest import UploadDesk
from server.services.interceptors import AccessInterceptor, StatusInterceptor
from server.services.replica import Replica
from server.services.server_info import ServerService, facts_of
from server.services.tls import ServerCertificates
from server.services.uploads import MAX_CHUNK_BYTES
from server.services.workers import Workers
from server.supervisor import Supervisor
from server.tracing import TracingError, tracer_for
from server.watchdog import Watchdog, end_within, exit_now

log = logging.getLogger(__name__)

VERSION: Final = version("quickchange")

_SWITCH_INTERVAL_S: Final = 0.0002
"""How long a thread may keep the interpreter that another one wants; Python's default is 0.005.

The engine asks for it after every native operation. A load of an adapter, or the event loop with many
streams, would hold each of these up for as long.
"""
_FLUSH_S: Final = 2.0  # for last messages to reach readers once nothing runs any more
_ENVELOPE_BYTES: Final = MIB  # of a message, on top of its prompt or chunk

_SERVICES: Final = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    server_pb2.DESCRIPTOR.services_by_name["ServerService"].full_name,
)


def serve(settings: ServerSettings) -> int:
    """Runs the server until it is told to stop.

    Returns:
        The exit code: 0 after an orderly end, 1 if it could not start or its engine died.
    """
    configure_logging(settings.telemetry.log_format)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        check_free("--port", settings.grpc.host, settings.grpc.port)
        check_free("--metrics-port", settings.metrics.host, settings.metrics.port)
        check_exposure(settings)
        open_audit_log(settings)
        check_tokens(settings)
        check_certificate(settings)
        with open_store(settings) as store:
            base, merged = _load_base(settings, store)
            return asyncio.run(Server(settings, base, store, merged).run())
    except (StartError, BaseModelError, AdapterError, OutOfMemoryAtStartError, TracingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.debug("out of memory at start", exc_info=error)
        print(f"error: {no_memory(settings, error)}", file=sys.stderr)
        return 1


class Server:
    """One process's parts, wired together. `run` is its life."""

    def __init__(
        self, settings: ServerSettings, base: Base, store: AdapterStore, merged: MergedAdapter | None = None
    ) -> None:
        self._settings = settings
        self._base = base
        self._merged = merged
        self._store = store
        self._metrics = Metrics(adapter_series_cap=settings.metrics.adapter_series_cap)
        self._tracer = tracer_for(settings.telemetry, VERSION)
        self._engine = Engine(base, store, settings.engine, self._metrics, self._tracer)
        self._workers = Workers(settings.grpc.worker_threads)
        self._prompts = PromptEncoder(base.tokenizer, base.chat_template, settings.grpc.max_prompt_bytes)
        self._replica = Replica(store, settings.store.refresh_s) if isinstance(store, ReplicaStore) else None
        self._catalogue = Catalogue(store, self._engine, self._workers, self._replica, merged)
        self._feed = ChangeFeed(store, self._engine, self._catalogue, self._workers)
        self._housekeeper = Housekeeper(
            self._catalogue,
            RetentionPolicy(settings.store.gc_keep_versions, settings.store.gc_min_age_s),
            settings.store.gc_interval_s,
        )
        admission = Admission(
            store,
            self._engine,
            base.layout,
            self._workers,
            max_rank=settings.engine.max_adapter_rank,
            eos_token_ids=base.eos_token_ids,
            chat_template=base.chat_template,
            canary_timeout_s=settings.grpc.canary_timeout_s,
            max_waiting_requests=settings.engine.max_waiting_requests,
        )
        self._desk = UploadDesk(store, admission, settings, self._metrics, self._workers)
        self._health = HealthService(_SERVICES)
        self._doors = doors_of(settings, self._metrics)
        self._told_to_stop = asyncio.Event()
        self._ready = self._doubted = self._engine_died = False
        self._watchdog: Watchdog | None = None
        self._supervisor = Supervisor()
        self._showing: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Start-up, main loop, shutdown.

        Raises:
            StartError
        """
        aside = [
            asyncio.create_task(self._desk.sweep()),
            asyncio.create_task(self._supervisor.show_life()),
        ]
        try:
            await self._start_engine()
            endpoint = self._start_metrics()
            rpc_server, port = await self._start_grpc()
            self._housekeeper.start()
            self._ready = True
            await self._show_health()
            print(
                f"ready grpc={address_of(self._settings.grpc.host, port)} "
                f"metrics={address_of(self._settings.metrics.host, endpoint.port)}",
                flush=True,
            )
            self._supervisor.tell_ready()
            await self._told_to_stop.wait()
            await self._drain()
            await rpc_server.stop(_FLUSH_S)
            endpoint.close()
        finally:
            if self._engine.hangs:
                log.error("stopped; a thread that hangs is left behind")
                exit_now()
            for task in aside:
                task.cancel()
            await asyncio.wait(aside)
            await self._engine.stop(0)
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)
            if self._watchdog is not None:
                self._watchdog.close()
            await self._prompts.close()
            self._workers.close()
        log.info("stopped")
        return 1 if self._engine_died else 0

    # Start-up

    async def _start_engine(self) -> None:
        loop = asyncio.get_running_loop()

        self._engine.on_death = lambda: _call_soon(loop, self._on_engine_end, False)
        self._engine.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        await self._feed.start()
        await self._catalogue.load_pinned()
        if self._replica is not None:
            self._replica.start()
        await self._warm_up()
        self._watch_engine(loop)
        gc.collect()
        gc.freeze()  # what start-up made stays: no collection in the middle of a step looks through it again

    def _watch_engine(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watchdog = Watchdog(
            self._engine.progress,
            self._settings.engine.watchdog_s,
            alive=lambda: self._engine.alive,
            on_doubt=lambda doubted: _call_soon(loop, self._on_doubt, doubted),
            on_hang=lambda: _call_soon(loop, self._on_engine_end, True),
        )
        self._watchdog.start()

    async def _warm_up(self) -> None:
        """One short generation: whatever is slow only once is over before the first caller, or fails now."""
        began_s = time.monotonic()
        sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
        async for event in self._engine.submit(Request("warm-up", (0, 0, 0, 0), sampling)):
            if isinstance(event, Failed):
                raise StartError(f"the base cannot generate: {event.error}")
        log.info("engine warm seconds=%.3f", time.monotonic() - began_s)

    def _start_metrics(self) -> MetricsEndpoint:
        base, settings = self._base, self._settings.metrics
        self._metrics.describe_build(
            version=VERSION,
            base_model=base.name,
            quantization=base.quantization,
            device=base.device.type,
            base_model_bytes=base.weight_bytes,
        )
        self._metrics.begin_at_zero()
        self._metrics.store_from(self._store.total_bytes, self._store.free_bytes)
        self._metrics.residents_from(self._catalogue.residents)
        if settings.lora_info_gauge == "on":
            self._metrics.add_lora_info(self._catalogue.lora_info)
        try:
            return MetricsEndpoint(self._metrics, settings.host, settings.port)
        except OSError as error:
            raise cannot_listen("--metrics-port", settings.host, settings.port, error) from None

    async def _start_grpc(self) -> tuple[grpc.aio.Server, int]:
        settings = self._settings.grpc
        rpc_server = grpc.aio.server(
            interceptors=[AccessInterceptor(self._doors, self._metrics.count_denied), StatusInterceptor()],
            options=self._grpc_options(),
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(self._engine, self._catalogue, self._prompts, self._metrics, self._workers),
            rpc_server,
        )
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterService(
                self._engine, self._catalogue, self._desk, self._feed, self._housekeeper, self._workers
            ),
            rpc_server,
        )
        facts = facts_of(self._settings, VERSION, self._base, self._engine, self._merged)
        server_pb2_grpc.add_ServerServiceServicer_to_server(
            ServerService(self._engine, facts, self._told_to_stop.set), rpc_server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, rpc_server)
        names = (*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, rpc_server)
        try:
            port = self._listen(rpc_server, address_of(settings.host, settings.port))
        except RuntimeError as error:
            raise cannot_listen("--port", settings.host, settings.port, error) from None
        await rpc_server.start()
        return rpc_server, port

    def _listen(self, rpc_server: grpc.aio.Server, address: str) -> int:
        if self._settings.tls.cert is None:
            return rpc_server.add_insecure_port(address)
        certificates = ServerCertificates(self._settings.tls, self._metrics.count_certificate_reload)
        self._metrics.add_certificate(lambda: certificates.expires_s)
        return rpc_server.add_secure_port(address, certificates.credentials())

    def _grpc_options(self) -> list[tuple[str, int]]:
        largest_bytes = max(self._settings.grpc.max_prompt_bytes * 2, MAX_CHUNK_BYTES)
        return [
            ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a second server behind it
            ("grpc.max_receive_message_length", largest_bytes + _ENVELOPE_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", 30_000),  # finds out about clients that vanished without a word
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]

    # Shutdown

    def _on_signal(self, number: signal.Signals) -> None:
        if self._told_to_stop.is_set():
            log.warning("stopping at once: told to stop a second time")
            exit_now()  # nothing to lose: whatever is half written is swept at the next start
        log.info("stopping: got %s", number.name)
        self._told_to_stop.set()

    def _on_doubt(self, doubted: bool) -> None:
        self._doubted = doubted
        self._showing = asyncio.create_task(self._show_health())

    def _on_engine_end(self, hangs: bool) -> None:
        log.error("stopping: the engine %s", "hangs" if hangs else "died")
        self._engine_died = True
        self._engine.abandon(hangs=hangs)
        self._told_to_stop.set()

    async def _show_health(self) -> None:
        stopping = self._told_to_stop.is_set()
        await self._health.set_serving(self._ready and not (self._doubted or stopping))

    async def _drain(self) -> None:
        """Admits nothing new, and lets what runs end within the grace; nothing runs on a dead engine."""
        self._supervisor.tell_stopping()
        await self._show_health()
        self._engine.drain()
        self._desk.close()
        self._feed.close()
        self._housekeeper.close()
        if self._replica is not None:
            self._replica.close()
        grace_s = 0.0 if self._engine_died else self._settings.grpc.drain_grace_s
        end_within(grace_s + self._settings.engine.watchdog_s)
        log.info("draining grace_s=%g running=%d", grace_s, self._engine.stats().running)
        await asyncio.gather(self._engine.stop(grace_s), self._uploads_over(grace_s))
        await self._health.close()

    async def _uploads_over(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._desk.wait_until_idle()
        except TimeoutError:
            log.warning("uploads are cut off: they did not end within the grace")


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """In the loop's thread, from any other; not at all once the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _load_base(settings: ServerSettings, store: AdapterStore) -> tuple[Base, MergedAdapter | None]:
    if settings.base.merged is None:
        if settings.base.merged_into != "dequantized":
            raise StartError(
                f"--merged-into {settings.base.merged_into}: there is nothing to merge; give --merged"
            )
        return load_bare(settings.base), None
    try:
        return load_merged(settings, store)
    except (AdapterError, OutOfMemoryAtStartError) as error:
        raise StartError(f"--merged {settings.base.merged}: {error}") from None
