"""The engine's thread and its bridge to the event loop. Knows neither models nor grpc.

Requests come in through `submit`, leave through their RequestStream, and always end with Finished or Failed.
Everything the core owns is touched by the thread alone: others post commands, which run between two steps.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import TypeVar
from weakref import WeakSet

import torch

from adapters.base import Base
from adapters.errors import AdapterError
from adapters.store import AdapterStore
from adapters.tier import Resident, TierName, Whereabouts
from kernels.library import native
from server.bounds import RequestBounds
from server.config import EngineSettings
from server.core import EngineCore
from server.errors import DrainingError, EngineDownError, QueueFullError
from server.generation import Generation, generations_of
from server.metrics import Metrics
from server.request import Failed, Request, TokenEvent
from server.statistics import EngineStats
from server.stream import RequestStream
from server.tracing import Tracer

log = logging.getLogger(__name__)
T = TypeVar("T")

_IDLE_WAIT_S = 0.2
"""How long an idle engine sleeps at most before it looks at deadlines again."""
_STOP_POLL_S = 0.02


class Engine:
    """Runs requests on one base, in a thread of its own.

    Attributes:
        bounds: what a request may ask for.
    """

    def __init__(
        self,
        base: Base,
        store: AdapterStore,
        settings: EngineSettings,
        metrics: Metrics,
        tracer: Tracer | None = None,
    ) -> None:
        """
        Raises:
            UnsupportedBaseError: the base cannot be served.
            OutOfMemoryAtStartError: not even one request would fit.
        """
        self._metrics = metrics
        self._settings = settings
        self._condition = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._submitted = 0
        self._submitted_tokens = 0
        self._streams: WeakSet[RequestStream] = WeakSet()
        self._closed = False
        self.hangs = False
        self._draining = False
        self._stopping = False
        self._residents: tuple[Resident, ...] = ()
        self._tiers: Mapping[str, TierName] = {}
        self._changes_shown = 0
        self._core = EngineCore(base, store, settings, metrics, self._wake, tracer)
        self.progress = self._core.progress
        self.bounds = RequestBounds(settings, self._core.max_context_tokens, self._core.vocab_size)
        self.on_death: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run_thread, name="engine", daemon=True)

    # For the event loop and other threads

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()
        self._metrics.set_engine_up(True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of one step at most."""
        return self._core.max_batch_tokens

    def submit(self, request: Request) -> RequestStream:
        """Queues a request; call in a running event loop, where its stream will live.

        Raises:
            InvalidRequestError: the prompt is empty, too long, or holds an unknown token; or more answers are
                asked for than may run at once.
            QueueFullError, DrainingError, EngineDownError: it was not queued.
            DeadlineError: its deadline has passed already; whether a later one can be met is not certain.
        """
        prompt_tokens = len(request.prompt_token_ids)
        self.check_open(prompt_tokens)
        self.bounds.check_possible(request)
        stream = RequestStream(
            asyncio.get_running_loop(), lambda: self._post_if_open(cancel), answers=request.n
        )
        total = min(prompt_tokens + request.sampling.max_new_tokens, self.bounds.max_context_tokens)
        answers = generations_of(request, stream, self._core.decoder, total)

        def cancel() -> None:
            self._core.cancel(answers)

        with self._condition:
            self.check_open(prompt_tokens)
            self._post(lambda: self._enqueue(answers))
            self._submitted += request.n
            self._submitted_tokens += prompt_tokens
        self._streams.add(stream)
        return stream

    def check_open(self, prompt_tokens: int = 0) -> None:
        """Tells early, before work goes into a request, that it would not be queued now.

        Args:
            prompt_tokens: of the request; 0 while they are not known. A prompt that is longer than all that
                may wait is taken when nothing else waits.

        Raises:
            QueueFullError, DrainingError, EngineDownError
        """
        if self._closed:
            raise EngineDownError("the engine has stopped; the server is about to exit")
        if self._draining:
            raise DrainingError("the server is draining; send the request to another one")
        waiting, most = self._waiting, self._settings.max_waiting_requests
        if waiting >= most:
            raise self._full(waiting, f"{most} requests are waiting")
        tokens, most_tokens = (
            self._submitted_tokens + self._core.waiting_tokens,
            self._settings.max_waiting_tokens,
        )
        if most_tokens is not None and tokens and tokens + prompt_tokens > most_tokens:
            raise self._full(
                waiting, f"prompts of {tokens} tokens are waiting, and no more than {most_tokens} may"
            )

    async def load(self, digest: str, tier: TierName = "device") -> Whereabouts:
        """Brings an adapter to a tier now; returns where it is then, which may be a better one.

        Raises:
            AdapterError: it cannot be loaded, or there is no room while others are in use.
        """
        future: asyncio.Future[AdapterError | Whereabouts] = asyncio.get_running_loop().create_future()
        done = _setter(future)
        residency = self._core.residency
        self._post(
            lambda: self._core.load(
                digest, tier, lambda error: done(residency.whereabouts(digest) if error is None else error)
            )
        )
        outcome = await future
        if isinstance(outcome, AdapterError):
            raise outcome
        return outcome

    async def unload(self, digest: str, *, keep_on_host: bool = False) -> Whereabouts:
        """Takes an adapter off the device unless a request uses it; returns where it is then."""

        def leave() -> Whereabouts:
            residency = self._core.residency
            if keep_on_host:
                residency.demote(digest)
            else:
                residency.evict(digest)
            return residency.whereabouts(digest)

        return await self._call(leave)

    async def pin(self, digest: str, pinned: bool) -> None:
        """A pinned adapter does not leave its tier to make room for others."""
        await self._call(lambda: self._core.residency.pin(digest, pinned))

    async def forget(self, digest: str) -> None:
        """Returns when no request uses the adapter any more and its bytes have left device and host."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done = _setter(future)
        self._post(lambda: self._core.forget(digest, lambda: done(None)))
        await future

    def residency_of(self, digest: str) -> Whereabouts:
        """The tier it is in, as of the last step."""
        return self._tiers.get(digest, "disk")

    def tiers(self) -> Mapping[str, TierName]:
        """By digest, for every adapter that is not on disk alone, as of the last step."""
        return self._tiers

    def residents(self) -> tuple[Resident, ...]:
        """Adapters in memory, as of the last step."""
        return self._residents

    def awaited_adapters(self) -> set[str]:
        """Digests of adapters that are not on the device while requests wait for them; any thread."""
        on_device = {resident.digest for resident in self._residents if resident.tier == "device"}
        return self._core.scheduler.waiting.clients() - on_device - {""}

    def adapters_that_fit(self) -> int:
        """How many adapters as large as those on the device may be there at once; any thread.

        While there are none, as many as requests may run.
        """
        sizes = [resident.size_bytes for resident in self._residents if resident.tier == "device"]
        if not sizes:
            return self._settings.max_running_requests
        return self._core.residency.budgets.device_bytes * len(sizes) // sum(sizes)

    def stats(self) -> EngineStats:
        """A look at the engine as of now."""
        blocks, counters = self._core.scheduler.blocks, self._core.counters
        return EngineStats(
            running=len(self._core.scheduler.running),
            waiting=self._waiting,
            kv_tokens_total=blocks.total_tokens,
            kv_tokens_free=blocks.free_tokens,
            adapter_device_bytes_total=self._core.residency.budgets.device_bytes,
            adapter_device_bytes_used=self._bytes_in("device"),
            adapter_host_bytes_total=self._core.residency.budgets.host_bytes,
            adapter_host_bytes_used=self._bytes_in("host"),
            steps=counters.steps,
            mixed_steps=counters.mixed_steps,
            max_adapters_in_step=counters.max_adapters_in_step,
            tokens_computed=counters.tokens_computed,
        )

    def drain(self) -> None:
        """Refuses new requests from now on; those accepted go on."""
        self._draining = True

    async def stop(self, grace_s: float) -> None:
        """Drains, waits at most so long for requests to end, fails the rest, ends the thread."""
        self.drain()
        deadline_s = time.monotonic() + grace_s
        while self.alive and time.monotonic() < deadline_s:
            if self._core.is_empty and not self._submitted:
                break
            await asyncio.sleep(_STOP_POLL_S)
        if self.hangs:
            return
        self._stopping = True
        self._wake()
        await asyncio.to_thread(self._thread.join)
        self._core.residency.close()

    def abandon(self, *, hangs: bool) -> None:
        """Gives the thread up: ends every stream. For the event loop that the streams live in.

        Args:
            hangs: it may never end, so that nothing may wait for it either.
        """
        self.hangs = hangs
        self._closed = True  # without the lock: the thread may have it
        self._metrics.set_engine_up(False)
        for stream in list(self._streams):
            stream.put(Failed(EngineDownError("the engine stopped before the answer was complete")))

    # Between the threads

    @property
    def _waiting(self) -> int:
        return self._submitted + self._core.waiting

    def _full(self, waiting: int, why: str) -> QueueFullError:
        return QueueFullError(f"{why}; try again later", self._core.counters.drain.refuse(waiting))

    def _bytes_in(self, tier: TierName) -> int:
        return sum(resident.size_bytes for resident in self._residents if resident.tier == tier)

    def _enqueue(self, answers: list[Generation]) -> None:
        with self._condition:
            self._submitted -= len(answers)
            self._submitted_tokens -= answers[0].sequence.prompt_length
        self._core.add(answers)

    def _post(self, command: Callable[[], None]) -> None:
        with self._condition:
            if self._closed:
                raise EngineDownError("the engine has stopped; the server is about to exit")
            self._inbox.append(command)
            self._condition.notify()

    def _post_if_open(self, command: Callable[[], None]) -> None:
        try:
            self._post(command)
        except EngineDownError:
            log.debug("cancelled after the engine stopped, which ended every request")

    async def _call(self, function: Callable[[], T]) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        settle = _setter(future)
        self._post(lambda: settle(function()))
        return await future

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    # The thread

    def _run_thread(self) -> None:
        if self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        if (library := native()) is not None:
            library.spin_for(self._settings.spin_us)
        try:
            while not self._stopping:
                self.progress.mark()
                self._take_commands()
                worked = self._core.step()
                self._publish()
                if not worked:
                    self._sleep()
        except BaseException:
            log.exception("the engine died")
            try:
                self._close()
            finally:
                self.on_death()
        else:
            self._close()

    def _take_commands(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
            self.progress.mark()

    def _publish(self) -> None:
        """Sends the step's events, one wake-up per event loop, and shows the new state to other threads."""
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[RequestStream, TokenEvent]]]
        by_loop = defaultdict(list)
        for stream, event in self._core.take_events():
            by_loop[stream.loop].append((stream, event))
        for loop, events in by_loop.items():
            _call_in(loop, _put_all, events)
        self._show_residents()
        scheduler = self._core.scheduler
        self._metrics.set_engine_gauges(len(scheduler.running), self._waiting, scheduler.blocks.used_ratio)

    def _show_residents(self) -> None:
        residency = self._core.residency
        if residency.changes != self._changes_shown:
            self._changes_shown = residency.changes
            self._residents = tuple(residency.residents())
            self._tiers = {resident.digest: resident.tier for resident in self._residents}

    def _sleep(self) -> None:
        with self._condition:
            if not self._inbox and not self._stopping and not self._core.residency.has_news:
                self._condition.wait(_IDLE_WAIT_S)

    def _close(self) -> None:
        """Ends every request there is, and refuses what comes later."""
        with self._condition:
            self._closed = True
        self._metrics.set_engine_up(False)
        self._take_commands()
        self._core.fail_all(lambda: EngineDownError("the engine stopped before the answer was complete"))
        self._publish()


def _setter(future: "asyncio.Future[T]") -> Callable[[T], None]:
    """Sets a future's result from any thread."""
    loop = future.get_loop()
    return lambda result: _call_in(loop, lambda: None if future.done() else future.set_result(result))


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        log.debug("the event loop closed before the engine could answer")


def _put_all(events: list[tuple[RequestStream, TokenEvent]]) -> None:
    for stream, event in events:
        stream.put(event)
