"""The adapters of a server, for asyncio. Mirrors adapter_client.py method by method."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType

from quickchange import answers, requests
from quickchange.adapter_client import AdapterClient
from quickchange.aio_calls import AsyncCalls, AsyncResponseStream
from quickchange.calls import Calls
from quickchange.download import Download
from quickchange.errors import QuickchangeError
from quickchange.progress import Progress, reporting
from quickchange.types import (
    Adapter,
    AdapterEvent,
    AdapterState,
    Collection,
    PullResult,
    Residency,
    UploadResult,
)
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc


class AsyncAdapterClient:
    """Reached as `client.adapters`.

    A reference is "name" (its newest version), "name@3", "name:alias" or a digest.
    Every method raises a QuickchangeError; NotFoundError if the reference names nothing.
    """

    def __init__(self, calls: AsyncCalls) -> None:
        self._calls = calls

    @cached_property
    def _stub(self) -> "adapters_pb2_grpc.AdapterServiceAsyncStub":
        return adapters_pb2_grpc.AdapterServiceStub(self._calls.channel)

    async def push(
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
        # grpc.aio replaces a status that comes before all is sent by one of its own ("Internal error from
        # Core"), and hashing needs a thread anyway: so the blocking client does it.
        calls = Calls(self._calls.endpoint)
        try:
            return await asyncio.to_thread(
                AdapterClient(calls).push,
                directory,
                name,
                version=version,
                labels=labels,
                description=description,
                validate_only=validate_only,
                progress=_on_this_loop(progress),
                retries=retries,
                timeout_s=timeout_s,
                upload_id=upload_id,
            )
        finally:
            calls.close()  # ends the thread if this task was cancelled

    async def cancel_upload(self, upload_id: str) -> None:
        """Removes what the server keeps of an upload that broke.

        Raises:
            NotFoundError: it keeps nothing of it.
            FailedPreconditionError: it is published already; delete that version instead.
        """
        request = adapters_pb2.CancelUploadRequest(upload_id=upload_id)
        await self._calls.unary(self._stub.CancelUpload, request)

    async def pull(
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
                await asyncio.to_thread(download.go_on_with, await self.get(reference))
            while True:
                request = download.request(reference)
                responses = self._calls.server_stream(self._stub.DownloadAdapter, request, attempts)
                try:
                    async for response in responses:
                        await asyncio.to_thread(download.receive, response)
                        report(download.received_bytes, download.size_bytes)
                    return await asyncio.to_thread(download.commit)
                except QuickchangeError as error:
                    attempts = download.after(error, attempts)
                    await asyncio.sleep(attempts.pause_s(error))
                finally:
                    responses.close()

    async def get(self, reference: str) -> Adapter:
        """The facts of one version."""
        request = adapters_pb2.GetAdapterRequest(adapter=reference)
        response = await self._calls.unary(self._stub.GetAdapter, request)
        return answers.adapter(response.adapter)

    async def list(
        self,
        *,
        name: str | None = None,
        state: AdapterState | str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Adapter]:
        """Every version that fits, page by page as the iteration goes on."""
        token = ""
        while True:
            page = await self._calls.unary(
                self._stub.ListAdapters,
                requests.list_adapters_request(name, state, labels, token),
            )
            for message in page.adapters:
                yield answers.adapter(message)
            token = page.next_page_token
            if not token:
                return

    async def alias(
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
        return await self._update(
            requests.update_adapter_request(
                f"{name}@{version}", etag=etag, set_aliases=[alias], aliases_from=from_version
            )
        )

    async def remove_alias(self, name: str, alias: str, *, etag: str | None = None) -> Adapter:
        """Takes an alias away from whichever version has it."""
        reference = f"{name}:{alias}"
        return await self._update(
            requests.update_adapter_request(reference, etag=etag, remove_aliases=[alias])
        )

    async def pin(self, reference: str) -> Adapter:
        """Keeps a version on the device: it is never evicted."""
        return await self._update(requests.update_adapter_request(reference, pinned=True))

    async def unpin(self, reference: str) -> Adapter:
        """Lets a version be evicted again."""
        return await self._update(requests.update_adapter_request(reference, pinned=False))

    async def set_labels(
        self, reference: str, labels: Mapping[str, str], *, etag: str | None = None
    ) -> Adapter:
        """Replaces all labels."""
        return await self._update(requests.update_adapter_request(reference, etag=etag, labels=labels))

    async def load(self, reference: str, tier: Residency | str = Residency.DEVICE) -> Adapter:
        """Brings an adapter to the device, or to host memory, now: the next request does not wait for disk.

        Raises:
            ResourceExhaustedError: no room while the others there are in use, or no such tier.
        """
        request = requests.load_adapter_request(reference, tier)
        response = await self._calls.unary(self._stub.LoadAdapter, request)
        return answers.adapter(response.adapter)

    async def unload(self, reference: str, tier: Residency | str = Residency.DISK) -> Adapter:
        """Lets an adapter leave memory, or go to that of the host; the next request for it loads it again.

        Nothing happens while a request uses it; the answer says where it is.
        """
        request = requests.unload_adapter_request(reference, tier)
        response = await self._calls.unary(self._stub.UnloadAdapter, request)
        return answers.adapter(response.adapter)

    async def delete(self, reference: str, *, all_versions: bool = False, etag: str | None = None) -> int:
        """Deletes a version ("name@3"), or all of a name's; running requests finish. Returns how many."""
        request = adapters_pb2.DeleteAdapterRequest(adapter=reference, all_versions=all_versions, etag=etag)
        response = await self._calls.unary(
            self._stub.DeleteAdapter, request, self._calls.endpoint.attempts(repeatable=False)
        )
        return response.deleted_versions

    def watch(self, *, send_initial: bool = False) -> "AsyncAdapterWatch":
        """Changes of adapters as they happen, whoever makes them, until the watch is closed.

        A reader that is slow gets the last of several changes of one version.

        Args:
            send_initial: begins with one event per version that is there, so that nothing is missed between
                a list and the watch.

        The iteration raises UnavailableError when the server goes away: watch again, with `send_initial`.
        """
        request = adapters_pb2.WatchAdaptersRequest(send_initial=send_initial)
        attempts = self._calls.endpoint.unlimited_attempts()
        return AsyncAdapterWatch(self._calls.server_stream(self._stub.WatchAdapters, request, attempts))

    async def collect_garbage(
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
        return answers.collection(await self._calls.unary(self._stub.CollectGarbage, request, attempts))

    async def _update(self, request: adapters_pb2.UpdateAdapterRequest) -> Adapter:
        # After a success that got lost, a second sending would find another etag, or an alias elsewhere.
        guarded = request.HasField("etag") or request.HasField("aliases_from")
        repeatable = not guarded and not request.remove_aliases
        attempts = self._calls.endpoint.attempts(repeatable=repeatable)
        response = await self._calls.unary(self._stub.UpdateAdapter, request, attempts)
        return answers.adapter(response.adapter)


class AsyncAdapterWatch:
    """Iterate it for events; closing it, or leaving its `async with` block, ends the watch."""

    def __init__(self, responses: AsyncResponseStream[adapters_pb2.WatchAdaptersResponse]) -> None:
        self._responses = responses

    def __aiter__(self) -> AsyncIterator[AdapterEvent]:
        return self

    async def __anext__(self) -> AdapterEvent:
        return answers.adapter_event(await anext(self._responses))

    async def close(self) -> None:
        """Ends the watch; safe to call from another task, and more than once."""
        self._responses.close()

    async def __aenter__(self) -> "AsyncAdapterWatch":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _on_this_loop(progress: Progress) -> Progress:
    """The same, to be called from another thread."""
    if isinstance(progress, bool):
        return progress
    loop = asyncio.get_running_loop()

    def report(sent_bytes: int, total_bytes: int) -> None:
        loop.call_soon_threadsafe(progress, sent_bytes, total_bytes)

    return report
