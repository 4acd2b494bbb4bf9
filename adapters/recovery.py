"""Puts right what ended processes left behind, beside others that live. Decides nothing about versions.

Damage is marked FAILED; what no version has, or nobody lists, is removed unless a process still uses it.
"""

from collections.abc import Iterator
from dataclasses import replace

from adapters.blobs import BlobFolder, disk_errors
from adapters.catalogue import Catalogue
from adapters.facts import AdapterState
from adapters.transaction import Transaction


def recover(catalogue: Catalogue, blobs: BlobFolder) -> None:
    """Looks at everything without holding anybody up; only what looks wrong is looked at again, and changed.

    Raises:
        CapacityError: the disk refused.
    """
    with disk_errors():
        suspects = list(_suspects(catalogue, blobs))
        if suspects:
            with catalogue.writing() as rows:
                for digest in suspects:
                    _put_right(rows, blobs, digest)
    blobs.empty_trash()


def remove_unused(rows: Transaction, blobs: BlobFolder, digest: str) -> bool:
    """Takes out a content that no version has; False if a process still uses it, and it stays."""
    if rows.is_referenced(digest):
        return True
    if not blobs.take_out_unused(digest):
        return False
    rows.drop_content(digest)
    return True


def _suspects(catalogue: Catalogue, blobs: BlobFolder) -> Iterator[str]:
    # First what is there, then what is listed: a publish in between is listed too late, and looks fine.
    unlisted = set(blobs.digests())
    with catalogue.reading() as rows:
        for holding in rows.holdings():
            unlisted.discard(holding.digest)
            if not holding.is_referenced or (
                holding.state is AdapterState.READY and blobs.fault_of(holding.digest, holding.files)
            ):
                yield holding.digest
    yield from unlisted


def _put_right(rows: Transaction, blobs: BlobFolder, digest: str) -> None:
    content = rows.content(digest)
    if content is None or not rows.is_referenced(digest):
        remove_unused(rows, blobs, digest)
    elif content.state is AdapterState.READY:
        fault = blobs.fault_of(digest, content.files)
        if fault:
            rows.put_content(replace(content, state=AdapterState.FAILED, error=f"{fault}; publish it again"))
