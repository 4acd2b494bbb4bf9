"""The adapters of a server: uploading, naming, loading, downloading; blocking. Does not know the model."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from quickchange import answers, requests
from quickchange.calls import Calls, ResponseStream
from quickchange.download import Download
from quickchange.errors import QuickchangeError
from quickchange.progress import Progress, reporting
from quickchange.push import Push
from quickchange.types import (
    Adapter,
    AdapterEvent,
    AdapterState,
    Collection,
    PullResult,
    Residency,
    UploadResult,
)
from quickchange.upload import UploadPlan, new_upload_id
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc


class AdapterClient:
    """Reached as `client.adapters`.

    A reference is "name" (its newest version), "name@3", "name:alias" or a digest.
    Every method raises a QuickchangeError; NotFoundError if the reference names nothing.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._stub = adapters_pb2_grpc.AdapterServiceStub(calls.channel)

    def push(
        self,
        directory: str | Path,
        name: str,
        *,
        version: int | None = None,
        labels: Mapping[str, str] | None = None,
        description: str = "",
        validate_only: bool = False,
        progress: Progress = False,
        retries: int = 0,
        timeout_s: float | None = None,
        upload_id: str | None = None,
    ) -> UploadResult:
        """Uploads the adapter in a folder; it can be asked for as soon as this returns.

        Args:
            version: None for the next one. A fixed one must be free, or hold this very content.
            validate_only: runs every check and publishes nothing.
            progress: True for a bar on standard error, or a function of bytes sent and bytes in all.
            retries: how often to come back when the server has too many uploads, after the time it asks for.
            upload_id: of an upload that broke in another process, to go on with it; a new one by default.

        A connection that breaks does not end it: it goes on from what the server has, as long as the server
        comes back within the client's retry window. The file must not change meanwhile.

        Raises:
            InvalidArgumentError, FailedPreconditionError: the adapter was refused; `report` says all that is
                wrong with it.
        """
        plan = UploadPlan.of(Path(directory))
        header = plan.header(
            name,
            upload_id=upload_id or new_upload_id(),
            version=version,
            labels=labels,
            description=description,
            validate_only=validate_only,
        )
        # The same content is the same version, so sending all of it again does no harm.
        attempts = self._calls.endpoint.attempts(repeatable=True, timeout_s=timeout_s, retries=retries)
        with reporting(progress, f"push {name}") as report:
            push = Push(self._calls, self._stub, plan, header, report, attempts)
            return answers.upload_result(push.run(begun=upload_id is not None))

    def cancel_upload(self, upload_id: str) -> None:
        """Removes what the server keeps of an upload that broke.

        Raises:
            NotFoundError: it keeps nothing of it.
            FailedPreconditionError: it is published already; delete that version instead.
        """
        self._calls.unary(self._stub.CancelUpload, adapters_pb2.CancelUploadRequest(upload_id=upload_id))

    def pull(
        self,
        reference: str,
        directory: str | Path,
        *,
        progress: Progress = False,
        timeout_s: float | None = None,
    ) -> PullResult:
        """Downloads an adapter; the folder appears whole and checked, or not at all.

        A connection that breaks does not end it: it goes on from what has arrived, as long as the server
        comes back within the client's retry window. What has arrived when that, or this process, ends is
        kept in a hidden folder beside `directory`; the next pull of the same adapter into it goes on from it.

        Raises:
            AdapterDirectoryError: the folder is there and not empty, or another process pulls into it.
            DataLossError: what arrived is not what was promised; nothing is kept.
        """
        attempts = self._calls.endpoint.attempts(repeatable=True, timeout_s=timeout_s)
        with Download(Path(directory)) as download, reporting(progress, f"pull {reference}") as report:
            if download.has_kept:
                download.go_on_with(self.get(reference))
            while True:
                request = download.request(reference)
                responses = self._calls.server_stream(self._stub.DownloadAdapter, request, attempts)
                try:
                    for response in responses:
                        download.receive(response)
                        report(download.received_bytes, download.size_bytes)
                    return download.commit()
                except QuickchangeError as error:
                    attempts = download.after(error, attempts)
                    time.sleep(attempts.pause_s(error))
                finally:
                    responses.close()

    def get(self, reference: str) -> Adapter:
        """The facts of one version."""
        request = adapters_pb2.GetAdapterRequest(adapter=reference)
        response = self._calls.unary(self._stub.GetAdapter, request)
        return answers.adapter(response.adapter)

    def list(
        self,
        *,
        name: str | None = None,
        state: AdapterState | str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Iterator[Adapter]:
        """Every version that fits, page by page as the iteration goes on."""
        token = ""
        while True:
            page = self._calls.unary(
                self._stub.ListAdapters,
                requests.list_adapters_request(name, state, labels, token),
            )
            yield from map(answers.adapter, page.adapters)
            token = page.next_page_token
            if not token:
                return

    def alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        etag: str | None = None,
        from_version: int | None = None,
    ) -> Adapter:
        """Points an alias at a version, in one step for every request that follows.

        Args:
            etag: of the version, as it was read.
            from_version: where the alias has to be now, so that nobody else's move is overwritten; 0 for
                nowhere.

        Raises:
            AbortedError: `etag` is given and the version changed since it was read, or the alias is not at
                `from_version`.
        """
        return self._update(
            requests.update_adapter_request(
                f"{name}@{version}", etag=etag, set_aliases=[alias], aliases_from=from_version
            )
        )

    def remove_alias(self, name: str, alias: str, *, etag: str | None = None) -> Adapter:
        """Takes an alias away from whichever version has it."""
        reference = f"{name}:{alias}"
        return self._update(requests.update_adapter_request(reference, etag=etag, remove_aliases=[alias]))

    def pin(self, reference: str) -> Adapter:
        """Keeps a version on the device: it is never evicted."""
        return self._update(requests.update_adapter_request(reference, pinned=True))

    def unpin(self, reference: str) -> Adapter:
        """Lets a version be evicted again."""
        return self._update(requests.update_adapter_request(reference, pinned=False))

    def set_labels(self, reference: str, labels: Mapping[str, str], *, etag: str | None = None) -> Adapter:
        """Replaces all labels."""
        return self._update(requests.update_adapter_request(reference, etag=etag, labels=labels))

    def load(self, reference: str, tier: Residency | str = Residency.DEVICE) -> Adapter:
        """Brings an adapter to the device, or to host memory, now: the next request does not wait for disk.

        Raises:
            ResourceExhaustedError: no room while the others there are in use, or no such tier.
        """
        request = requests.load_adapter_request(reference, tier)
        response = self._calls.unary(self._stub.LoadAdapter, request)
        return answers.adapter(response.adapter)

    def unload(self, reference: str, tier: Residency | str = Residency.DISK) -> Adapter:
        """Lets an adapter leave memory, or go to that of the host; the next request for it loads it again.

        Nothing happens while a request uses it; the answer says where it is.
        """
        request = requests.unload_adapter_request(reference, tier)
        response = self._calls.unary(self._stub.UnloadAdapter, request)
        return answers.adapter(response.adapter)

    def delete(self, reference: str, *, all_versions: bool = False, etag: str | None = None) -> int:
        """Deletes a version ("name@3"), or all of a name's; running requests finish. Returns how many."""
        request = adapters_pb2.DeleteAdapterRequest(adapter=reference, all_versions=all_versions, etag=etag)
        response = self._calls.unary(
            self._stub.DeleteAdapter, request, self._calls.endpoint.attempts(repeatable=False)
        )
        return response.deleted_versions

    def watch(self, *, send_initial: bool = False) -> "AdapterWatch":
        """Changes of adapters as they happen, whoever makes them, until the watch is closed.

        A reader that is slow gets the last of several changes of one version.

        Args:
            send_initial: begins with one event per version that is there, so that nothing is missed between
                a list and the watch.

        The iteration raises UnavailableError when the server goes away: watch again, with `send_initial`.
        """
        request = adapters_pb2.WatchAdaptersRequest(send_initial=send_initial)
        attempts = self._calls.endpoint.unlimited_attempts()
        return AdapterWatch(self._calls.server_stream(self._stub.WatchAdapters, request, attempts))

    def collect_garbage(
        self, *, keep_versions: int | None = None, min_age_s: float | None = None, dry_run: bool = False
    ) -> Collection:
        """Deletes old versions; those with an alias, a pin or the label "keep" stay.

        Args:
            keep_versions: so many of the newest ready versions of a name stay; None is the server's setting.
            min_age_s: whatever is younger stays; None is the server's setting.
            dry_run: changes nothing, and tells what would go.
        """
        request = requests.collect_garbage_request(keep_versions, min_age_s, dry_run=dry_run)
        attempts = self._calls.endpoint.attempts(repeatable=dry_run)
        return answers.collection(self._calls.unary(self._stub.CollectGarbage, request, attempts))

    def _update(self, request: adapters_pb2.UpdateAdapterRequest) -> Adapter:
        # After a success that got lost, a second sending would find another etag, or an alias elsewhere.
        guarded = request.HasField("etag") or request.HasField("aliases_from")
        repeatable = not guarded and not request.remove_aliases
        attempts = self._calls.endpoint.attempts(repeatable=repeatable)
        response = self._calls.unary(self._stub.UpdateAdapter, request, attempts)
        return answers.adapter(response.adapter)


class AdapterWatch:
    """Iterate it for events; closing it, or leaving its `with` block, ends the watch."""

    def __init__(self, responses: ResponseStream[adapters_pb2.WatchAdaptersResponse]) -> None:
        self._responses = responses

    def __iter__(self) -> Iterator[AdapterEvent]:
        return self

    def __next__(self) -> AdapterEvent:
        return answers.adapter_event(next(self._responses))

    def close(self) -> None:
        """Ends the watch; safe to call from another thread, and more than once."""
        self._responses.close()

    def __enter__(self) -> "AdapterWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
