"""The one table from error to gRPC status, with google.rpc details. Does not know who raises what."""

import logging
import secrets
from collections.abc import Mapping
from math import ceil
from typing import Final

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from adapters import errors as adapter_errors
from server import errors as server_errors
from server.services import reports

log = logging.getLogger(__name__)

DOMAIN: Final = "quickchange"
UNEXPECTED_REASON: Final = "INTERNAL"
_MESSAGE_BYTES: Final = 1024  # message and details travel as metadata, of which a client takes 8 KiB
_FEATURE_CHARACTERS: Final = 128

TABLE: Final[Mapping[type[Exception], grpc.StatusCode]] = {
    server_errors.ServerError: grpc.StatusCode.INTERNAL,
    server_errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    server_errors.UnsupportedFeatureError: grpc.StatusCode.UNIMPLEMENTED,
    server_errors.QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    server_errors.RateLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    server_errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    server_errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    server_errors.DrainingError: grpc.StatusCode.UNAVAILABLE,
    server_errors.EngineDownError: grpc.StatusCode.UNAVAILABLE,
    server_errors.AdapterLoadError: grpc.StatusCode.FAILED_PRECONDITION,
    server_errors.AdapterMemoryError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    server_errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    server_errors.UploadNotFoundError: grpc.StatusCode.NOT_FOUND,
    server_errors.UploadStateError: grpc.StatusCode.FAILED_PRECONDITION,
    server_errors.UploadAbortedError: grpc.StatusCode.ABORTED,
    server_errors.RequestFailedError: grpc.StatusCode.INTERNAL,
    server_errors.RequestMemoryError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    adapter_errors.AdapterError: grpc.StatusCode.INTERNAL,
    adapter_errors.InvalidAdapterError: grpc.StatusCode.INVALID_ARGUMENT,
    adapter_errors.UnsupportedAdapterError: grpc.StatusCode.FAILED_PRECONDITION,
    adapter_errors.WrongBaseError: grpc.StatusCode.FAILED_PRECONDITION,
    adapter_errors.CanaryMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    adapter_errors.AdapterNotFoundError: grpc.StatusCode.NOT_FOUND,
    adapter_errors.AdapterExistsError: grpc.StatusCode.ALREADY_EXISTS,
    adapter_errors.StaleEtagError: grpc.StatusCode.ABORTED,
    adapter_errors.AdapterCorruptError: grpc.StatusCode.DATA_LOSS,
    adapter_errors.UploadOffsetError: grpc.StatusCode.OUT_OF_RANGE,
    adapter_errors.ChangesLostError: grpc.StatusCode.UNAVAILABLE,
    adapter_errors.StoreUnreachableError: grpc.StatusCode.UNAVAILABLE,
    adapter_errors.ReadOnlyStoreError: grpc.StatusCode.FAILED_PRECONDITION,
    adapter_errors.CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""A class that is not here has the status of its nearest base class; one without any is unexpected."""


def code_of(error: Exception) -> grpc.StatusCode | None:
    """The status code of an error; None if it is unexpected."""
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), None)


def reason_of(error: Exception) -> str:
    """The UPPER_SNAKE code that clients and metrics see."""
    return str(getattr(error, "reason", UNEXPECTED_REASON)) if code_of(error) else UNEXPECTED_REASON


def status_of(error: Exception) -> status_pb2.Status:
    """What the client is told: code, one line, and details.

    An unexpected error goes to the log, and the client learns where to look for it, not what it was.
    """
    code = code_of(error)
    if code is None:
        incident = secrets.token_hex(4)
        log.error("unexpected error incident=%s", incident, exc_info=error)
        return _status(
            grpc.StatusCode.INTERNAL,
            f"internal error; the server's log says more under incident {incident}",
            [_error_info(UNEXPECTED_REASON, {"incident": incident})],
        )
    return _status(code, str(error), _details_of(error))


def _status(code: grpc.StatusCode, message: str, details: list[Message]) -> status_pb2.Status:
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=clipped(message))
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _details_of(error: Exception) -> list[Message]:
    match error:
        case server_errors.InvalidRequestError():
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=error.field, description=clipped(error.description)
            )
            extra: list[Message] = [error_details_pb2.BadRequest(field_violations=[violation])]
        case server_errors.QueueFullError():
            extra = [_retry_info(error.retry_after_s)]
            extra += [_quota_failure(error)] if error.is_quota else []
        case server_errors.RateLimitError():
            extra = [] if error.retry_after_s is None else [_retry_info(error.retry_after_s)]
            extra.append(_quota_failure(error))
        case adapter_errors.CapacityError():
            extra = [_quota_failure(error)]
        case _:
            extra = []
    if isinstance(error, adapter_errors.AdapterError) and error.report is not None:
        extra.append(reports.refusal(error.report))
    return [_error_info(reason_of(error), _metadata_of(error)), *extra]


def _retry_info(delay_s: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(max(1, ceil(delay_s * 1000)))  # never too early
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _quota_failure(error: Exception) -> error_details_pb2.QuotaFailure:
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=reason_of(error), description=clipped(str(error))
    )
    return error_details_pb2.QuotaFailure(violations=[violation])


def _metadata_of(error: Exception) -> Mapping[str, str]:
    if isinstance(error, server_errors.AdapterLoadError):
        return {"cause": reason_of(error.cause)}
    if isinstance(error, adapter_errors.UnsupportedAdapterError):
        return {"feature": error.feature[:_FEATURE_CHARACTERS]}
    return {}


def _error_info(reason: str, metadata: Mapping[str, str]) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def clipped(message: str) -> str:
    """The message on one line, cut where metadata would no longer carry it."""
    line = " ".join(message.split())
    if len(line.encode()) <= _MESSAGE_BYTES:
        return line
    return line.encode()[:_MESSAGE_BYTES].decode(errors="ignore") + "…"
