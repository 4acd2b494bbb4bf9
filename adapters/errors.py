"""Every way an adapter or a base can be wrong. Knows nothing of gRPC; the services map these to statuses.

AdapterError
├── InvalidAdapterError      malformed: name, configuration, tensor, shape, value
├── UnsupportedAdapterError  well-formed, but this server cannot apply it
├── WrongBaseError           made for another base
├── CanaryMismatchError      it does not answer here as it did where it was trained
├── AdapterNotFoundError     no such name, version, alias or digest
├── AdapterExistsError       a fixed version holds other content
├── StaleEtagError           changed since it was read
├── AdapterCorruptError      bytes on disk or on the wire are not what their checksum says
├── UploadOffsetError        a chunk is not where the upload stands
├── ChangesLostError         whoever follows a store is too far behind
├── StoreUnreachableError    a store elsewhere does not answer, or not with what it should
├── ReadOnlyStoreError       it is changed elsewhere
└── CapacityError            no room (bytes, quota, disk)
BaseModelError
├── BaseNotFoundError        the source is not there or cannot be read
├── BaseTooLargeError        there is not enough memory for it
└── UnsupportedBaseError     it is there and cannot be served or quantised
"""

from collections.abc import Iterable

from adapters.report import MAX_LISTED, ValidationReport

OUT_OF_MEMORY = "OUT_OF_MEMORY"
"""Reason of errors that memory of device or host was not there for."""


class AdapterError(Exception):
    """Base of all adapter errors.

    Args:
        message: one line with the name, the value and the remedy.
        reason: UPPER_SNAKE code that clients may switch on.

    Attributes:
        problems: the message, and those of whatever else the same check found; at most MAX_LISTED.
        problem_count: how many there are in all.
        report: what all checks found; None unless a validation refused the adapter.
    """

    default_reason = "ADAPTER_ERROR"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason
        self.problems: tuple[str, ...] = (message,)
        self.problem_count = 1
        self.report: ValidationReport | None = None


class InvalidAdapterError(AdapterError):
    """Malformed: name, configuration, tensor, shape or value."""

    default_reason = "INVALID_ADAPTER"


class UnsupportedAdapterError(AdapterError):
    """Well-formed, but of a kind this server cannot apply.

    Args:
        feature: what it is that cannot be applied, as the adapter's files name it.
    """

    default_reason = "UNSUPPORTED_ADAPTER"

    def __init__(self, message: str, *, feature: str) -> None:
        super().__init__(message)
        self.feature = feature


class WrongBaseError(AdapterError):
    """Trained for another base than the resident one."""

    default_reason = "WRONG_BASE"


class CanaryMismatchError(AdapterError):
    """It does not answer here as it did where it was trained."""

    default_reason = "CANARY_MISMATCH"


class AdapterNotFoundError(AdapterError):
    """No such name, version, alias or digest."""

    default_reason = "ADAPTER_NOT_FOUND"


class AdapterExistsError(AdapterError):
    """A fixed version already holds other content."""

    default_reason = "ADAPTER_EXISTS"


class StaleEtagError(AdapterError):
    """The adapter changed since the caller read it."""

    default_reason = "STALE_ETAG"


class AdapterCorruptError(AdapterError):
    """Bytes are not what their checksum says."""

    default_reason = "CHECKSUM_MISMATCH"


class UploadOffsetError(AdapterError):
    """A chunk does not continue where the upload stands."""

    default_reason = "WRONG_OFFSET"


class ChangesLostError(AdapterError):
    """Whoever follows the changes of a store fell so far behind that some are not known any more."""

    default_reason = "CHANGES_LOST"


class StoreUnreachableError(AdapterError):
    """A store at a URL cannot be read or written now."""

    default_reason = "STORE_UNREACHABLE"


class ReadOnlyStoreError(AdapterError):
    """A change was asked of a copy, and copies follow the store that they are of."""

    default_reason = "STORE_READ_ONLY"


class CapacityError(AdapterError):
    """No room: bytes, quota or disk."""

    default_reason = "NO_CAPACITY"


def raise_first(faults: Iterable[AdapterError]) -> None:
    """Raises the first fault, if there is one, with the messages of all as its problems."""
    first: AdapterError | None = None
    problems: list[str] = []
    count = 0
    for count, fault in enumerate(faults, start=1):
        first = first or fault
        if count <= MAX_LISTED:
            problems.append(str(fault))
    if first is not None:
        first.problems, first.problem_count = tuple(problems), count
        raise first


class BaseModelError(Exception):
    """Base of all errors about the base model; the message names the source and the remedy."""


class BaseNotFoundError(BaseModelError):
    """The source is not there or cannot be read."""


class UnsupportedBaseError(BaseModelError):
    """The source is there and cannot be served or quantised as asked."""


class BaseTooLargeError(BaseModelError):
    """There is not enough memory for it here."""
