"""Makes a catalogue say what another one said in a manifest. Knows neither files nor where it comes from."""

from collections.abc import Mapping

from adapters.errors import AdapterError
from adapters.facts import AdapterFacts, AdapterState, StoredFile
from adapters.manifest import FACTS, ListedVersion, Manifest
from adapters.rows import Content, Entry
from adapters.transaction import Transaction

Learned = Mapping[str, AdapterFacts | AdapterError]


def files_of(members: tuple[StoredFile, ...]) -> tuple[StoredFile, ...]:
    """The files of a content, without what was found out about it."""
    return tuple(member for member in members if member.name != FACTS)


def mirror(rows: Transaction, manifest: Manifest, learned: Learned) -> None:
    """Lists exactly the manifest's versions, with their numbers, aliases, pins and labels.

    Contents that no version has any more stay listed, as after a deletion; whoever follows the changes sees
    to them.

    Args:
        learned: facts of every content that is not READY here or that changed, or why there are none; its
            versions are FAILED then.
    """
    for digest, facts in learned.items():
        rows.put_content(_content(digest, files_of(manifest.contents[digest]), facts))
    _mirror_versions(rows, manifest)
    _mirror_aliases(rows, manifest)
    _mirror_properties(rows, manifest)


def _content(digest: str, files: tuple[StoredFile, ...], facts: AdapterFacts | AdapterError) -> Content:
    if isinstance(facts, AdapterError):
        return Content(_unknown(digest, files), files, AdapterState.FAILED, str(facts))
    return Content(facts, files, AdapterState.READY, "")


def _unknown(digest: str, files: tuple[StoredFile, ...]) -> AdapterFacts:
    """Of a content about which nothing is known but its files; it is never served."""
    return AdapterFacts(
        digest=digest,
        method="lora",
        rank=0,
        alpha=0.0,
        target_modules=(),
        size_bytes=sum(file.size_bytes for file in files),
        base_fingerprint="",
        matched_modules=(),
        delta_norm=0.0,
        dtype="",
        parameter_count=0,
    )


def _mirror_versions(rows: Transaction, manifest: Manifest) -> None:
    wanted = _by_reference(manifest)
    there = {(entry.name, entry.version): entry for entry in rows.entries()}
    for key, entry in there.items():
        if key not in wanted or not _is_same(entry, wanted[key]):
            rows.remove_version(*key)
    for key, listed in sorted(wanted.items()):
        if key not in there or not _is_same(there[key], listed):
            rows.add_version(*key, listed.digest, listed.labels, listed.description, listed.created_s)
    last_versions = rows.last_versions()
    for name, last in manifest.last_versions.items():
        if last_versions.get(name, 0) < last:
            rows.raise_last_version(name, last)


def _mirror_aliases(rows: Transaction, manifest: Manifest) -> None:
    there = {(entry.name, alias): entry.version for entry in rows.entries() for alias in entry.aliases}
    wanted = {
        (listed.name, alias): listed.version for listed in manifest.versions for alias in listed.aliases
    }
    for key in there.keys() - wanted.keys():
        rows.remove_alias(*key)
    for key, version in wanted.items():
        if there.get(key) != version:
            rows.set_alias(*key, version)


def _mirror_properties(rows: Transaction, manifest: Manifest) -> None:
    wanted = _by_reference(manifest)
    for entry in list(rows.entries()):
        listed = wanted[entry.name, entry.version]
        if entry.pinned != listed.pinned:
            rows.set_pinned(entry.name, entry.version, listed.pinned)
        if dict(entry.labels) != dict(listed.labels):
            rows.set_labels(entry.name, entry.version, listed.labels)


def _by_reference(manifest: Manifest) -> dict[tuple[str, int], ListedVersion]:
    return {(listed.name, listed.version): listed for listed in manifest.versions}


def _is_same(entry: Entry, listed: ListedVersion) -> bool:
    """Whether it is the same version, whatever points at it."""
    return (entry.digest, entry.description, entry.created_s) == (
        listed.digest,
        listed.description,
        listed.created_s,
    )
