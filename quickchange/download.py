"""Puts a downloaded adapter on disk, whole and checked, or not at all, over as many calls as it takes.

Knows nothing of channels.
"""

from pathlib import Path
from types import TracebackType

from quickchange import answers
from quickchange.connection import Attempts
from quickchange.errors import (
    AdapterDirectoryError,
    DataLossError,
    NotFoundError,
    QuickchangeError,
    UnavailableError,
)
from quickchange.partial import IncomingFile, PartialFolder, broken, require_allowed
from quickchange.types import Adapter, PullResult
from quickchange.v1 import adapters_pb2


class Download:
    """Collects a download in a hidden folder beside its destination; `commit` moves it there in one step.

    Use as a context manager. Left without `commit`, what has arrived stays for a later download into the same
    destination, unless it is wrong or its adapter is gone.

    Raises:
        AdapterDirectoryError: the destination is there already and is not an empty folder, or another
            process downloads into it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = _free(directory)
        self._partial = PartialFolder(self._directory)
        self._kept = self._partial.header()
        self._adapter: Adapter | None = None
        self._files: list[IncomingFile] = []
        self._expects_header = False
        self._had_bytes = 0
        self._resumed_bytes = 0

    def __enter__(self) -> "Download":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        # Of an earlier process's files that nobody looked at yet, nothing is known to be wrong.
        useless = isinstance(error, DataLossError | NotFoundError)
        if useless or (self._kept is None and self.received_bytes == 0):
            self._partial.discard()
        self._partial.close()

    @property
    def has_kept(self) -> bool:
        """An earlier download into the same destination left something."""
        return self._kept is not None

    @property
    def size_bytes(self) -> int:
        """Of all files together; 0 before the header."""
        return sum(file.size_bytes for file in self._files)

    @property
    def received_bytes(self) -> int:
        return sum(file.received_bytes for file in self._files)

    def go_on_with(self, adapter: Adapter) -> None:
        """Takes up what an earlier download left, if it is of this adapter; reads all of it."""
        kept, self._kept = self._kept, None
        if kept is None or kept.adapter.digest != adapter.digest:
            return
        try:
            self._files = list(self._partial.files(kept))
        except DataLossError:
            return  # longer than promised: it will be begun anew
        self._adapter = adapter
        self._resumed_bytes = self.received_bytes

    def request(self, reference: str) -> adapters_pb2.DownloadAdapterRequest:
        """What to ask for: all of `reference`, or once its header was there, what is missing of it."""
        self._expects_header = True
        self._had_bytes = self.received_bytes
        if self._adapter is None:
            return adapters_pb2.DownloadAdapterRequest(adapter=reference)
        return adapters_pb2.DownloadAdapterRequest(
            adapter=self._adapter.reference, committed_offsets=[file.received_bytes for file in self._files]
        )

    def after(self, error: QuickchangeError, attempts: Attempts) -> Attempts:
        """What is left to go on with after a call ended with an error; the time counts anew after progress.

        Raises:
            QuickchangeError: the given one, if it did not break in the middle.
        """
        if self._adapter is None or not isinstance(error, UnavailableError):
            raise error
        return attempts.renewed() if self.received_bytes > self._had_bytes else attempts

    def receive(self, response: adapters_pb2.DownloadAdapterResponse) -> None:
        """Takes the next message.

        Raises:
            DataLossError: it does not continue what came before, or its checksum is wrong.
            AdapterDirectoryError: another process began to download into the same destination.
        """
        match response.WhichOneof("message"):
            case "header":
                self._open(response.header)
            case "chunk":
                self._write(response.chunk)

    def commit(self) -> PullResult:
        """Checks everything, and lets the folder appear.

        Raises:
            DataLossError: a file is incomplete or is not what the header promised.
        """
        if self._adapter is None:
            raise broken("ended before its header")
        for file in self._files:
            file.finish()
        self._partial.become()
        return PullResult(self._adapter, self._directory, self.size_bytes, self._resumed_bytes)

    def _open(self, header: adapters_pb2.DownloadHeader) -> None:
        if not self._expects_header:
            raise broken("has a second header")
        self._expects_header = False
        if self._adapter is not None:
            self._check_same(header)
            return
        require_allowed(header)
        self._adapter = answers.adapter(header.adapter)
        self._files = list(self._partial.begin(header))

    def _check_same(self, header: adapters_pb2.DownloadHeader) -> None:
        promised = [(file.name, file.size_bytes, file.sha256) for file in header.files]
        if promised != [file.promised for file in self._files]:
            raise broken("went on with another adapter")

    def _write(self, chunk: adapters_pb2.UploadChunk) -> None:
        if chunk.file_index >= len(self._files):
            raise broken(f"has a chunk of file {chunk.file_index}, which its header does not list")
        self._files[chunk.file_index].write(chunk)


def _free(directory: Path) -> Path:
    """The folder, which is not there, or is empty and can be replaced by another of its name."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise AdapterDirectoryError(
            f"{directory} is there already and not an empty folder; choose another one, or remove it",
            reason="FOLDER_EXISTS",
        )
    if directory.resolve() == Path.cwd():
        raise AdapterDirectoryError(
            f"{directory} is the current folder, which cannot be replaced; name another one, as ./adapter",
            reason="FOLDER_EXISTS",
        )
    return directory
