"""One upload from beginning to end, over as many calls as it takes. Knows no folders and no command line."""

import time
from collections.abc import Iterator, Sequence

from quickchange.calls import Calls
from quickchange.connection import Attempts
from quickchange.errors import (
    CancelledError,
    DeadlineExceededError,
    NotFoundError,
    OutOfRangeError,
    QuickchangeError,
    UnavailableError,
    UnimplementedError,
)
from quickchange.progress import Report
from quickchange.upload import UploadPlan
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc

_WORTH_GOING_ON = ("UPLOAD_STALLED", "UPLOAD_BUSY")
_UNDECIDED = "CANARY_NOT_REPLAYED"
"""The server was too busy for the last check; it has all the bytes, and keeps them for a while."""


class Push:
    """Sends a plan; after a cut it asks where the upload stands and goes on from there.

    Args:
        attempts: how often and how long to come back; the time counts anew whenever the upload got further.
    """

    def __init__(
        self,
        calls: Calls,
        stub: adapters_pb2_grpc.AdapterServiceStub,
        plan: UploadPlan,
        header: adapters_pb2.UploadHeader,
        report: Report,
        attempts: Attempts,
    ) -> None:
        self._calls = calls
        self._stub = stub
        self._plan = plan
        self._header = header
        self._report = report
        self._attempts = attempts
        self._has_sent = False

    def run(self, *, begun: bool) -> adapters_pb2.UploadAdapterResponse:
        """The answer to the whole upload.

        Args:
            begun: an earlier process may have sent part of it.

        Raises:
            QuickchangeError: with an upload_id if it can go on later.
        """
        try:
            return self._run(self._committed() if begun else self._nothing())
        except QuickchangeError as error:
            ended_here = isinstance(error, DeadlineExceededError | CancelledError)
            if self._has_sent and (is_cut(error) or ended_here or error.reason == _UNDECIDED):
                error.upload_id = self._header.upload_id
            raise

    def _run(self, offsets: Sequence[int]) -> adapters_pb2.UploadAdapterResponse:
        while True:
            try:
                return self._calls.client_stream(
                    self._stub.UploadAdapter, self._messages(offsets), self._attempts.remaining_s()
                )
            except QuickchangeError as error:
                offsets = self._after(error, offsets)

    def _after(self, error: QuickchangeError, offsets: Sequence[int]) -> Sequence[int]:
        """Where to go on, when it is time to."""
        if not is_cut(error):
            time.sleep(self._attempts.delay_s(error))
            return self._committed() if error.reason == _UNDECIDED else offsets
        committed = self._committed()
        if sum(committed) > sum(offsets):
            self._attempts = self._attempts.renewed()
        time.sleep(self._attempts.pause_s(error))
        return committed

    def _committed(self) -> Sequence[int]:
        request = adapters_pb2.QueryUploadRequest(upload_id=self._header.upload_id)
        try:
            response = self._calls.unary(self._stub.QueryUpload, request, self._attempts.renewed())
        except (NotFoundError, UnimplementedError):  # nothing is left of it, or an old server keeps nothing
            return self._nothing()
        return response.committed_offsets

    def _nothing(self) -> Sequence[int]:
        return (0,) * len(self._header.files)

    def _messages(self, offsets: Sequence[int]) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        sent_bytes = sum(offsets)
        for message in self._plan.messages(self._header, offsets):
            yield message
            self._has_sent = True
            sent_bytes += len(message.chunk.data)
            self._report(sent_bytes, self._plan.size_bytes)


def is_cut(error: QuickchangeError) -> bool:
    """Whether an upload broke on its way, so that it can go on from where the server has it."""
    # OutOfRange: the server still took chunks from the old connection after it was asked where it stood.
    return isinstance(error, UnavailableError | OutOfRangeError) or error.reason in _WORTH_GOING_ON
