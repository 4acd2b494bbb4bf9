"""Every way a call can fail, as the caller sees it. Knows nothing of requests or of the command line.

QuickchangeError
├── InvalidArgumentError      a parameter, name, tensor or prompt is wrong; `field_violations` say which
│   └── AdapterDirectoryError   the folder to upload, or to download into, is not what it has to be
├── OutOfRangeError           a chunk is not where the upload stands
├── NotFoundError             no such adapter, version or alias
├── AlreadyExistsError        a fixed version holds other content
├── FailedPreconditionError   made for another base, or a method that the server cannot apply
├── AbortedError              changed since it was read (stale etag)
├── ResourceExhaustedError    queue, quota or disk is full; `retry_after_s` says when to come back
├── DataLossError             bytes are not what their checksum says
├── DeadlineExceededError     the time-out passed
├── UnavailableError          nobody answers, or the server is going away
├── UnauthenticatedError      no token, or a wrong one
├── PermissionDeniedError     the token does not allow this
├── CancelledError            the call was cancelled, here or by the server
├── UnimplementedError        this server does not have the method
└── InternalError             the server failed; its log says why
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from quickchange.reports import validation_report
from quickchange.types import ValidationReport
from quickchange.v1 import adapters_pb2

DOMAIN = "quickchange"

NO_CONNECTION = "NO_CONNECTION"
"""Reason of an UnavailableError whose request never left this process, so that sending it again is safe."""

TLS_FAILED = "TLS_FAILED"
"""Reason of an UnavailableError of a client and a server that do not trust each other, or speak no TLS."""

DRAINING = "DRAINING"
"""Reason of an UnavailableError of a server that is going away and did not begin with the call."""

_NEVER_CONNECTED = "failed to connect to all addresses"  # gRPC has no code for it, only this text
_NO_HANDSHAKE = {  # what gRPC writes then: what it means; the first that is there counts
    "WRONG_VERSION_NUMBER": "the server speaks plain text; ask it without TLS",
    "CERTIFICATE_VERIFY_FAILED": "this client does not trust the server's certificate; name who "
    "signed it with --tls-ca (QUICKCHANGE_SERVER_CA), or renew it if it has expired",
    "Hostname Verification": "the server's certificate is for another name; ask it by one that is in it, "
    "or say which with --tls-name (QUICKCHANGE_SERVER_NAME)",
    "handshake failed": "what both sides accept does not meet",
}
_DEADLINE_HERE = "Deadline Exceeded"  # what gRPC itself writes when the server said nothing
_NEVER_TAKEN = "CANCELLED"  # the same, of a call that reached a server as it shut down; ours say "Locally"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that the server refused."""

    field: str
    description: str


class QuickchangeError(Exception):
    """Base of all errors of the client.

    Attributes:
        code: name of the gRPC status, such as "NOT_FOUND".
        reason: UPPER_SNAKE code that programs may switch on, such as "ADAPTER_NOT_FOUND"; empty if the
            server named none.
        field_violations: the fields that are wrong, if the error is about fields.
        retry_after_s: when the server asks to be tried again; None if it does not.
        metadata: further facts that the server attached to the reason.
        report: of an adapter that was refused: what every check found; None otherwise.
        upload_id: of an upload that broke, to go on with it: `push(…, upload_id=…)`; empty if that is no use.
    """

    default_code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str = "",
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] = MappingProxyType({}),
        report: ValidationReport | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.reason = reason
        self.field_violations = field_violations
        self.retry_after_s = retry_after_s
        self.metadata = metadata
        self.report = report
        self.upload_id = ""


class InvalidArgumentError(QuickchangeError):
    """A parameter, name, tensor or prompt is wrong."""

    default_code = "INVALID_ARGUMENT"


class AdapterDirectoryError(InvalidArgumentError):
    """The local folder to upload from, or to download into, is not what it has to be."""


class OutOfRangeError(QuickchangeError):
    """A chunk is not where the upload stands."""

    default_code = "OUT_OF_RANGE"


class NotFoundError(QuickchangeError):
    """No such adapter, version or alias."""

    default_code = "NOT_FOUND"


class AlreadyExistsError(QuickchangeError):
    """A fixed version already holds other content."""

    default_code = "ALREADY_EXISTS"


class FailedPreconditionError(QuickchangeError):
    """The adapter was made for another base, or by a method that the server cannot apply."""

    default_code = "FAILED_PRECONDITION"


class AbortedError(QuickchangeError):
    """The adapter changed since it was read."""

    default_code = "ABORTED"


class ResourceExhaustedError(QuickchangeError):
    """A queue, a quota or the disk is full."""

    default_code = "RESOURCE_EXHAUSTED"


class DataLossError(QuickchangeError):
    """Bytes are not what their checksum says."""

    default_code = "DATA_LOSS"


class DeadlineExceededError(QuickchangeError):
    """The time-out passed before the answer was complete."""

    default_code = "DEADLINE_EXCEEDED"


class UnavailableError(QuickchangeError):
    """Nobody answers at the address, or the server is going away."""

    default_code = "UNAVAILABLE"


class UnauthenticatedError(QuickchangeError):
    """No token, or a wrong one."""

    default_code = "UNAUTHENTICATED"


class PermissionDeniedError(QuickchangeError):
    """The token does not allow this."""

    default_code = "PERMISSION_DENIED"


class CancelledError(QuickchangeError):
    """The call was cancelled, here or by the server."""

    default_code = "CANCELLED"


class UnimplementedError(QuickchangeError):
    """The server does not have this method."""

    default_code = "UNIMPLEMENTED"


class InternalError(QuickchangeError):
    """The server failed; its log says why."""

    default_code = "INTERNAL"


_BY_CODE: Mapping[str, type[QuickchangeError]] = {
    cls.default_code: cls for cls in QuickchangeError.__subclasses__()
}


def from_rpc(error: grpc.RpcError) -> QuickchangeError:
    """The error that a failed call stands for, details included. Works for grpc and for grpc.aio."""
    call = cast(grpc.Call, error)  # every RpcError that a stub raises is also a Call
    code, message = call.code().name, call.details() or ""
    if code == "UNAVAILABLE" and message.startswith(_NEVER_CONNECTED):
        if any(sign in message for sign in _NO_HANDSHAKE):
            return _no_handshake(message)
        return UnavailableError(f"no server answers: {message}", reason=NO_CONNECTION)
    if code == "DEADLINE_EXCEEDED" and message == _DEADLINE_HERE:
        return DeadlineExceededError("the time-out passed before the answer was complete; allow more time")
    if code == "CANCELLED" and message == _NEVER_TAKEN:
        return UnavailableError("the server shut down before it took the call", reason=DRAINING)
    details = _Details.of(_rich_status(call))
    return _BY_CODE.get(code, QuickchangeError)(
        message or f"the server answered {code} without a message",
        code=code,
        reason=details.reason,
        field_violations=details.field_violations,
        retry_after_s=details.retry_after_s,
        metadata=details.metadata,
        report=details.report,
    )


def _no_handshake(message: str) -> UnavailableError:
    why = next(text for sign, text in _NO_HANDSHAKE.items() if sign in message)
    return UnavailableError(
        f"no TLS connection: {why} ({message[len(_NEVER_CONNECTED) :].lstrip('; ')})", reason=TLS_FAILED
    )


@contextmanager
def translated() -> Iterator[None]:
    """Raises a QuickchangeError in place of the RpcError that the block raises."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from error


def _rich_status(call: grpc.Call) -> status_pb2.Status:
    try:
        return rpc_status.from_call(call) or status_pb2.Status()
    except (ValueError, DecodeError):  # a proxy rewrote code or message: the plain ones count
        return status_pb2.Status()


@dataclass(slots=True)
class _Details:
    """What google.rpc details say; anything absent keeps its empty value."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    field_violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None
    report: ValidationReport | None = None

    @classmethod
    def of(cls, status: status_pb2.Status) -> "_Details":
        found = cls()
        info = error_details_pb2.ErrorInfo()
        request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        report = adapters_pb2.ValidationReport()
        for detail in status.details:
            if detail.Unpack(info) and info.domain == DOMAIN:
                found.reason, found.metadata = info.reason, MappingProxyType(dict(info.metadata))
            elif detail.Unpack(request):
                found.field_violations = tuple(
                    FieldViolation(v.field, v.description) for v in request.field_violations
                )
            elif detail.Unpack(retry):
                found.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
            elif detail.Unpack(report):
                found.report = validation_report(report)
        return found
