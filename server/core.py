"""The engine's work, one step at a time, in whichever thread calls it. Knows neither threads nor grpc."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from adapters.base import Base
from adapters.errors import AdapterError, CapacityError
from adapters.memory import is_out_of_memory
from adapters.residency import AdapterResidency
from adapters.store import AdapterStore
from adapters.tier import TierName
from kernels.library import status as native_status
from server.batch import Batch, Row
from server.blocks import BlockPool
from server.config import EngineSettings
from server.errors import DeadlineError, RequestFailedError, RequestMemoryError, ServerError, load_error_of
from server.generation import Generation
from server.memory import plan_memory
from server.metrics import Metrics
from server.request import Failed, Finished, FinishReason, Started, TokenEvent
from server.runner import ModelRunner
from server.sampler import Choice, SampleRow, Scores, sample
from server.scheduler import Scheduler
from server.sequence import Phase, Sequence
from server.statistics import StepCounters
from server.stream import RequestStream
from server.text import decoder_of
from server.tracing import Tracer
from server.watchdog import Progress

log = logging.getLogger(__name__)

_BARREN_STEPS = 4
"""So many steps in a row without one surviving row mean that the device, not a request, is broken."""

Settle = Callable[[AdapterError | None], None]


class EngineCore:
    """Base, caches, adapters and unfinished requests. Every request that enters leaves with a last event."""

    def __init__(
        self,
        base: Base,
        store: AdapterStore,
        settings: EngineSettings,
        metrics: Metrics,
        wake: Callable[[], None],
        tracer: Tracer | None = None,
    ) -> None:
        """
        Args:
            wake: called from another thread when `step` has something to do again.

        Raises:
            UnsupportedBaseError: the base cannot be served.
            OutOfMemoryAtStartError: not even one request would fit.
        """
        self.vocab_size = base.vocab_size
        self.decoder = decoder_of(base.tokenizer)
        self.counters = StepCounters()
        self.progress = Progress()
        self.max_batch_tokens = settings.batch_tokens_on(base.device.type)
        self._metrics, self._tracer = metrics, tracer
        self._eos_token_ids = base.eos_token_ids
        self.runner = ModelRunner(
            base,
            fuse_layers=settings.fused_layers == "auto",
            screen_head=settings.screened_head == "auto",
        )
        context = min(base.max_context_tokens, settings.max_context_tokens or base.max_context_tokens)
        budgets = plan_memory(
            settings,
            kv_bytes_per_token=self.runner.kv_bytes_per_token,
            max_context_tokens=context,
            device=base.device,
        )
        self.runner.allocate_cache(budgets.block_count, budgets.block_tokens)
        log.info(
            "kernels=%s matmul_precision=%s fused_layers=%d storage=%s",
            native_status().reason if base.kernels == "native" else "torch",
            base.matmul_precision,
            self.runner.fused_layers,
            base.storage_dtype,
        )
        self.residency = AdapterResidency(
            store,
            base.layout,
            self.runner.slots,
            device=base.device,
            dtype=base.storage_dtype,
            budgets=budgets.adapters,
            eviction=settings.adapter_eviction,
            wake=wake,
            on_eviction=metrics.count_eviction,
        )
        self.scheduler = Scheduler(
            BlockPool(budgets.block_count, budgets.block_tokens),
            self.residency,
            max_running=settings.max_running_requests,
            max_batch_tokens=self.max_batch_tokens,
            prefill_chunk_tokens=settings.prefill_chunk_tokens or self.max_batch_tokens,
            priority_aging_s=settings.priority_aging_s,
            prefix_cache=settings.prefix_cache == "on",
        )
        self.max_context_tokens = min(context, self.scheduler.blocks.total_tokens)
        self._generations: dict[Sequence, Generation] = {}
        self._held = 0
        self._events: list[tuple[RequestStream, TokenEvent]] = []
        self._hints: defaultdict[str, list[tuple[TierName, Settle]]] = defaultdict(list)
        self._forgetting: defaultdict[str, list[Callable[[], None]]] = defaultdict(list)
        self._barren_steps = 0

    @property
    def is_empty(self) -> bool:
        """Whether every request has ended."""
        return not self._generations

    @property
    def waiting(self) -> int:
        """Answers that nothing was computed for yet."""
        return len(self.scheduler.waiting) + self._held

    @property
    def waiting_tokens(self) -> int:
        """Of what waits; answers that are held until the first of their request began count as nothing."""
        return self.scheduler.waiting.tokens

    def add(self, answers: Items[Generation]) -> None:
        """Queues a request. Its first answer goes ahead; the others find the prompt in the prefix cache."""
        self.counters.drain.busy()
        self._generations.update((answer.sequence, answer) for answer in answers)
        self._held += len(answers) - 1
        if self._tracer is not None:
            first = answers[0]
            first.trace = self._tracer.begin(
                "generate", first.request.traceparent, first.sequence.submitted_s
            )
        self.scheduler.add(answers[0].sequence)

    def cancel(self, answers: Items[Generation]) -> None:
        """Ends a request now, wherever it is; harmless after its end."""
        for answer in answers:
            if answer.sequence.phase is not Phase.FINISHED:
                self._emit(answer, answer.finished(FinishReason.CANCELLED))

    def fail_all(self, make_error: Callable[[], ServerError]) -> None:
        """Ends every request with an error."""
        while self._generations:
            self._fail(next(iter(self._generations)), make_error())

    def take_events(self) -> list[tuple[RequestStream, TokenEvent]]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def load(self, digest: str, tier: TierName, settle: Settle) -> None:
        """Brings an adapter to a tier, or leaves it in a better one; `settle` gets None or why not."""
        try:
            if tier == "device":
                self.residency.prefetch(digest)
            else:
                self.residency.prefetch_to_host(digest)
        except AdapterError as error:
            settle(error)
            return
        if self.residency.whereabouts(digest) in ("device", tier):
            settle(None)
        elif self.residency.is_loading(digest):
            self._hints[digest].append((tier, settle))
        else:
            settle(CapacityError(f"no room on the {tier} for {digest} while the others there are in use"))

    def forget(self, digest: str, done: Callable[[], None]) -> None:
        """Calls `done` when no request uses the adapter any more and its bytes have left the device."""
        self._forgetting[digest].append(done)

    def step(self) -> bool:
        """One forward pass and what belongs around it; False if there was nothing to compute."""
        began_s = time.monotonic()
        self._settle_loads()
        self._drop_expired(began_s)
        planned = self.scheduler.next_batch(began_s)
        if planned is not None:
            with self.progress.computing(planned.token_count):
                batch, scores = self._forward(planned)
                self.scheduler.commit(batch)
                self._advance(batch, scores)
            self._count(planned, time.monotonic() - began_s)
        elif self.is_empty:
            self.counters.drain.idle()
        self._forget_unused()
        return planned is not None

    def _forward(self, batch: Batch) -> tuple[Batch, Scores]:
        """The rows that could be computed, and what was found.

        If the pass fails, its rows run one by one, and one that fails even alone ends its own request only.
        """
        try:
            scores = self.runner.scores(batch)
        except Exception:
            log.exception("a step failed; its %d rows run again one by one", len(batch.rows))
        else:
            self._barren_steps = 0
            return batch, scores
        self.runner.free_spare_memory()
        results = [(row, self._forward_alone(row)) for row in batch.rows]
        # A row that was computed may have gone since then, with another answer of its request.
        survivors = [
            (row, logits_SV)
            for row, logits_SV in results
            if isinstance(logits_SV, Tensor) and row.sequence.phase is not Phase.FINISHED
        ]
        broken = any(type(result) is RequestFailedError for _, result in results)  # not for want of memory
        self._barren_steps = self._barren_steps + 1 if broken and not survivors else 0
        if self._barren_steps >= _BARREN_STEPS:
            raise RuntimeError(f"{self._barren_steps} steps in a row failed for every request")
        logits = [torch.empty(0, self.vocab_size), *(logits_SV for _, logits_SV in survivors)]
        return Batch(tuple(row for row, _ in survivors)), Scores.of(torch.cat(logits))

    def _forward_alone(self, row: Row) -> Tensor | RequestFailedError | None:
        """A row's logits, or with what its request has failed; None if that had ended before."""
        if row.sequence.phase is Phase.FINISHED:
            return None
        self.progress.mark()
        try:
            return self.runner.run(Batch((row,))).cpu()
        except Exception as error:
            log.exception("request failed request_id=%s", row.sequence.request.request_id)
            failure = _failure_of(error)
        self._fail(row.sequence, failure)
        return failure

    def _advance(self, batch: Batch, scores: Scores) -> None:
        places = [(self._generations[row.sequence], at) for row in batch.rows for at in range(row.samples)]
        choices = self._choose(scores, [generation.sample_row(at) for generation, at in places])
        for (generation, _), choice in zip(places, choices, strict=True):
            if generation.sequence.phase is Phase.FINISHED:
                continue  # a sibling in the same step failed, and the request with it
            if isinstance(choice, RequestFailedError):
                self._fail(generation.sequence, choice)
                continue
            if choice.token_id is None:
                self._fail(generation.sequence, RequestFailedError("the logits were not finite"))
                continue
            self.scheduler.accepted(generation.sequence)
            gap_s, events = generation.accept(choice, self._eos_token_ids)
            if gap_s is not None:
                self._metrics.observe_inter_token(gap_s)
            for event in events:
                self._emit(generation, event)

    def _choose(self, scores: Scores, rows: list[SampleRow]) -> list[Choice | RequestFailedError]:
        """Every row's next token; where memory is short they are chosen one by one."""
        try:
            return list(sample(scores, rows))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.exception("no memory to choose %d tokens at once", len(rows))
        self.runner.free_spare_memory()
        return [self._choose_alone(scores.of_row(index), row) for index, row in enumerate(rows)]

    def _choose_alone(self, scores: Scores, row: SampleRow) -> Choice | RequestFailedError:
        try:
            return sample(scores, [row])[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return _failure_of(error)

    def _emit(self, generation: Generation, event: TokenEvent) -> None:
        self._events.append((generation.stream, event))
        if isinstance(event, Started):
            trace_id = generation.trace.sampled_id if generation.trace else None
            self._metrics.observe_queue(event.queue_s, trace_id)
            self._metrics.observe_first_token(generation.duration_s, trace_id)
            self._metrics.count_prefix_cache(event.prompt_tokens, event.cached_tokens)
            self._let_siblings_in(generation)
        elif isinstance(event, Finished):
            code = "CANCELLED" if event.reason is FinishReason.CANCELLED else "OK"
            self._retire(generation, complete=code == "OK")
            self._count_request(generation, event.reason.value, code)

    def _let_siblings_in(self, first: Generation) -> None:
        for sibling in first.siblings[1:]:
            self._held -= 1
            self.scheduler.add(sibling.sequence)

    def _fail(self, sequence: Sequence, error: ServerError) -> None:
        """Ends the whole request that a sequence belongs to."""
        generation = self._generations[sequence]
        self._events.append((generation.stream, Failed(error)))
        for sibling in generation.siblings:
            if sibling.sequence.phase is not Phase.FINISHED:
                self._retire(sibling, complete=False, spoiled=isinstance(error, RequestFailedError))
        self._count_request(generation, "failed", error.code)

    def _retire(self, generation: Generation, *, complete: bool, spoiled: bool = False) -> None:
        """
        Args:
            complete: its last position was seen to be finite.
            spoiled: some position was not, or was not computed.
        """
        sequence = generation.sequence
        self._held -= sequence.phase is Phase.NEW
        emptied = self.scheduler.finish(sequence, spoiled=spoiled)
        if not complete:  # it may have written anything
            self.runner.scrub(emptied)
        del self._generations[sequence]

    def _count_request(self, generation: Generation, reason: str, code: str) -> None:
        """Reports a request's end, once its last answer has ended."""
        if any(sibling.sequence in self._generations for sibling in generation.siblings):
            return
        self.counters.drain.count()
        request = generation.request
        generated = sum(sibling.sequence.output_length for sibling in generation.siblings)
        first = generation.siblings[0]
        if first.trace is not None:
            first.end_trace(reason, code, generated)
        self._metrics.observe_finished(
            reason,
            code,
            generation.duration_s,
            generation.sequence.prompt_length,
            generated,
            request.answers_as.name if request.answers_as else "",
            first.trace.sampled_id if first.trace else None,
        )

    def _settle_loads(self) -> None:
        for outcome in self.residency.collect():
            result = "error" if outcome.error else "ok"
            self._metrics.observe_adapter_load(outcome.source, result, outcome.seconds)
            for tier, settle in self._hints.pop(outcome.digest, []):
                if outcome.error is not None:
                    settle(outcome.error)
                else:
                    self.load(outcome.digest, tier, settle)  # it may be half way
            if outcome.error is not None and outcome.tier == "device":
                for sequence in self.scheduler.waiting_for(outcome.digest):
                    if sequence.phase is not Phase.FINISHED:  # not with a sibling already
                        self._fail(sequence, load_error_of(outcome.error))

    def _drop_expired(self, now_s: float) -> None:
        for sequence in self.scheduler.unfinished():
            if sequence.phase is not Phase.FINISHED and sequence.expired(now_s):
                self._fail(sequence, DeadlineError("the deadline passed before the answer was complete"))

    def _forget_unused(self) -> None:
        for digest in list(self._forgetting):
            used = any(sequence.digest == digest for sequence in self._generations)
            if not used and self.residency.evict(digest):
                self.runner.scrub(self.scheduler.blocks.forget_adapter(digest))
                for done in self._forgetting.pop(digest):
                    done()

    def _count(self, batch: Batch, seconds: float) -> None:
        self.counters.count(batch)
        self._metrics.observe_step(batch.phase, seconds, len(batch.rows), batch.adapter_count)
        self._metrics.count_preemptions(self.scheduler.preemptions)


def _failure_of(error: Exception) -> RequestFailedError:
    """What the client is told of a forward pass that failed for its request alone."""
    if is_out_of_memory(error):
        return RequestMemoryError(
            "there was not enough memory for the request; send a shorter prompt, or start the server with a "
            "lower --max-batch-tokens, --kv-bytes or --adapter-device-bytes"
        )
    return RequestFailedError(f"the forward pass failed: {type(error).__name__}")
