"""What a store lists, as a manifest for those who take it elsewhere; and what they may want of one.

Knows no archive and no URL.
"""

from collections.abc import Collection
from hashlib import sha256

from adapters.errors import AdapterCorruptError, AdapterNotFoundError
from adapters.facts import AdapterState, StoredFile
from adapters.manifest import FACTS, ListedVersion, Manifest, facts_json
from adapters.rows import Entry, Rows
from adapters.store import AdapterStore


def manifest_of(rows: Rows, names: Collection[str] = ()) -> tuple[Manifest, tuple[ListedVersion, ...]]:
    """All READY versions, and those that were left out because they are FAILED.

    Args:
        names: of the adapters; none for all of them.

    Raises:
        AdapterNotFoundError: there is no adapter of such a name.
    """
    chosen: list[ListedVersion] = []
    failed: list[ListedVersion] = []
    for entry in rows.entries():
        if not names or entry.name in names:
            (chosen if entry.state is AdapterState.READY else failed).append(_listed(entry))
    known = rows.last_versions()
    for name in names:
        if name not in known:
            raise AdapterNotFoundError(
                f"there is no adapter {name!r}; list the adapters to see which there are"
            )
    contents = {version.digest: _members(rows, version.digest) for version in chosen}
    last_versions = {name: last for name, last in known.items() if not names or name in names}
    return Manifest(last_versions, tuple(chosen), contents), tuple(failed)


def chosen_of(manifest: Manifest, names: Collection[str], where: str) -> list[ListedVersion]:
    """Versions of these names, or all, in ascending order; AdapterNotFoundError if a name has none.

    Args:
        where: the manifest comes from, for the message.
    """
    there = {version.name for version in manifest.versions}
    for name in names:
        if name not in there:
            raise AdapterNotFoundError(f"{where} has no adapter {name!r}; it has {len(there)} others")
    chosen = [version for version in manifest.versions if not names or version.name in names]
    return sorted(chosen, key=lambda version: (version.name, version.version))


def damaged(store: AdapterStore, digest: str, why: str) -> AdapterCorruptError:
    """Makes a content's versions FAILED; the error for whoever wanted to take it elsewhere."""
    store.mark_failed(digest, f"{why}; publish it again")
    return AdapterCorruptError(
        f"{digest} is damaged in the store: {why}; its versions are FAILED now, and left out next time"
    )


def _listed(entry: Entry) -> ListedVersion:
    return ListedVersion(
        entry.name,
        entry.version,
        entry.digest,
        entry.pinned,
        entry.aliases,
        entry.labels,
        entry.description,
        entry.created_s,
    )


def _members(rows: Rows, digest: str) -> tuple[StoredFile, ...]:
    content = rows.content(digest)
    assert content is not None, "a version always has a content"
    facts = facts_json(content.facts)
    return (StoredFile(FACTS, len(facts), sha256(facts).hexdigest()), *content.files)
