"""quickchange.v1.InferenceService: a call becomes a Request, its events become messages. Knows no torch."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc.aio

from adapters.facts import AdapterRecord
from adapters.leases import Lease
from adapters.rows import Entry
from quickchange.v1 import inference_pb2, inference_pb2_grpc
from server.chat import ChatMessage, EncodedPrompt, PromptEncoder
from server.engine import Engine
from server.errors import InvalidRequestError, RequestFailedError
from server.merged import Answerer, answerer_of
from server.metrics import Metrics
from server.rates import Allowance
from server.request import (
    AdapterIdentity,
    Delta,
    Failed,
    Finished,
    Request,
    Started,
    TokenEvent,
)
from server.services import convert
from server.services.catalogue import Catalogue
from server.services.interceptors import caller
from server.services.statuses import reason_of
from server.services.workers import Workers
from server.stream import RequestStream

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Prompt = inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest


@dataclass(frozen=True, slots=True)
class _Call:
    """A request that the engine has taken."""

    request_id: str
    identity: AdapterIdentity | None
    echo: str
    answers: int
    stream: RequestStream
    lease: Lease | None
    """On the adapter's files; None for the base."""
    allowance: Allowance

    def count(self, event: TokenEvent) -> None:
        """Counts against the caller's tokens what an event tells."""
        match event:
            case Started():
                self.allowance.use(event.prompt_tokens)
            case Delta():
                self.allowance.use(len(event.token_ids))

    def close(self) -> None:
        """Ends it if it still runs, and lets go of the adapter and of the tokens that it did not use."""
        self.stream.cancel()
        self.allowance.close()
        if self.lease is not None:
            self.lease.release()


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Generation and what belongs to it."""

    def __init__(
        self, engine: Engine, catalogue: Catalogue, prompts: PromptEncoder, metrics: Metrics, workers: Workers
    ) -> None:
        self._engine = engine
        self._catalogue = catalogue
        self._prompts = prompts
        self._metrics = metrics
        self._workers = workers

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        call = await self._submit(request, context)
        try:
            return await _collect(call)
        finally:
            call.close()

    async def GenerateStream(  # type: ignore[override]  # writes to the context, see StatusInterceptor
        self, request: inference_pb2.GenerateStreamRequest, context: Context
    ) -> None:
        call = await self._submit(request.request, context)
        try:
            async for event in call.stream:
                call.count(event)
                for message in _messages_of(event, call):
                    await context.write(message)
        finally:
            call.close()

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        async with self._catalogue.answering(request.adapter, tenant=caller().tenant) as record:
            prompt = await self._encode(request, self._answerer(record), record, with_text=True)
        return inference_pb2.TokenizeResponse(token_ids=prompt.token_ids, text=prompt.text)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        merged = self._catalogue.merged
        base = inference_pb2.Model(is_base=True)
        if merged is not None:
            base.adapter.CopyFrom(convert.resolved(merged.identity))
        models = [base]
        models += [_model_of(entry) for entry in await self._catalogue.ready(tenant=caller().tenant)]
        return inference_pb2.ListModelsResponse(models=models)

    async def _submit(self, request: inference_pb2.GenerateRequest, context: Context) -> _Call:
        """The request, once the engine has it: nothing to release before that, no wait after it."""
        known = caller()
        try:
            self._engine.check_open()
            request_id = convert.request_id_of(request)
            async with self._catalogue.answering(request.adapter, tenant=known.tenant) as record:
                answerer = self._answerer(record)
                answerer.check_scale(request.adapter_scale if request.HasField("adapter_scale") else 1.0)
                prompt = await self._encode(request, answerer, record, with_text=request.output.echo)
                identity = answerer.identity
                room_tokens = self._engine.bounds.room_for_answer(len(prompt.token_ids))
                wanted = convert.request_of(
                    request,
                    request_id,
                    prompt.token_ids,
                    answerer,
                    room_tokens=room_tokens,
                    deadline_s=_deadline_of(context),
                    traceparent=_traceparent_of(context),
                    tenant=known.tenant,
                )
                self._engine.bounds.check_allowed(wanted)
                allowance = known.rates.reserve_tokens(len(prompt.token_ids), _longest(wanted, room_tokens))
                with allowance.kept_if_all_is_well():
                    stream = self._engine.submit(wanted)
                lease = self._catalogue.keep(record) if record else None
        except Exception as error:
            self._metrics.count_rejected(reason_of(error))
            raise
        log.info(
            "request queued request_id=%s adapter=%s prompt_tokens=%d",
            request_id,
            identity.digest if identity else "base",
            len(prompt.token_ids),
        )
        answers = request.sampling.n if request.sampling.HasField("n") else 1
        echo = prompt.text if request.output.echo else ""
        return _Call(request_id, identity, echo, answers, stream, lease, allowance)

    def _answerer(self, record: AdapterRecord | None) -> Answerer:
        return answerer_of(convert.identity_of(record), self._catalogue.merged)

    async def _encode(
        self, request: Prompt, answerer: Answerer, record: AdapterRecord | None, *, with_text: bool
    ) -> EncodedPrompt:
        match request.WhichOneof("prompt"):
            case "text":
                return await self._prompts.text(request.text)
            case "token_ids":
                assert isinstance(request, inference_pb2.GenerateRequest)
                return await self._prompts.token_ids(request.token_ids.ids, with_text=with_text)
            case "chat":
                messages = [ChatMessage(m.role, m.content) for m in request.chat.messages]
                template = None  # of what is merged, the base has it
                if record is not None and answerer.applied is not None:
                    template = await self._catalogue.chat_template_of(record)
                return await self._prompts.chat(messages, template)
            case _:
                raise InvalidRequestError("prompt", "is missing; send text, token_ids or chat")


def _longest(request: Request, room_tokens: int) -> int:
    """The most tokens that all answers can have: each ends where the context does."""
    return request.n * max(0, min(request.sampling.max_new_tokens, room_tokens))


def _deadline_of(context: Context) -> float | None:
    remaining_s: float | None = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


def _traceparent_of(context: Context) -> str:
    """The caller's span; empty if it names none."""
    values = (value for key, value in context.invocation_metadata() or () if key == "traceparent")
    return str(next(values, ""))


async def _collect(call: _Call) -> inference_pb2.GenerateResponse:
    texts = [[call.echo] for _ in range(call.answers)]
    response = inference_pb2.GenerateResponse(
        request_id=call.request_id,
        adapter=convert.resolved(call.identity),
        completions=[inference_pb2.Completion(index=index) for index in range(call.answers)],
    )
    ends: list[Finished] = []
    async for event in call.stream:
        call.count(event)
        match event:
            case Delta():
                texts[event.index].append(event.text)
                completion = response.completions[event.index]
                completion.token_ids.extend(event.token_ids)
                completion.logprobs.extend(convert.logprobs(event.logprobs))
            case Finished():
                _log_end(call, event)
                ends.append(event)
                completion = response.completions[event.index]
                completion.text = "".join(texts[event.index])
                completion.finish_reason = convert.finish_reason(event)
                completion.usage.CopyFrom(convert.usage(event))
                completion.timings.CopyFrom(convert.timings(event.timings))
            case Failed():
                raise event.error
    if len(ends) != call.answers:
        raise RequestFailedError("the stream ended without a last event")
    response.usage.CopyFrom(convert.total_usage(ends))
    response.timings.CopyFrom(convert.total_timings(ends))
    return response


def _messages_of(event: TokenEvent, call: _Call) -> Iterator[inference_pb2.GenerateStreamResponse]:
    match event:
        case Started():
            started = convert.started(event, call.request_id, call.identity)
            yield inference_pb2.GenerateStreamResponse(started=started)
            for index in range(call.answers if call.echo else 0):
                yield inference_pb2.GenerateStreamResponse(
                    delta=inference_pb2.Delta(index=index, text=call.echo)
                )
        case Delta():
            yield inference_pb2.GenerateStreamResponse(delta=convert.delta(event))
        case Finished():
            _log_end(call, event)
            yield inference_pb2.GenerateStreamResponse(finished=convert.finished(event))
        case Failed():
            raise event.error


def _log_end(call: _Call, event: Finished) -> None:
    log.info(
        "request finished request_id=%s answer=%d adapter=%s reason=%s tokens=%d cached=%d seconds=%.3f",
        call.request_id,
        event.index,
        call.identity.digest if call.identity else "base",
        event.reason.value,
        event.completion_tokens,
        event.cached_tokens,
        event.timings.total_s,
    )


def _model_of(entry: Entry) -> inference_pb2.Model:
    return inference_pb2.Model(
        reference=entry.reference,
        adapter=convert.resolved(AdapterIdentity(entry.name, entry.version, entry.digest)),
        description=entry.description,
    )
