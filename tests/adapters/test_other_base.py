"""Adapters that say which base they were made for, in stores and archives that reach a server of another."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from adapters.errors import InvalidAdapterError, WrongBaseError
from adapters.export_archive import export_store
from adapters.import_archive import import_store
from adapters.layout import BaseLayout
from adapters.store import AdapterStore
from adapters.validate import validate_adapter
from tests.adapters.builders import FINGERPRINT
from tests.adapters.test_residency import Library, Tiers

OTHER = "sha256:" + "07e4" * 16


@pytest.fixture
def library(llama: PreTrainedModel, layout: BaseLayout, tmp_path: Path) -> Iterator[Library]:
    library = Library(tmp_path, llama, layout)
    yield library
    library.store.close()


def publish_foreign(library: Library, folder: Path, told: str = OTHER) -> str:
    """Adapter d, made for another base of the same shapes; `told` is what the catalogue has of it."""
    bundled = Path(shutil.copytree(folder / "d", folder / "foreign"))
    (bundled / "quickchange.json").write_text(json.dumps({"format": 1, "base_fingerprint": OTHER}))
    facts = validate_adapter(bundled, replace(library.layout, fingerprint=OTHER), max_rank=8)
    staged = library.store.new_staging()
    for file in bundled.iterdir():
        (staged / file.name).write_bytes(file.read_bytes())
    library.store.publish("foreign", staged, replace(facts, base_fingerprint=told))
    library.digests["foreign"] = facts.digest
    return facts.digest


def test_it_is_refused_before_anybody_makes_room_for_it(library: Library, tmp_path: Path) -> None:
    digest = publish_foreign(library, tmp_path)
    held = Tiers(library, device_bytes=library.sizes["d"])
    held.use("b")
    assert held.residency.acquire(digest) is None
    (outcome,) = held.collected()
    assert isinstance(outcome.error, WrongBaseError)
    assert OTHER in str(outcome.error)
    assert FINGERPRINT in str(outcome.error)
    with pytest.raises(WrongBaseError):
        held.residency.prefetch_to_host(digest)
    assert (held.where()["b"], held.evicted) == ("device", [])
    assert held.use("c")[1][0].error is None
    assert library.store.resolve("foreign").facts.base_fingerprint == OTHER
    held.residency.close()


def test_its_files_are_believed_more_than_the_catalogue(library: Library, tmp_path: Path) -> None:
    digest = publish_foreign(library, tmp_path, told=FINGERPRINT)
    held = Tiers(library)
    assert held.residency.acquire(digest) is None
    (outcome,) = held.collected()
    assert isinstance(outcome.error, WrongBaseError)
    assert OTHER in str(outcome.error)
    assert held.residency.used_bytes == 0
    held.residency.close()


def test_one_without_a_bundle_is_judged_by_its_shapes(library: Library, tmp_path: Path) -> None:
    library.layout = replace(library.layout, fingerprint=OTHER)  # of a server that is started later
    held = Tiers(library)
    assert held.use("a")[1][0].error is None
    held.residency.close()


def test_an_import_keeps_what_it_was_made_for(library: Library, tmp_path: Path) -> None:
    publish_foreign(library, tmp_path)
    export_store(library.store, tmp_path / "honest.tar")
    with AdapterStore(tmp_path / "honest") as store:
        import_store(store, tmp_path / "honest.tar")
        assert store.resolve("foreign").facts.base_fingerprint == OTHER
        assert store.resolve("a").facts.base_fingerprint == FINGERPRINT
        assert store.declared_base_of(store.resolve("foreign").facts.digest) == OTHER
        assert store.declared_base_of(store.resolve("a").facts.digest) is None


def test_an_import_refuses_an_adapter_that_passes_for_another_bases(library: Library, tmp_path: Path) -> None:
    publish_foreign(library, tmp_path, told=FINGERPRINT)
    export_store(library.store, tmp_path / "forged.tar")
    with AdapterStore(tmp_path / "forged") as store:
        with pytest.raises(InvalidAdapterError, match=f"{FINGERPRINT}, and it was made for {OTHER}"):
            import_store(store, tmp_path / "forged.tar")
        assert store.list() == ([], "")
