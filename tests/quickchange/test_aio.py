"""The asyncio client against the same scripted server, above all where it is not the blocking one."""

import asyncio
import inspect
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

import quickchange
from quickchange import AsyncClient, Client, DataLossError, Delta, Finished, Started
from quickchange.adapter_client import AdapterClient
from quickchange.aio_adapters import AsyncAdapterClient
from tests.quickchange.scripted import Script, downloaded, queue_full, rich, serving


@pytest_asyncio.fixture
async def aclient(target: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(target, timeout_s=20) as connected:
        yield connected


@pytest.mark.parametrize(("blocking", "other"), [(Client, AsyncClient), (AdapterClient, AsyncAdapterClient)])
def test_both_clients_offer_the_same(blocking: type, other: type) -> None:
    def methods(cls: type) -> dict[str, list[str]]:
        found = inspect.getmembers(cls, inspect.isfunction)
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in found
            if not name.startswith("_")
        }

    assert methods(blocking) == methods(other)
    assert len(methods(blocking)) >= 8


async def test_generate(aclient: AsyncClient, script: Script) -> None:
    answer = await aclient.generate("Hello", adapter="sql", max_new_tokens=4)
    assert answer.text == "SELECT 1"
    assert answer.adapter.version == 3
    assert script.requests[0].sampling.max_new_tokens == 4


async def test_stream_gives_events_then_the_whole_answer(aclient: AsyncClient) -> None:
    async with aclient.stream("Hello") as stream:
        events = [event async for event in stream]
        whole = await stream.result()
    assert [type(event) for event in events] == [Started, Delta, Delta, Delta, Finished]
    assert whole.text == "t0 t1 t2 "
    async with aclient.stream("Hello") as stream:
        assert [piece async for piece in stream.text()] == ["t0 ", "t1 ", "t2 "]


async def test_leaving_a_stream_cancels_it(aclient: AsyncClient, script: Script) -> None:
    script.endless = True
    async with aclient.stream("Hello") as stream:
        await anext(stream)
        assert not script.ended.is_set()
    assert await asyncio.to_thread(script.ended.wait, 5)


async def test_cancelling_the_task_cancels_the_call(aclient: AsyncClient, script: Script) -> None:
    script.endless = True
    task = asyncio.create_task(aclient.generate("Hello"))
    assert await asyncio.to_thread(script.begun.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(script.ended.wait, 5)


async def test_cancelling_a_reading_task_stays_a_cancellation(aclient: AsyncClient, script: Script) -> None:
    script.endless = True
    stream = aclient.stream("Hello")
    task = asyncio.create_task(stream.result())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(script.ended.wait, 5)


async def test_closing_from_another_task_is_no_cancellation_of_the_reader(
    aclient: AsyncClient, script: Script
) -> None:
    script.endless = True
    stream = aclient.stream("Hello")
    reader = asyncio.create_task(stream.result())
    await asyncio.sleep(0.1)
    await stream.close()
    with pytest.raises(quickchange.CancelledError):
        await reader


async def test_many_at_once_over_one_connection(aclient: AsyncClient) -> None:
    answers = await asyncio.gather(*(aclient.generate("x") for _ in range(20)))
    assert {answer.text for answer in answers} == {"SELECT 1"}


async def test_errors_are_decoded(aclient: AsyncClient, script: Script) -> None:
    script.failures = [rich(grpc.StatusCode.NOT_FOUND, "no adapter x", "ADAPTER_NOT_FOUND"), queue_full(0.5)]
    with pytest.raises(quickchange.NotFoundError) as caught:
        await aclient.generate("x", adapter="x")
    assert (caught.value.reason, str(caught.value)) == ("ADAPTER_NOT_FOUND", "no adapter x")
    with pytest.raises(quickchange.ResourceExhaustedError) as full:
        await aclient.stream("x").result()
    assert full.value.retry_after_s == 0.5


async def test_retries(aclient: AsyncClient, script: Script) -> None:
    gone = rich(grpc.StatusCode.UNAVAILABLE, "engine down", "ENGINE_DOWN")
    script.failures = [gone, gone]
    assert len(await aclient.models()) == 2
    script.failures = [gone]
    with pytest.raises(quickchange.UnavailableError):
        await aclient.generate("x")
    script.failures = [queue_full(0.05)]
    assert (await aclient.generate("x", retries=1)).text
    script.failures = [queue_full(0.05)]
    assert (await aclient.stream("x", retries=1).result()).text


async def test_server_that_starts_late_is_found(script: Script, free_port: int) -> None:
    async with AsyncClient(f"127.0.0.1:{free_port}", retry_window_s=10) as client:
        calls = asyncio.gather(client.generate("x"), client.stream("x").result(), client.wait_ready(10))
        await asyncio.sleep(0.4)
        assert not calls.done()
        with serving(script, free_port):
            answer, streamed, info = await asyncio.wait_for(calls, 10)
    assert (answer.text, streamed.text, info.base_model) == ("SELECT 1", "t0 t1 t2 ", "tiny")
    assert len(script.requests) == 3


async def test_nobody_there(free_port: int) -> None:
    async with AsyncClient(f"127.0.0.1:{free_port}", retry_window_s=0.2) as client:
        with pytest.raises(quickchange.UnavailableError, match="no server answers"):
            await client.generate("x")
        with pytest.raises(quickchange.DeadlineExceededError, match="no server answered"):
            await client.wait_ready(0.2)


async def test_tokenize_info_drain(aclient: AsyncClient) -> None:
    assert (await aclient.tokenize("Hi")).token_ids == (1, 2, 3)
    assert (await aclient.server_info()).device == "cpu"
    assert await aclient.drain() == 2


async def test_adapters(aclient: AsyncClient, script: Script) -> None:
    adapters = aclient.adapters
    assert [adapter.name async for adapter in adapters.list()] == ["a0", "a1", "a2"]
    assert (await adapters.get("sql")).version == 3
    assert (await adapters.alias("sql", "canary", 3)).aliases == ("canary",)
    await adapters.remove_alias("sql", "canary")
    assert (await adapters.pin("sql")).pinned
    assert not (await adapters.unpin("sql")).pinned
    await adapters.set_labels("sql", {"a": "b"})
    assert (await adapters.load("sql")).residency is quickchange.Residency.DEVICE
    assert (await adapters.unload("sql")).residency is quickchange.Residency.DISK
    assert await adapters.delete("sql", all_versions=True) == 2


async def test_push_and_its_progress(aclient: AsyncClient, script: Script, folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = await aclient.adapters.push(folder, "sql", progress=lambda *step: steps.append(step))
    assert result.created
    weights = b"".join(m.chunk.data for m in script.uploads[0] if m.chunk.file_index == 1)
    assert weights == (folder / "adapter_model.safetensors").read_bytes()
    assert steps[-1][0] == steps[-1][1] > 1_300_000


@pytest.mark.parametrize("after", [1, 2, 3])
async def test_push_surfaces_an_answer_that_comes_early(
    aclient: AsyncClient, script: Script, folder: Path, after: int
) -> None:
    (folder / "adapter_model.safetensors").write_bytes(bytes(16 * 1024 * 1024))
    script.refuse_upload_after = after
    with pytest.raises(quickchange.FailedPreconditionError, match="another base"):
        await aclient.adapters.push(folder, "sql")


async def test_cancelling_a_push_ends_it(aclient: AsyncClient, script: Script, folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(bytes(64 * 1024 * 1024))
    script.upload_pause_s = 0.05
    task = asyncio.create_task(aclient.adapters.push(folder, "sql"))
    assert await asyncio.to_thread(script.begun.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(script.ended.wait, 5)
    assert script.upload_bytes < 64 * 1024 * 1024


async def test_progress_is_told_on_the_event_loop(aclient: AsyncClient, folder: Path) -> None:
    loops: set[asyncio.AbstractEventLoop] = set()
    await aclient.adapters.push(folder, "sql", progress=lambda *_: loops.add(asyncio.get_running_loop()))
    assert loops == {asyncio.get_running_loop()}


async def test_pull_whole_or_not_at_all(aclient: AsyncClient, script: Script, tmp_path: Path) -> None:
    script.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": os.urandom(5000)}
    await aclient.adapters.pull("sql", tmp_path / "good")
    assert (tmp_path / "good" / "adapter_model.safetensors").stat().st_size == 5000
    script.download = downloaded(script.files)[:-1]
    with pytest.raises(DataLossError):
        await aclient.adapters.pull("sql", tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_client_never_used_needs_no_loop(target: str) -> None:
    client = AsyncClient(target)
    asyncio.run(client.close())
