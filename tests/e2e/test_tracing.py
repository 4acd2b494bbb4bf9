"""Spans of requests at a real collector, exemplars in a real scrape, and lines of JSON in a real log."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from quickchange import QuickchangeError
from quickchange.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.process import ServerProcess, eventually, running

collector = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
collector_grpc = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARTS = {"queue", "adapter load", "prefill", "decode"}


class Collector(collector_grpc.TraceServiceServicer):  # type: ignore[misc]  # generated, without types
    """Keeps every span it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - as in the proto
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return collector.ExportTraceServiceResponse()

    def requests(self) -> list[Any]:
        """Spans of whole requests, the warm-up left out."""
        return [s for s in self.spans if s.name == "generate" and attributes(s)["request_id"] != "warm-up"]

    def parts(self, span: Any) -> dict[str, Any]:
        return {part.name: part for part in self.spans if part.parent_span_id == span.span_id}


def attributes(span: Any) -> dict[str, Any]:
    return {
        pair.key.rpartition(".")[2]: pair.value.string_value or pair.value.int_value
        for pair in span.attributes
    }


@pytest.fixture(scope="module")
def spans() -> Iterator[tuple[Collector, str]]:
    servicer = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    collector_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture(scope="module")
def traced(
    base: Path, spans: tuple[Collector, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    flags = ("--otlp-endpoint", spans[1], "--log-format", "json")
    with running(ServerProcess(base, tmp_path_factory.mktemp("traced"), flags=flags)) as process:
        yield process


def test_a_request_is_a_span_of_its_caller_and_has_parts(
    traced: ServerProcess, spans: tuple[Collector, str], adapters: Mapping[str, Path]
) -> None:
    seen, _ = spans
    with traced.client() as client:
        client.adapters.push(adapters["a"], "a")
    began_s = time.time()
    with grpc.insecure_channel(traced.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(
            request_id="seen", text="a secret prompt", adapter="a", sampling={"max_new_tokens": 5}
        )
        request.stopping.ignore_eos = True
        stub.Generate(request, metadata=[("traceparent", f"00-{TRACE}-{PARENT}-01")])
    ended_s = time.time()
    eventually(lambda: any(attributes(span)["request_id"] == "seen" for span in seen.requests()))
    (span,) = (span for span in seen.requests() if attributes(span)["request_id"] == "seen")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(span)["adapter"] == "a@1"
    assert attributes(span)["output_tokens"] == 5
    assert "secret" not in str(span)

    parts = seen.parts(span)
    assert parts.keys() == PARTS
    assert began_s <= span.start_time_unix_nano / 1e9 < span.end_time_unix_nano / 1e9 <= ended_s
    queue, load, prefill, decode = (parts[name] for name in ("queue", "adapter load", "prefill", "decode"))
    assert span.start_time_unix_nano <= queue.start_time_unix_nano <= load.start_time_unix_nano
    assert load.end_time_unix_nano <= queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= span.end_time_unix_nano


def test_a_request_that_failed_is_an_error(traced: ServerProcess, spans: tuple[Collector, str]) -> None:
    seen, _ = spans
    with traced.client() as client, pytest.raises(QuickchangeError):
        client.generate("late", request_id="late", max_new_tokens=15000, ignore_eos=True, timeout_s=3)
    eventually(lambda: any(attributes(span)["request_id"] == "late" for span in seen.requests()))
    (span,) = (span for span in seen.requests() if attributes(span)["request_id"] == "late")
    # Whoever notices first: the engine that the time is over, or gRPC that the caller has gone.
    assert attributes(span)["reason"] == "cancelled" or span.status.message == "DEADLINE_EXCEEDED"
    assert "decode" in seen.parts(span)


def test_histograms_name_a_trace_that_the_collector_has(
    traced: ServerProcess, spans: tuple[Collector, str]
) -> None:
    seen, _ = spans
    with traced.client() as client:
        client.generate("hello", max_new_tokens=2)
    request = urllib.request.Request(
        f"http://{traced.metrics}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        page = answer.read().decode()
    for name in ("time_to_first_token_seconds", "request_queue_seconds", "request_duration_seconds"):
        found = set(re.findall(rf'quickchange_{name}_bucket.* # {{trace_id="([0-9a-f]{{32}})"}}', page))
        assert found, name
        eventually(lambda found=found: found <= {span.trace_id.hex() for span in seen.spans})


def test_every_line_of_the_log_is_json(traced: ServerProcess) -> None:
    with traced.client() as client:
        client.generate("logged", request_id="logged", max_new_tokens=2)
    eventually(lambda: "request finished request_id=logged" in traced.log)
    lines = [json.loads(line) for line in traced.log.splitlines() if line.startswith("{")]
    (line,) = (line for line in lines if line["message"].startswith("request finished request_id=logged"))
    assert line["fields"]["reason"] == "length"
    others = [line for line in traced.log.splitlines() if not line.startswith("{")]
    assert [line for line in others if re.match(r"\d{4}-", line)] == [], "no line of ours in the other format"


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, server.app; from server.config import TelemetrySettings; "
        "from server.tracing import tracer_for; assert tracer_for(TelemetrySettings(), '1') is None; "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
