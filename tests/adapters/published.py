"""A store that is published in a folder: what tests look at, and how they damage it. No test lives here."""

from pathlib import Path

from adapters.files import WEIGHTS_FILE
from adapters.store import AdapterStore


def listed(store: AdapterStore) -> list[tuple[object, ...]]:
    return [
        (r.reference, r.facts, r.files, r.aliases, r.pinned, r.labels, r.description, r.created_s, r.state)
        for r in store.list()[0]
    ]


def blobs(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs/sha256").iterdir()}


def spoil(file: Path) -> None:
    """One byte is another one; the size stays."""
    raw = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def weights_of(store: AdapterStore, reference: str, remote: Path) -> Path:
    digest = store.get(reference).facts.digest
    return remote / "blobs/sha256" / digest.removeprefix("sha256:") / WEIGHTS_FILE
