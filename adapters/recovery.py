"""Puts right what ended processes left behind, beside others that live. Decides nothing about versions.

Damage is marked FAILED, and its files go to quarantine; what no version has, or nobody lists, is removed.
Neither happens to what a process still uses.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

from adapters.blobs import BlobFolder, disk_errors
from adapters.catalogue import Catalogue
from adapters.facts import AdapterState
from adapters.quarantine import QuarantineFolder
from adapters.rows import Content, Holding
from adapters.transaction import Transaction

log = logging.getLogger(__name__)

_MOVED = "; the damaged files were moved to "

OnDamage = Callable[[Transaction, BlobFolder, QuarantineFolder, Content, str], object]


def recover(
    catalogue: Catalogue, blobs: BlobFolder, quarantine: QuarantineFolder, on_damage: OnDamage
) -> None:
    """Looks at everything without holding anybody up; only what looks wrong is looked at again, and changed.

    Args:
        on_damage: `fail`, or what else becomes of a READY content whose files are not there or not whole.

    Raises:
        CapacityError: the disk refused.
    """
    with disk_errors():
        suspects = list(_suspects(catalogue, blobs, quarantine))
        if suspects or quarantine.unfinished():
            with catalogue.writing() as rows:
                for entry in quarantine.unfinished():
                    blobs.throw_away(entry)
                for digest in suspects:
                    _put_right(rows, blobs, quarantine, digest, on_damage)
    blobs.empty_trash()


def remove_unused(rows: Transaction, blobs: BlobFolder, digest: str) -> bool:
    """Takes out a content that no version has; False if a process still uses it, and it stays."""
    if rows.is_referenced(digest):
        return True
    if not blobs.take_out_unused(digest):
        return False
    rows.drop_content(digest)
    return True


def fail(
    rows: Transaction, blobs: BlobFolder, quarantine: QuarantineFolder, content: Content, error: str
) -> bool:
    """Marks a content FAILED, and moves its files to quarantine.

    Args:
        content: as it is listed; its error is empty unless it is FAILED already.

    Returns:
        False if a process still uses the files; they stay until this is called again, or a store is opened.
    """
    digest = content.facts.digest
    if not blobs.has(digest):
        _mark(rows, content, _told_before(rows, quarantine, digest) or error)
        return True
    if _MOVED in content.error:
        return blobs.take_out_unused(digest)  # of a publish that was to heal it, and ended too early
    with blobs.alone_with(digest) as unused:
        if not unused:
            _mark(rows, content, error)
            return False
        place = quarantine.next_place(digest)
        # Listed first, which is the more likely not to find room on the disk.
        rows.put_content(_failed(content, _moved(error, place)))
        try:
            quarantine.take(blobs.path_of(digest), place, error)
        except OSError:
            log.exception("damaged files stay where they are digest=%s", digest)
            rows.put_content(_failed(content, error))
        else:
            log.warning("adapter damaged digest=%s place=%s: %s", digest, place, error)
        return True


def _suspects(catalogue: Catalogue, blobs: BlobFolder, quarantine: QuarantineFolder) -> Iterator[str]:
    # First what is there, then what is listed: a publish in between is listed too late, and looks fine.
    unlisted = set(blobs.digests())
    quarantined = {entry.digest for entry in quarantine.all()}
    with catalogue.reading() as rows:
        for holding in rows.holdings():
            unlisted.discard(holding.digest)
            if not holding.is_referenced or _is_damaged(holding, blobs, holding.digest in quarantined):
                yield holding.digest
    yield from unlisted


def _is_damaged(holding: Holding, blobs: BlobFolder, is_quarantined: bool) -> bool:
    if holding.state is AdapterState.READY:
        return bool(blobs.fault_of(holding.digest, holding.files))
    return is_quarantined or blobs.has(holding.digest)


def _put_right(
    rows: Transaction, blobs: BlobFolder, quarantine: QuarantineFolder, digest: str, on_damage: OnDamage
) -> None:
    content = rows.content(digest)
    if content is None or not rows.is_referenced(digest):
        remove_unused(rows, blobs, digest)
    elif content.state is AdapterState.FAILED:
        fail(rows, blobs, quarantine, content, content.error)
    elif fault := blobs.fault_of(digest, content.files):
        on_damage(rows, blobs, quarantine, content, f"{fault}; publish it again")


def _mark(rows: Transaction, content: Content, error: str) -> None:
    """Nothing happens if that is what is listed: no version changes."""
    if _failed(content, error) != content:
        rows.put_content(_failed(content, error))


def _failed(content: Content, error: str) -> Content:
    return replace(content, state=AdapterState.FAILED, error=error)


def _told_before(rows: Transaction, quarantine: QuarantineFolder, digest: str) -> str | None:
    """Why the files are away, if a process that moved them ended before the catalogue heard of it."""
    entry, record = quarantine.newest(digest), rows.with_digest(digest)
    if entry is None or record is None or entry.since_s < record.updated_s:
        return None
    return _moved(entry.reason, entry.place)


def _moved(error: str, place: str) -> str:
    return f"{error}{_MOVED}{place}"
