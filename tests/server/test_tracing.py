"""Spans of a request: whose they are, whether anybody sees them, and what a bad traceparent does."""

import time

import pytest

from server.tracing import Interval, Tracer

trace_sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
sampling = pytest.importorskip("opentelemetry.sdk.trace.sampling")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def tracer(ratio: float) -> tuple[Tracer, "memory.InMemorySpanExporter"]:
    provider = trace_sdk.TracerProvider(sampler=sampling.ParentBased(sampling.TraceIdRatioBased(ratio)))
    spans = memory.InMemorySpanExporter()
    provider.add_span_processor(export.SimpleSpanProcessor(spans))
    return Tracer(provider), spans


@pytest.mark.parametrize(
    ("ratio", "traceparent", "seen"),
    [
        (1.0, "", True),
        (0.0, "", False),
        (0.0, f"00-{TRACE}-{PARENT}-01", True),
        (1.0, f"00-{TRACE}-{PARENT}-00", False),
        (1.0, "what is this", True),
        (0.0, "ff-" + "0" * 400, False),
    ],
    ids=["all", "none", "the caller wants it", "the caller does not", "not to be read", "nor this"],
)
def test_the_caller_decides_and_else_the_ratio(ratio: float, traceparent: str, seen: bool) -> None:
    ours, spans = tracer(ratio)
    trace = ours.begin("generate", traceparent, time.monotonic())
    assert (trace.sampled_id is not None) == seen
    trace.end([], {}, None)
    assert len(spans.get_finished_spans()) == seen
    if TRACE in traceparent and seen:
        assert trace.sampled_id == TRACE


def test_parts_lie_inside_on_the_clock_of_the_wall() -> None:
    ours, spans = tracer(1.0)
    began_s, wall_s = time.monotonic() - 2.0, time.time()
    trace = ours.begin("generate", "", began_s)
    parts = [Interval("queue", began_s, began_s + 0.5), Interval("prefill", began_s + 0.5, began_s + 1.0)]
    trace.end(parts, {"quickchange.reason": "failed"}, "INTERNAL")
    queue, prefill, whole = spans.get_finished_spans()
    assert [span.name for span in (queue, prefill, whole)] == ["queue", "prefill", "generate"]
    assert {span.parent.span_id for span in (queue, prefill)} == {whole.context.span_id}
    assert queue.start_time == whole.start_time
    assert queue.end_time == prefill.start_time
    assert (queue.end_time - queue.start_time) / 1e9 == pytest.approx(0.5, abs=1e-3)
    assert whole.start_time / 1e9 == pytest.approx(wall_s - 2.0, abs=0.5)
    assert whole.status.description == "INTERNAL"
