"""The blocking client: asking the model, and the server itself. Knows nothing of the command line."""

from collections.abc import Iterator
from types import TracebackType
from typing import Unpack

from grpc_health.v1 import health_pb2, health_pb2_grpc

from quickchange import answers, requests
from quickchange.adapter_client import AdapterClient
from quickchange.calls import Calls, ResponseStream
from quickchange.connection import Endpoint
from quickchange.requests import GenerateOptions, Prompt
from quickchange.server_facts import ServerInfo
from quickchange.tls import Credentials
from quickchange.types import Completion, Delta, Model, StreamEvent, Tokenization
from quickchange.v1 import inference_pb2, inference_pb2_grpc, server_pb2, server_pb2_grpc


class Client:
    """A connection to one server; safe to share between threads. Use as a context manager, or `close` it.

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
        self._calls = Calls(self._endpoint)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._calls.channel)
        self._server = server_pb2_grpc.ServerServiceStub(self._calls.channel)
        self._health = health_pb2_grpc.HealthStub(self._calls.channel)
        self.adapters = AdapterClient(self._calls)

    @property
    def target(self) -> str:
        """The address in use."""
        return self._endpoint.target

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and every call that is still open."""
        self._calls.close()

    def generate(
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
        response = self._calls.unary(
            self._inference.Generate,
            requests.generate_request(prompt, options),
            self._endpoint.attempts(repeatable=False, timeout_s=timeout_s, retries=retries),
        )
        return answers.completion(response)

    def generate_many(
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
        response = self._calls.unary(
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
    ) -> "GenerationStream":
        """The answer as it is produced; takes what `generate` takes. Events tell n answers by `index`."""
        wanted = requests.generate_request(prompt, options, n=n)
        request = inference_pb2.GenerateStreamRequest(request=wanted)
        attempts = self._endpoint.attempts(repeatable=False, timeout_s=timeout_s, retries=retries)
        return GenerationStream(self._calls.server_stream(self._inference.GenerateStream, request, attempts))

    def tokenize(self, prompt: Prompt, *, adapter: str = "") -> Tokenization:
        """What the model would see of a prompt, chat template included."""
        response = self._calls.unary(self._inference.Tokenize, requests.tokenize_request(prompt, adapter))
        return answers.tokenization(response)

    def models(self) -> tuple[Model, ...]:
        """The base, and every adapter that a request may name."""
        response = self._calls.unary(self._inference.ListModels, inference_pb2.ListModelsRequest())
        return answers.models(response)

    def server_info(self) -> ServerInfo:
        """What serves, and how full it is."""
        response = self._calls.unary(self._server.GetServerInfo, server_pb2.GetServerInfoRequest())
        return answers.server_info(response)

    def is_serving(self) -> bool:
        """Whether the server takes requests: not while it starts or drains."""
        check = self._health.Check  # type: ignore[attr-defined]  # its types leave the methods out
        response = self._calls.unary(check, health_pb2.HealthCheckRequest())
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def drain(self) -> int:
        """Lets the server admit nothing new, finish what runs, and exit. Returns how many requests run."""
        response = self._calls.unary(
            self._server.Drain, server_pb2.DrainRequest(), self._endpoint.attempts(repeatable=False)
        )
        return response.requests_running

    def wait_ready(self, timeout_s: float = 60.0) -> ServerInfo:
        """Waits until the server answers.

        Raises:
            DeadlineExceededError: it did not within timeout_s.
        """
        with self._endpoint.waiting(timeout_s) as attempts:
            response = self._calls.unary(
                self._server.GetServerInfo, server_pb2.GetServerInfoRequest(), attempts, wait_for_ready=True
            )
        return answers.server_info(response)


class GenerationStream:
    """The events of one request; closing it, or leaving its `with` block, cancels what is not finished.

    Iterate it for events (Started, then Delta… and Finished of each answer), or `text()` for the text alone.
    """

    def __init__(self, responses: ResponseStream[inference_pb2.GenerateStreamResponse]) -> None:
        self._responses = responses
        self._builder = answers.CompletionBuilder()

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        while True:
            event = answers.stream_event(next(self._responses))
            if event is not None:
                self._builder.add(event)
                return event

    def text(self) -> Iterator[str]:
        """Pieces of the first answer's text as they come."""
        for event in self:
            if isinstance(event, Delta) and event.index == 0 and event.text:
                yield event.text

    def result(self) -> Completion:
        """The whole first answer; reads what has not been read yet."""
        return self.results()[0]

    def results(self) -> tuple[Completion, ...]:
        """Every answer, whole; reads what has not been read yet."""
        for _ in self:
            pass
        return self._builder.build_all()

    def close(self) -> None:
        """Cancels the request if it still runs; safe to call from another thread, and more than once."""
        self._responses.close()

    def __enter__(self) -> "GenerationStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
