"""Which folders are copies of a store at a URL, so that nobody takes one for a store. Knows no catalogue.

root/replica.json    {"url": …, "generation": of the snapshot that the folder's catalogue shows; 0 for none}
"""

import json
from pathlib import Path

from adapters.blobs import disk_errors
from adapters.durable import replace_text
from adapters.errors import AdapterCorruptError, InvalidAdapterError

MARK = "replica.json"
_CATALOGUE = "catalogue.sqlite3"


def refuse_replica(root: Path) -> None:
    """Raises InvalidAdapterError if a folder is a copy of a store."""
    if (root / MARK).exists():
        url, _ = _read(root)
        raise InvalidAdapterError(
            f"{root} holds copies of the store at {url}, and is no store; give that URL, or another folder",
            reason="STORE_IS_REPLICA",
        )


def claim_replica(root: Path, url: str) -> int:
    """Makes an empty folder a copy of a store, or takes up one; the generation that it shows, 0 for none.

    Raises:
        InvalidAdapterError: it is a store, or a copy of another one.
    """
    if (root / MARK).exists():
        of_url, generation = _read(root)
        if of_url != url:
            raise InvalidAdapterError(
                f"{root} holds copies of the store at {of_url}, not {url}; give another folder for it",
                reason="OTHER_REPLICA",
            )
        return generation
    if (root / _CATALOGUE).exists():
        raise InvalidAdapterError(
            f"{root} is a store, and would be replaced by the one at {url}; give another folder for copies",
            reason="NO_REPLICA",
        )
    with disk_errors():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    mark_replica(root, url, 0)
    return 0


def mark_replica(root: Path, url: str, generation: int) -> None:
    """Notes what a folder shows."""
    with disk_errors():
        replace_text(root / MARK, json.dumps({"url": url, "generation": generation}) + "\n")


def _read(root: Path) -> tuple[str, int]:
    try:
        mark = json.loads((root / MARK).read_text(encoding="utf-8"))
        return str(mark["url"]), int(mark["generation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterCorruptError(f"{root / MARK} cannot be read ({error}); empty the folder") from None
