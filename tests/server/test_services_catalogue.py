"""What the services hold of the store, and give back whatever happens to the call."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from adapters.store import AdapterStore
from server.services.catalogue import Catalogue
from server.services.workers import Workers
from tests.adapters.staging import publish

NO_ENGINE: Any = None  # nothing here gets as far as an engine


async def test_a_call_that_is_cancelled_while_it_resolves_keeps_nothing(tmp_path: Path) -> None:
    workers, busy = Workers(1), threading.Event()
    with AdapterStore(tmp_path / "store") as store:
        publish(store, "sql", "a")
        catalogue = Catalogue(store, NO_ENGINE, workers)

        async def call() -> None:
            async with catalogue.preparing("sql", tenant=None):
                raise AssertionError("it was cancelled before")

        occupied = asyncio.create_task(workers.run(busy.wait))
        cancelled = asyncio.create_task(call())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled.cancel()
        busy.set()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await occupied
        (digest,) = store.delete("sql")
        assert store.remove_blob(digest)
    workers.close()


async def test_what_is_kept_outlasts_the_preparation(tmp_path: Path) -> None:
    workers = Workers(1)
    with AdapterStore(tmp_path / "store") as store:
        publish(store, "sql", "a")
        catalogue = Catalogue(store, NO_ENGINE, workers)
        async with catalogue.preparing("sql", tenant=None) as record:
            assert record is not None
            lease = catalogue.keep(record)
        (digest,) = store.delete("sql")
        assert not store.remove_blob(digest)
        assert lease is not None
        lease.release()
        assert store.remove_blob(digest)
    workers.close()
