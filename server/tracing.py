"""Spans of requests, sent where an OpenTelemetry collector listens. Knows neither grpc nor the engine.

Without an endpoint there is no tracer, and nothing of OpenTelemetry is imported. No span holds a prompt or an
answer.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from server.config import TelemetrySettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_TRACEPARENT = "traceparent"


class TracingError(Exception):
    """Tracing was asked for and cannot begin; the message says what to do."""


class Interval(NamedTuple):
    """A part of a request's life, on time.monotonic()."""

    name: str
    began_s: float
    ended_s: float


class RequestTrace:
    """The span of one request, from its submission on; what it consisted of is added when it has ended."""

    def __init__(self, tracer: "Tracer", span: "Span", wall_ns: int) -> None:
        self._tracer, self._span, self._wall_ns = tracer, span, wall_ns

    @property
    def sampled_id(self) -> str | None:
        """The trace's id, in hexadecimal; None if nobody will see it."""
        context = self._span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else None

    def end(
        self, parts: Sequence[Interval], attributes: Mapping[str, str | int], error_code: str | None
    ) -> None:
        """The request ended now.

        Args:
            error_code: name of the status it failed with; None if it did not.
        """
        from opentelemetry.trace import Status, StatusCode

        for part in parts:
            self._tracer.record(self._span, part, self._wall_ns)
        self._span.set_attributes(dict(attributes))
        if error_code is not None:
            self._span.set_status(Status(StatusCode.ERROR, error_code))
        self._span.end(self._wall_ns + time.monotonic_ns())


class Tracer:
    """Begins spans; one thread at a time."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("quickchange")

    def begin(self, name: str, traceparent: str, began_s: float) -> RequestTrace:
        """
        Args:
            traceparent: the caller's span as W3C writes it; empty, or not to be understood: there is none.
            began_s: on time.monotonic().
        """
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        wall_ns = time.time_ns() - time.monotonic_ns()
        parent = TraceContextTextMapPropagator().extract({_TRACEPARENT: traceparent})
        span = self._tracer.start_span(name, context=parent, start_time=wall_ns + _ns(began_s))
        return RequestTrace(self, span, wall_ns)

    def record(self, parent: "Span", part: Interval, wall_ns: int) -> None:
        """A span that has ended, inside another."""
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(
            part.name, context=set_span_in_context(parent), start_time=wall_ns + _ns(part.began_s)
        )
        span.end(wall_ns + _ns(part.ended_s))

    def close(self) -> None:
        """Sends what is not sent yet."""
        self._provider.shutdown()


def tracer_for(settings: TelemetrySettings, version: str) -> Tracer | None:
    """None if no endpoint is given.

    Raises:
        TracingError: the packages are not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ModuleNotFoundError as error:
        raise TracingError(
            f"--otlp-endpoint needs the package {error.name}: pip install 'quickchange[tracing]'"
        ) from error
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.trace_ratio)),
        resource=Resource.create({"service.name": "quickchange", "service.version": version}),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp_endpoint)))
    return Tracer(provider)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
