"""Every way a request can fail. Knows nothing of gRPC; the services map these to statuses.

ServerError
├── InvalidRequestError    a field is out of its range
├── UnsupportedFeatureError  a field asks for what this server does not have yet
├── QueueFullError         try again after a while
├── RateLimitError         the token's own limit is reached
├── UnauthenticatedError   no token, or none that counts
├── PermissionDeniedError  the token is not for this
├── DrainingError          this server is going away
├── EngineDownError        the engine died
├── AdapterLoadError       its adapter could not be brought to the device
│   └── AdapterMemoryError     because there was no memory for it
├── DeadlineError          the deadline passed before the end
├── UploadNotFoundError    no upload with this id
├── UploadStateError       the upload with this id is not what the call takes it for
├── UploadAbortedError     another call has the upload now
└── RequestFailedError     this request alone failed inside; its batch-mates go on
    └── RequestMemoryError     because there was no memory for it
"""

from adapters.errors import OUT_OF_MEMORY, AdapterError


class ServerError(Exception):
    """Base of all request errors; the message is one line with the value and the remedy."""

    reason = "SERVER_ERROR"
    code = "INTERNAL"
    """Name of the status it ends with, for metrics."""


class InvalidRequestError(ServerError):
    """A field is out of its range."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.description = message


class UnsupportedFeatureError(ServerError):
    """A field asks for what this server does not have yet."""

    reason = "UNSUPPORTED_FEATURE"


class QueueFullError(ServerError):
    """The waiting queue is full."""

    reason = "QUEUE_FULL"
    is_quota = False
    """Whether a limit of the server's settings was reached, which the status then names."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitError(ServerError):
    """The caller's token has used up what it may use for now.

    Args:
        retry_after_s: when there is enough again; None if there never will be for this request.
        reason: REQUESTS_PER_MINUTE or TOKENS_PER_MINUTE.
    """

    def __init__(self, message: str, retry_after_s: float | None, reason: str) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class UnauthenticatedError(ServerError):
    """Nobody knows who calls.

    Args:
        reason: TOKEN_MISSING, TOKEN_INVALID or TOKEN_EXPIRED.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class PermissionDeniedError(ServerError):
    """The caller is known, and may not do this.

    Args:
        reason: SCOPE_MISSING, TENANT_NOT_ALLOWED, or METHOD_NOT_ALLOWED, which nobody may call.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class DrainingError(ServerError):
    """The server finishes what runs and admits nothing new."""

    reason = "DRAINING"


class EngineDownError(ServerError):
    """The engine's thread ended; the process is about to exit."""

    reason = "ENGINE_DOWN"
    code = "UNAVAILABLE"


class AdapterLoadError(ServerError):
    """The request's adapter could not be brought to the device."""

    reason = "ADAPTER_LOAD_FAILED"
    code = "FAILED_PRECONDITION"

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"the adapter could not be loaded: {cause}")
        self.cause = cause


class AdapterMemoryError(AdapterLoadError):
    """The device or the host had no memory for the request's adapter."""

    code = "RESOURCE_EXHAUSTED"


def load_error_of(cause: AdapterError) -> AdapterLoadError:
    """What requests end with whose adapter could not be loaded."""
    return (AdapterMemoryError if cause.reason == OUT_OF_MEMORY else AdapterLoadError)(cause)


class DeadlineError(ServerError):
    """The request's deadline passed before its end."""

    reason = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"


class UploadNotFoundError(ServerError):
    """No upload with this id, or no longer."""

    reason = "UPLOAD_NOT_FOUND"


class UploadStateError(ServerError):
    """The upload with this id is not what the call takes it for.

    Args:
        reason: UPLOAD_MISMATCH, begun with another header; UPLOAD_COMPLETE, published already.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class UploadAbortedError(ServerError):
    """Another call has the upload now.

    Args:
        reason: UPLOAD_SUPERSEDED, a newer stream goes on with it; UPLOAD_CANCELLED; UPLOAD_BUSY, a stream to
            another server has it.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RequestFailedError(ServerError):
    """An unexpected failure of this request alone."""

    reason = "REQUEST_FAILED"


class RequestMemoryError(RequestFailedError):
    """There was no memory to compute this request."""

    reason = OUT_OF_MEMORY
    code = "RESOURCE_EXHAUSTED"
