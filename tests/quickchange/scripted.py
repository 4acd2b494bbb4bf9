"""A real gRPC server on a real socket whose answers are scripted. Knows nothing of models."""
# ruff: noqa: N802 - methods are named as in the protos

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from quickchange.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

DIGEST = "sha256:" + "ab" * 32
RESOLVED = inference_pb2.ResolvedAdapter(name="sql", version=3, digest=DIGEST)


def rich(
    code: grpc.StatusCode, message: str, reason: str = "", *details: Any, domain: str = "quickchange"
) -> grpc.Status:
    """A status with google.rpc details, as the real server sends it."""
    status = status_pb2.Status(code=code.value[0], message=message)
    info = [error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata={"k": "v"})] if reason else []
    for detail in [*info, *details]:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


def queue_full(retry_after_s: float) -> grpc.Status:
    delay = Duration()
    delay.FromMilliseconds(round(retry_after_s * 1000))
    retry = error_details_pb2.RetryInfo(retry_delay=delay)
    return rich(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", "QUEUE_FULL", retry)


@dataclass
class Script:
    """What the server is to do, and what it saw."""

    failures: list[grpc.Status] = field(default_factory=list)
    """Answers to the next calls of any method, before a proper one."""
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    uploads: list[list[adapters_pb2.UploadAdapterRequest]] = field(default_factory=list)
    keep_uploads: bool = True
    upload_bytes: int = 0
    upload_pause_s: float = 0.0
    refuse_upload_after: int | None = None
    """Messages of an upload to read before an error answers it."""
    text: str = "SELECT 1"
    deltas: int = 3
    endless: bool = False
    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    """A call ended, by itself or because it was cancelled."""
    adapters: int = 3
    files: dict[str, bytes] = field(default_factory=dict)
    download: list[adapters_pb2.DownloadAdapterResponse] | None = None
    merged: server_pb2.MergedAdapter | None = None

    def begin(self, request: Any, context: grpc.ServicerContext) -> None:
        context.add_callback(self.ended.set)
        self.requests.append(request)
        self.begun.set()
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata()})
        if self.failures:
            context.abort_with_status(self.failures.pop(0))


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        self.script.begin(request, context)
        if self.script.endless:
            self.script.ended.wait(20)
        return inference_pb2.GenerateResponse(
            request_id=request.request_id or "r-1",
            adapter=RESOLVED if request.adapter else inference_pb2.ResolvedAdapter(),
            completions=[
                inference_pb2.Completion(
                    text=self.script.text,
                    token_ids=[5, 6],
                    logprobs=[logprob(5), logprob(6)] if request.output.HasField("logprobs") else [],
                    finish_reason=inference_pb2.FINISH_REASON_LENGTH,
                )
            ],
            usage=USAGE,
            timings=timings(),
        )

    def GenerateStream(self, request: Any, context: Any) -> Iterator[inference_pb2.GenerateStreamResponse]:
        self.script.begin(request, context)
        started = inference_pb2.Started(request_id="r-2", adapter=RESOLVED, prompt_tokens=4, cached_tokens=1)
        yield inference_pb2.GenerateStreamResponse(started=started)
        count = 0
        while context.is_active() and (self.script.endless or count < self.script.deltas):
            yield inference_pb2.GenerateStreamResponse(
                delta=inference_pb2.Delta(text=f"t{count} ", token_ids=[count], logprobs=[logprob(count)])
            )
            count += 1
            if self.script.endless:
                self.script.ended.wait(0.01)
        finished = inference_pb2.Finished(
            finish_reason=inference_pb2.FINISH_REASON_STOP, usage=USAGE, timings=timings()
        )
        yield inference_pb2.GenerateStreamResponse(finished=finished)

    def Tokenize(self, request: Any, context: Any) -> inference_pb2.TokenizeResponse:
        self.script.begin(request, context)
        return inference_pb2.TokenizeResponse(token_ids=[1, 2, 3], text="<user>" + request.text)

    def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        self.script.begin(request, context)
        base = inference_pb2.Model(is_base=True, description="tiny")
        return inference_pb2.ListModelsResponse(
            models=[base, inference_pb2.Model(reference="sql", adapter=RESOLVED)]
        )


class Adapters(adapters_pb2_grpc.AdapterServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def UploadAdapter(self, request_iterator: Any, context: Any) -> adapters_pb2.UploadAdapterResponse:
        self.script.begin("upload", context)
        header = next(request_iterator).header
        received = [adapters_pb2.UploadAdapterRequest(header=header)]
        self.script.uploads.append(received)
        self.script.upload_bytes = 0
        count = 1
        while True:
            if count == self.script.refuse_upload_after:
                context.abort_with_status(
                    rich(grpc.StatusCode.FAILED_PRECONDITION, "made for another base", "WRONG_BASE")
                )
            message = next(request_iterator, None)
            if message is None:
                break
            count += 1
            time.sleep(self.script.upload_pause_s)
            self.script.upload_bytes += len(message.chunk.data)
            if self.script.keep_uploads:
                received.append(message)
        if self.script.upload_bytes != sum(file.size_bytes for file in header.files):
            context.abort_with_status(rich(grpc.StatusCode.DATA_LOSS, "incomplete", "CHECKSUM_MISMATCH"))
        return adapters_pb2.UploadAdapterResponse(
            adapter=adapter(header.name, 0 if header.validate_only else header.version or 1, header.labels),
            created=not header.validate_only,
            report=adapters_pb2.ValidationReport(matched_modules=["q"], rank=8, delta_norm=0.5, dtype="F32"),
        )

    def GetAdapter(self, request: Any, context: Any) -> adapters_pb2.GetAdapterResponse:
        self.script.begin(request, context)
        return adapters_pb2.GetAdapterResponse(adapter=adapter(request.adapter, 3))

    def ListAdapters(self, request: Any, context: Any) -> adapters_pb2.ListAdaptersResponse:
        """Two to a page."""
        self.script.begin(request, context)
        first = int(request.page_token or 0)
        last = min(first + 2, self.script.adapters)
        return adapters_pb2.ListAdaptersResponse(
            adapters=[adapter(f"a{index}", 1) for index in range(first, last)],
            next_page_token=str(last) if last < self.script.adapters else "",
        )

    def UpdateAdapter(self, request: Any, context: Any) -> adapters_pb2.UpdateAdapterResponse:
        self.script.begin(request, context)
        changed = adapter("sql", 3)
        changed.aliases[:] = request.set_aliases
        changed.pinned = request.pinned
        return adapters_pb2.UpdateAdapterResponse(adapter=changed)

    def DeleteAdapter(self, request: Any, context: Any) -> adapters_pb2.DeleteAdapterResponse:
        self.script.begin(request, context)
        return adapters_pb2.DeleteAdapterResponse(deleted_versions=2 if request.all_versions else 1)

    def LoadAdapter(self, request: Any, context: Any) -> adapters_pb2.LoadAdapterResponse:
        self.script.begin(request, context)
        loaded = adapter(request.adapter, 3)
        loaded.residency = adapters_pb2.RESIDENCY_DEVICE
        return adapters_pb2.LoadAdapterResponse(adapter=loaded)

    def UnloadAdapter(self, request: Any, context: Any) -> adapters_pb2.UnloadAdapterResponse:
        self.script.begin(request, context)
        return adapters_pb2.UnloadAdapterResponse(adapter=adapter(request.adapter, 3))

    def DownloadAdapter(self, request: Any, context: Any) -> Iterator[adapters_pb2.DownloadAdapterResponse]:
        self.script.begin(request, context)
        yield from self.script.download or downloaded(self.script.files)

    def WatchAdapters(self, request: Any, context: Any) -> Iterator[adapters_pb2.WatchAdaptersResponse]:
        """What there is, if it is asked for; a change, a deletion; then the server goes away."""
        self.script.begin(request, context)
        for index in range(self.script.adapters if request.send_initial else 0):
            yield adapters_pb2.WatchAdaptersResponse(adapter=adapter(f"a{index}", 1))
        changed = adapter("sql", 3, {"team": "data"})
        changed.pinned = True
        yield adapters_pb2.WatchAdaptersResponse(adapter=changed)
        gone = adapters_pb2.Adapter(
            name="sql", version=2, digest=DIGEST, state=adapters_pb2.ADAPTER_STATE_DELETING
        )
        yield adapters_pb2.WatchAdaptersResponse(adapter=gone, deleted=True)
        if self.script.endless:
            self.script.ended.wait(20)
        context.abort_with_status(rich(grpc.StatusCode.UNAVAILABLE, "the server is draining", "DRAINING"))

    def CollectGarbage(self, request: Any, context: Any) -> adapters_pb2.CollectGarbageResponse:
        self.script.begin(request, context)
        gone = adapters_pb2.CollectedVersion(
            name="sql", version=1, digest=DIGEST, reason="2 newer ones are READY", freed_bytes=2048
        )
        damaged = adapters_pb2.CollectedQuarantine(
            place=f"quarantine/{'0' * 64}.1", digest=DIGEST, reason="bit rot", freed_bytes=1024
        )
        return adapters_pb2.CollectGarbageResponse(versions=[gone], freed_bytes=3072, quarantined=[damaged])


class Server(server_pb2_grpc.ServerServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def GetServerInfo(self, request: Any, context: Any) -> server_pb2.GetServerInfoResponse:
        self.script.begin(request, context)
        return server_pb2.GetServerInfoResponse(
            version="0.1.0",
            base_model="tiny",
            base_fingerprint=DIGEST,
            quantization="nf4",
            device="cpu",
            dtype="float32",
            limits=server_pb2.Limits(
                max_context_tokens=512, max_upload_bytes=2**31, max_new_tokens=128, max_answers=4
            ),
            capacity=server_pb2.Capacity(kv_tokens_total=4096, kv_tokens_free=4000),
            steps=server_pb2.StepStatistics(steps=10, mixed_steps=4, max_adapters_in_step=3),
            merged=self.script.merged,
        )

    def Drain(self, request: Any, context: Any) -> server_pb2.DrainResponse:
        self.script.begin(request, context)
        return server_pb2.DrainResponse(requests_running=2)


USAGE = inference_pb2.Usage(prompt_tokens=4, completion_tokens=2, cached_tokens=1)


def timings() -> inference_pb2.Timings:
    return inference_pb2.Timings(
        queue=Duration(nanos=1_000_000),
        time_to_first_token=Duration(nanos=20_000_000),
        total=Duration(seconds=1),
    )


def logprob(token_id: int) -> inference_pb2.TokenLogprob:
    other = inference_pb2.TokenAlternative(token_id=9, logprob=-1.5)
    return inference_pb2.TokenLogprob(token_id=token_id, logprob=-0.5, alternatives=[other])


def adapter(name: str, version: int, labels: Any = None) -> adapters_pb2.Adapter:
    made = adapters_pb2.Adapter(
        name=name,
        version=version,
        digest=DIGEST,
        etag="e1",
        state=adapters_pb2.ADAPTER_STATE_READY,
        residency=adapters_pb2.RESIDENCY_DISK,
        rank=8,
        alpha=16,
        target_modules=["q_proj"],
        method=adapters_pb2.ADAPTER_METHOD_RSLORA,
        size_bytes=2048,
        aliases=["prod"],
        labels=labels,
    )
    made.create_time.FromSeconds(1_700_000_000)
    return made


def downloaded(
    files: dict[str, bytes], chunk_bytes: int = 1000
) -> list[adapters_pb2.DownloadAdapterResponse]:
    """The messages that carry these files."""
    promised = [
        adapters_pb2.UploadFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]
    header = adapters_pb2.DownloadHeader(adapter=adapter("sql", 3), files=promised)
    messages = [adapters_pb2.DownloadAdapterResponse(header=header)]
    for index, data in enumerate(files.values()):
        for offset in range(0, len(data), chunk_bytes):
            piece = data[offset : offset + chunk_bytes]
            chunk = adapters_pb2.UploadChunk(
                file_index=index, write_offset=offset, data=piece, crc32c=google_crc32c.value(piece)
            )
            messages.append(adapters_pb2.DownloadAdapterResponse(chunk=chunk))
    return messages


@contextmanager
def serving(script: Script, port: int = 0) -> Iterator[str]:
    """Runs the server; gives its address."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(script), server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(Adapters(script), server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(Server(script), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        server.stop(grace=None).wait()
