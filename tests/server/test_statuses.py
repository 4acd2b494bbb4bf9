"""Every error of ours, over a real channel: code, reason, details, and nothing it should not tell."""
# ruff: noqa: N802 - methods are named as in the protos

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2

from adapters import errors as adapter_errors
from quickchange.errors import QuickchangeError, from_rpc
from quickchange.v1 import inference_pb2, inference_pb2_grpc
from server import errors as server_errors
from server.services.inbox import UploadStalledError
from server.services.interceptors import StatusInterceptor
from server.services.places import TooManyUploadsError
from server.services.replay import CanaryDelayedError
from server.services.statuses import TABLE, clipped, code_of, status_of
from server.services.uploads import ChunkCorruptError, UploadIncompleteError

EXPECTED = {
    server_errors.InvalidRequestError: "INVALID_ARGUMENT",
    server_errors.UnsupportedFeatureError: "UNIMPLEMENTED",
    server_errors.QueueFullError: "RESOURCE_EXHAUSTED",
    TooManyUploadsError: "RESOURCE_EXHAUSTED",
    CanaryDelayedError: "RESOURCE_EXHAUSTED",
    server_errors.RateLimitError: "RESOURCE_EXHAUSTED",
    server_errors.UnauthenticatedError: "UNAUTHENTICATED",
    server_errors.PermissionDeniedError: "PERMISSION_DENIED",
    server_errors.DrainingError: "UNAVAILABLE",
    server_errors.EngineDownError: "UNAVAILABLE",
    server_errors.AdapterLoadError: "FAILED_PRECONDITION",
    server_errors.AdapterMemoryError: "RESOURCE_EXHAUSTED",
    server_errors.DeadlineError: "DEADLINE_EXCEEDED",
    UploadStalledError: "DEADLINE_EXCEEDED",
    server_errors.UploadNotFoundError: "NOT_FOUND",
    server_errors.UploadStateError: "FAILED_PRECONDITION",
    server_errors.UploadAbortedError: "ABORTED",
    UploadIncompleteError: "INVALID_ARGUMENT",
    ChunkCorruptError: "DATA_LOSS",
    server_errors.RequestFailedError: "INTERNAL",
    server_errors.RequestMemoryError: "RESOURCE_EXHAUSTED",
    adapter_errors.InvalidAdapterError: "INVALID_ARGUMENT",
    adapter_errors.UnsupportedAdapterError: "FAILED_PRECONDITION",
    adapter_errors.WrongBaseError: "FAILED_PRECONDITION",
    adapter_errors.CanaryMismatchError: "FAILED_PRECONDITION",
    adapter_errors.AdapterNotFoundError: "NOT_FOUND",
    adapter_errors.AdapterExistsError: "ALREADY_EXISTS",
    adapter_errors.StaleEtagError: "ABORTED",
    adapter_errors.AdapterCorruptError: "DATA_LOSS",
    adapter_errors.UploadOffsetError: "OUT_OF_RANGE",
    adapter_errors.ChangesLostError: "UNAVAILABLE",
    adapter_errors.StoreUnreachableError: "UNAVAILABLE",
    adapter_errors.ReadOnlyStoreError: "FAILED_PRECONDITION",
    adapter_errors.CapacityError: "RESOURCE_EXHAUSTED",
}


def subclasses_of(root: type[Exception]) -> Iterator[type[Exception]]:
    for cls in root.__subclasses__():
        yield cls
        yield from subclasses_of(cls)


def an(cls: type[Exception]) -> Any:
    """An instance with everything that its constructor asks for."""
    if issubclass(cls, server_errors.InvalidRequestError):
        return cls("sampling.top_p", "is 7, must be in (0, 1]")
    if issubclass(cls, server_errors.QueueFullError):
        return cls("256 requests are waiting", 2.5)
    if issubclass(cls, server_errors.RateLimitError):
        return cls("60 requests per minute", 2.5, "REQUESTS_PER_MINUTE")
    if issubclass(cls, server_errors.UnauthenticatedError | server_errors.PermissionDeniedError):
        return cls("not with this token; do this", "TOKEN_INVALID")
    if issubclass(cls, server_errors.UploadStateError | server_errors.UploadAbortedError):
        return cls("upload 7f is not right; do this", "UPLOAD_BUSY")
    if issubclass(cls, server_errors.AdapterLoadError):
        return cls(adapter_errors.AdapterCorruptError("sha256:00 has changed"))
    if issubclass(cls, adapter_errors.UnsupportedAdapterError):
        return cls("sql@3 is DoRA; train LoRA", feature="use_dora")
    return cls("sql@3 is not right; do this")


class Raising(inference_pb2_grpc.InferenceServiceServicer):
    """Raises the error it was given, as a handler would: at once, or in the middle of a stream."""

    error: Exception = RuntimeError()

    async def Generate(self, request: Any, context: Any) -> Any:
        raise self.error

    async def GenerateStream(self, request: Any, context: Any) -> Any:
        await context.write(inference_pb2.GenerateStreamResponse(delta=inference_pb2.Delta(text="a")))
        raise self.error

    async def Tokenize(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.ABORTED, "said by the handler itself")

    async def ListModels(self, request: Any, context: Any) -> Any:
        return inference_pb2.ListModelsResponse()


@pytest.fixture
async def raising() -> AsyncIterator[tuple[Raising, Any]]:
    servicer = Raising()
    server = grpc.aio.server(interceptors=[StatusInterceptor()])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, inference_pb2_grpc.InferenceServiceStub(channel)
    await server.stop(None)


async def caught(call: Any) -> QuickchangeError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return from_rpc(error.value)


def test_every_error_class_is_expected_here() -> None:
    known = set(EXPECTED)
    assert (
        set(subclasses_of(server_errors.ServerError)) | set(subclasses_of(adapter_errors.AdapterError))
        == known
    )


def test_every_status_of_the_table_is_reached_by_an_exact_entry() -> None:
    for cls in EXPECTED:
        if cls.__module__ in ("server.errors", "adapters.errors"):
            assert cls in TABLE


@pytest.mark.parametrize("cls", EXPECTED, ids=lambda cls: cls.__name__)
async def test_an_error_arrives_with_code_reason_and_message(cls: type[Exception], raising: Any) -> None:
    servicer, stub = raising
    servicer.error = an(cls)
    error = await caught(stub.Generate(inference_pb2.GenerateRequest()))
    assert error.code == EXPECTED[cls]
    assert error.reason == servicer.error.reason
    assert error.message == str(servicer.error)


@pytest.mark.parametrize("cls", EXPECTED, ids=lambda cls: cls.__name__)
def test_the_code_for_metrics_is_the_code_of_the_wire(cls: type[Exception]) -> None:
    """Errors that end a running request carry their code themselves, for the engine to count."""
    code = getattr(cls, "code", "INTERNAL")
    ends_a_running_request = cls in (
        server_errors.EngineDownError,
        server_errors.AdapterLoadError,
        server_errors.AdapterMemoryError,
        server_errors.DeadlineError,
        server_errors.RequestFailedError,
        server_errors.RequestMemoryError,
    )
    assert not ends_a_running_request or code == EXPECTED[cls]


async def test_details_say_which_field_and_when_to_come_back(raising: Any) -> None:
    servicer, stub = raising
    servicer.error = an(server_errors.InvalidRequestError)
    error = await caught(stub.Generate(inference_pb2.GenerateRequest()))
    (violation,) = error.field_violations
    assert (violation.field, violation.description) == ("sampling.top_p", "is 7, must be in (0, 1]")
    servicer.error = an(server_errors.QueueFullError)
    assert (await caught(stub.Generate(inference_pb2.GenerateRequest()))).retry_after_s == 2.5
    servicer.error = an(server_errors.AdapterLoadError)
    error = await caught(stub.Generate(inference_pb2.GenerateRequest()))
    assert error.metadata == {"cause": "CHECKSUM_MISMATCH"}


def test_a_full_quota_names_what_is_full() -> None:
    status = status_of(adapter_errors.CapacityError("the disk is full", reason="DISK_FULL"))
    assert [detail.TypeName() for detail in status.details] == [
        "google.rpc.ErrorInfo",
        "google.rpc.QuotaFailure",
    ]


@pytest.mark.parametrize(
    ("cls", "quotas"),
    [
        (TooManyUploadsError, ["TOO_MANY_UPLOADS"]),
        (server_errors.QueueFullError, []),
        (CanaryDelayedError, []),
    ],
)
def test_a_limit_that_waiting_helps_against_is_named_beside_when_to_come_back(
    cls: type[server_errors.QueueFullError], quotas: list[str]
) -> None:
    retry, quota = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    details = status_of(cls("2 are under way", 2.5)).details
    assert [detail.Unpack(retry) for detail in details].count(True) == 1
    assert retry.retry_delay.ToMilliseconds() == 2500
    found = [quota.violations[0].subject for detail in details if detail.Unpack(quota)]
    assert found == quotas


async def test_an_error_in_the_middle_of_a_stream_ends_it_with_its_status(raising: Any) -> None:
    servicer, stub = raising
    servicer.error = an(server_errors.EngineDownError)
    call = stub.GenerateStream(inference_pb2.GenerateStreamRequest())
    assert (await call.read()).delta.text == "a"
    error = await caught(call.read())
    assert (error.code, error.reason) == ("UNAVAILABLE", "ENGINE_DOWN")


async def test_an_unexpected_error_is_logged_and_not_told(
    raising: Any, caplog: pytest.LogCaptureFixture
) -> None:
    servicer, stub = raising
    servicer.error = FileNotFoundError(2, "No such file", "/srv/store/blobs/secret")
    with caplog.at_level(logging.INFO):
        error = await caught(stub.Generate(inference_pb2.GenerateRequest()))
    assert (error.code, error.reason) == ("INTERNAL", "INTERNAL")
    assert "/srv" not in error.message
    assert "Traceback" not in error.message
    record = next(r for r in caplog.records if r.levelno == logging.ERROR)
    assert record.exc_info is not None
    assert error.metadata["incident"] in record.getMessage()


async def test_what_a_handler_says_itself_stays(raising: Any) -> None:
    _, stub = raising
    error = await caught(stub.Tokenize(inference_pb2.TokenizeRequest()))
    assert (error.code, error.message) == ("ABORTED", "said by the handler itself")


async def test_an_answer_is_left_alone(raising: Any) -> None:
    _, stub = raising
    assert await stub.ListModels(inference_pb2.ListModelsRequest()) == inference_pb2.ListModelsResponse()


async def test_a_huge_message_still_arrives(raising: Any) -> None:
    """Tensor names are as long as a stranger likes; metadata is not."""
    servicer, stub = raising
    servicer.error = adapter_errors.InvalidAdapterError("tensor \n" + "ü" * 100_000)
    error = await caught(stub.Generate(inference_pb2.GenerateRequest()))
    assert error.code == "INVALID_ARGUMENT"
    assert error.message.startswith("tensor üüü")
    assert error.message.endswith("…")


def test_messages_are_one_line() -> None:
    assert clipped("a\r\n b\tc") == "a b c"


def test_an_unknown_exception_has_no_code() -> None:
    assert code_of(ValueError("x")) is None
