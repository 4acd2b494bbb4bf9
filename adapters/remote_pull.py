"""Takes what is published at a URL into a local store: all that is wanted, or nothing. Decides no clashes."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from adapters.adoption import Adopted
from adapters.errors import AdapterError, AdapterNotFoundError
from adapters.facts import AdapterFacts, StoredFile
from adapters.fetching import fetch_content
from adapters.listing import chosen_of
from adapters.manifest import FACTS
from adapters.mirror import files_of
from adapters.remote import RemotePlace
from adapters.remote_push import remember
from adapters.store import AdapterStore

Report = Callable[[int, int], None]
Staged = dict[str, tuple[Path, AdapterFacts]]


def pull_store(
    store: AdapterStore,
    place: RemotePlace,
    *,
    names: Collection[str] = (),
    renumber: bool = False,
    report: Report = lambda *_: None,
) -> tuple[Adopted, ...]:
    """Publishes the place's versions here under their names and numbers, in one step, as an import does.

    Args:
        names: of the adapters; none for all of them, after which this store may push there.
        renumber: a version whose number is taken, or was used and deleted, gets the next one.
        report: called with the bytes so far and in all.

    Raises:
        AdapterExistsError: a number is taken by other content, or was used and deleted.
        AdapterNotFoundError: there is no store, or no adapter of such a name.
        AdapterCorruptError: what is there is damaged.
        StoreUnreachableError, CapacityError
    """
    snapshot = place.latest()
    if snapshot is None:
        raise AdapterNotFoundError(f"there is no store at {place.url}", reason="STORE_NOT_FOUND")
    versions = chosen_of(snapshot.manifest, names, place.url)
    store.check_clashes(versions, renumber=renumber)
    wanted = store.missing({version.digest for version in versions})
    contents = {d: m for d, m in snapshot.manifest.contents.items() if d in wanted}
    staged: Staged = {}
    try:
        _fetch_all(store, place, contents, staged, report)
        last_versions = {
            name: last
            for name, last in snapshot.manifest.last_versions.items()
            if not renumber and (not names or name in names)
        }
        adopted = store.adopt(staged, versions, last_versions, renumber=renumber)
    finally:
        for folder, _ in staged.values():
            store.discard(folder)
    if not names:
        remember(store, place, snapshot)
    return adopted


def _fetch_all(
    store: AdapterStore,
    place: RemotePlace,
    contents: Mapping[str, tuple[StoredFile, ...]],
    staged: Staged,
    report: Report,
) -> None:
    facts_of = place.facts(
        {digest: next(m for m in members if m.name == FACTS) for digest, members in contents.items()}
    )
    files = {digest: files_of(members) for digest, members in contents.items()}
    total_bytes = sum(file.size_bytes for each in files.values() for file in each)
    done_bytes = 0
    for digest, facts in facts_of.items():
        if isinstance(facts, AdapterError):
            raise facts
        staged[digest] = (store.new_staging(), facts)
        fetch_content(place, facts, files[digest], staged[digest][0], lambda: True)
        done_bytes += sum(file.size_bytes for file in files[digest])
        report(done_bytes, total_bytes)
