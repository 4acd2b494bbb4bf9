"""The client for asyncio: asking the model, and the server itself. Mirrors client.py method by method."""

from collections.abc import AsyncIterator
from functools import cached_property
from types import TracebackType
from typing import Unpack

from grpc_health.v1 import health_pb2, health_pb2_grpc

from quickchange import answers, requests
from quickchange.aio_adapters import AsyncAdapterClient
from quickchange.aio_calls import AsyncCalls, AsyncResponseStream
from quickchange.connection import Endpoint
from quickchange.requests import GenerateOptions, Prompt
from quickchange.server_facts import ServerInfo
from quickchange.tls import Credentials
from quickchange.types import Completion, Delta, Model, StreamEvent, Tokenization
from quickchange.v1 import inference_pb2, inference_pb2_grpc, server_pb2, server_pb2_grpc


class AsyncClient:
    """A connection to one server, for one event loop. Use with `async with`, or `close` it.

    Args:
        target: HOST:PORT; without it $QUICKCHANGE_SERVER, else 127.0.0.1:50051.
        token: bearer token; without it $QUICKCHANGE_TOKEN.
        credentials: for TLS, from `quickchange.tls_credentials`; without it what $QUICKCHANGE_TLS,
            $QUICKCHANGE_SERVER_CA, $QUICKCHANGE_CLIENT_CERT and $QUICKCHANGE_CLIENT_KEY ask for, else
            plain text; `quickchange.PlainText()` is plain text whatever these say.
        server_name: whose certificate is to be shown, where that is not the host of the target: through a
            tunnel, or from the same machine; without it $QUICKCHANGE_SERVER_NAME, else the target's host.
        timeout_s: of each call, its retries included; None waits for ever.
        retry_window_s: how long calls that are safe to repeat are repeated while nobody answers.

    Every method raises a QuickchangeError. Whatever only reads is repeated while the server is unavailable;
    `generate` and `stream` only if the request never left this process.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        credentials: Credentials = None,
        server_name: str | None = None,
        timeout_s: float | None = 600.0,
        retry_window_s: float = 5.0,
    ) -> None:
        self._endpoint = Endpoint.resolve(
            target, token, credentials, timeout_s, retry_window_s, server_name=server_name
        )
        self._calls = AsyncCalls(self._endpoint)
        self.adapters = AsyncAdapterClient(self._calls)

    @cached_property
    def _inference(self) -> "inference_pb2_grpc.InferenceServiceAsyncStub":
        return inference_pb2_grpc.InferenceServiceStub(self._calls.channel)

    @cached_property
    def _server(self) -> "server_pb2_grpc.ServerServiceAsyncStub":
        return server_pb2_grpc.ServerServiceStub(self._calls.channel)

    @cached_property
    def _health(self) -> health_pb2_grpc.HealthStub:
        return health_pb2_grpc.HealthStub(self._calls.channel)

    @property
    def target(self) -> str:
        """The address in use."""
        return self._endpoint.target

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and every call that is still open."""
        await self._calls.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        retries: int = 0,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """The whole answer to a prompt; `quickchange.GenerateOptions` lists the options.

        Args:
            prompt: text, token ids, or messages such as [{"role": "user", "content": "Hello"}].
            retries: how often to come back when the server is full, after the time it asks for.
        """
        response = await self._calls.unary(
            self._inference.Generate,
            requests.generate_request(prompt, options),
            self._endpoint.attempts(repeatable=False, timeout_s=timeout_s, retries=retries),
        )
        return answers.completion(response)

    async def generate_many(
        self,
        prompt: Prompt,
        n: int,
        *,
        retries: int = 0,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> tuple[Completion, ...]:
        """n answers to one prompt, which is computed once; takes what `generate` takes.

        They differ only where tokens are drawn: give a temperature.
        """
        response = await self._calls.unary(
            self._inference.Generate,
            requests.generate_request(prompt, options, n=n),
            self._endpoint.attempts(repeatable=False, timeout_s=timeout_s, retries=retries),
        )
        return answers.completions(response)

    def stream(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        retries: int = 0,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> "AsyncGenerationStream":
        """The answer as it is produced; takes what `generate` takes. Events tell n answers by `index`."""
        wanted = requests.generate_request(prompt, options, n=n)
        request = inference_pb2.GenerateStreamRequest(request=wanted)
        attempts = self._endpoint.attempts(repeatable=False, timeout_s=timeout_s, retries=retries)
        return AsyncGenerationStream(
            self._calls.server_stream(self._inference.GenerateStream, request, attempts)
        )

    async def tokenize(self, prompt: Prompt, *, adapter: str = "") -> Tokenization:
        """What the model would see of a prompt, chat template included."""
        response = await self._calls.unary(
            self._inference.Tokenize, requests.tokenize_request(prompt, adapter)
        )
        return answers.tokenization(response)

    async def models(self) -> tuple[Model, ...]:
        """The base, and every adapter that a request may name."""
        response = await self._calls.unary(self._inference.ListModels, inference_pb2.ListModelsRequest())
        return answers.models(response)

    async def server_info(self) -> ServerInfo:
        """What serves, and how full it is."""
        response = await self._calls.unary(self._server.GetServerInfo, server_pb2.GetServerInfoRequest())
        return answers.server_info(response)

    async def is_serving(self) -> bool:
        """Whether the server takes requests: not while it starts or drains."""
        check = self._health.Check  # type: ignore[attr-defined]  # its types leave the methods out
        response = await self._calls.unary(check, health_pb2.HealthCheckRequest())
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> int:
        """Lets the server admit nothing new, finish what runs, and exit. Returns how many requests run."""
        response = await self._calls.unary(
            self._server.Drain, server_pb2.DrainRequest(), self._endpoint.attempts(repeatable=False)
        )
        return response.requests_running

    async def wait_ready(self, timeout_s: float = 60.0) -> ServerInfo:
        """Waits until the server answers.

        Raises:
            DeadlineExceededError: it did not within timeout_s.
        """
        with self._endpoint.waiting(timeout_s) as attempts:
            response = await self._calls.unary(
                self._server.GetServerInfo, server_pb2.GetServerInfoRequest(), attempts, wait_for_ready=True
            )
        return answers.server_info(response)


class AsyncGenerationStream:
    """The events of one request; closing it, or leaving its `with` block, cancels what is not finished.

    Iterate it for events (Started, then Delta… and Finished of each answer), or `text()` for the text alone.
    """

    def __init__(self, responses: AsyncResponseStream[inference_pb2.GenerateStreamResponse]) -> None:
        self._responses = responses
        self._builder = answers.CompletionBuilder()

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return self

    async def __anext__(self) -> StreamEvent:
        while True:
            event = answers.stream_event(await anext(self._responses))
            if event is not None:
                self._builder.add(event)
                return event

    async def text(self) -> AsyncIterator[str]:
        """Pieces of the first answer's text as they come."""
        async for event in self:
            if isinstance(event, Delta) and event.index == 0 and event.text:
                yield event.text

    async def result(self) -> Completion:
        """The whole first answer; reads what has not been read yet."""
        return (await self.results())[0]

    async def results(self) -> tuple[Completion, ...]:
        """Every answer, whole; reads what has not been read yet."""
        async for _ in self:
            pass
        return self._builder.build_all()

    async def close(self) -> None:
        """Cancels the request if it still runs; safe to call from another task, and more than once."""
        self._responses.close()

    async def __aenter__(self) -> "AsyncGenerationStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
