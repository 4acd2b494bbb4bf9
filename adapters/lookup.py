"""Which versions of a catalogue a reference, a publish, a deletion or a page means. Changes nothing."""

import base64
import json

from adapters.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    CapacityError,
    InvalidAdapterError,
    StaleEtagError,
)
from adapters.facts import AdapterRecord
from adapters.names import (
    MAX_VERSION,
    AliasOf,
    ContentOf,
    NewestOf,
    Reference,
    VersionOf,
    check_name,
    check_version,
    is_visible,
)
from adapters.rows import Rows


def find(rows: Rows, reference: Reference, tenant: str | None = None) -> AdapterRecord:
    """The version a reference names, whatever its state; AdapterNotFoundError says what there is instead.

    Args:
        tenant: for whom; what is another tenant's is not there. None sees everything.
    """
    if not isinstance(reference, ContentOf) and not is_visible(reference.name, tenant):
        raise _not_found([], reference.name, "")
    match reference:
        case ContentOf(digest):
            record = rows.with_digest(digest, tenant=tenant)
            if record is None:
                raise no_such_content(digest)
            return record
        case NewestOf(name):
            record, wanted = rows.newest(name), ""
        case VersionOf(name, version):
            record, wanted = rows.record(name, version), f"version {version}"
        case AliasOf(name, alias):
            record, wanted = rows.aliased(name, alias), f"alias {alias!r}"
    if record is None:
        raise _not_found(rows.versions(name), name, wanted)
    return record


def same_content(rows: Rows, name: str, version: int | None, digest: str) -> AdapterRecord | None:
    """The version that a publish asks for and that has its content already; None if it has to be made.

    Raises:
        AdapterExistsError: the fixed version has other content.
    """
    if version is None:
        return rows.with_digest(digest, name)
    record = rows.record(name, version)
    if record is not None and record.facts.digest != digest:
        raise AdapterExistsError(
            f"{record.reference} has other content, {record.facts.digest}; leave the version unset"
        )
    return record


def free_version(rows: Rows, name: str, version: int | None) -> int:
    """The number of a new version: the next one, or the fixed one if it is above every number ever used."""
    last = rows.last_version(name)
    if version is not None and version <= last:
        raise AdapterExistsError(
            f"version {version} of {name!r} was passed or deleted, and numbers are never used again; "
            f"use {last + 1} or more, or leave it unset"
        )
    if last >= MAX_VERSION:
        raise CapacityError(f"{name!r} has used up its version numbers; publish under another name")
    return last + 1 if version is None else version


def doomed(rows: Rows, reference: Reference, all_versions: bool, etag: str | None) -> list[AdapterRecord]:
    """The versions that a deletion means; InvalidAdapterError if that is not plain."""
    if all_versions:
        if not isinstance(reference, NewestOf):
            raise _unclear("all versions are deleted by the bare name")
        if etag is not None:
            raise _unclear("an etag guards one version; delete that one by name@version")
        find(rows, reference)
        return rows.versions(reference.name)
    if isinstance(reference, AliasOf | ContentOf):
        raise _unclear("a version is deleted by name@version, not by an alias or a digest")
    record = find(rows, reference)
    count = len(rows.versions(record.name))
    if isinstance(reference, NewestOf) and count > 1:
        raise _unclear(f"{reference.name!r} has {count} versions; say which by name@version, or ask for all")
    check_etag(record, etag)
    return [record]


def check_etag(record: AdapterRecord, etag: str | None) -> None:
    """StaleEtagError if an etag is given and is not the current one."""
    if etag is not None and etag != record.etag:
        raise StaleEtagError(f"{record.reference} changed since its etag was read; read it again and repeat")


def check_alias_is_at(rows: Rows, name: str, alias: str, version: int | None) -> None:
    """StaleEtagError if a version is given and the alias is at another one; 0 is none."""
    if version is None:
        return
    record = rows.aliased(name, alias)
    at = 0 if record is None else record.version
    if at != version:
        there = f"{name}@{at}" if at else "no version"
        expected = f"{name}@{version}" if version else "no version"
        raise StaleEtagError(
            f"{name}:{alias} is at {there}, and was to be moved from {expected}: somebody else was faster; "
            "look again and repeat"
        )


def token_after(record: AdapterRecord) -> str:
    """The opaque token of the page that begins after a record."""
    return base64.urlsafe_b64encode(json.dumps([record.name, record.version]).encode()).decode()


def read_token(page_token: str) -> tuple[str, int]:
    """Name and version that a page begins after; the empty token is the start."""
    if not page_token:
        return "", 0
    try:
        name, version = json.loads(base64.b64decode(page_token, altchars="-_", validate=True))
        return check_name(name), check_version(version)
    except (ValueError, TypeError, AdapterError):
        raise InvalidAdapterError(
            "this page_token was not given by this server; start again without one", reason="BAD_PAGE_TOKEN"
        ) from None


def no_such_content(digest: str) -> AdapterNotFoundError:
    """The error for a digest that nothing has."""
    return AdapterNotFoundError(f"no adapter has the digest {digest}")


def no_such_alias(record: AdapterRecord, alias: str) -> AdapterNotFoundError:
    """The error for an alias that is not on this version."""
    there = ", ".join(record.aliases) or "none"
    return AdapterNotFoundError(f"{record.reference} has no alias {alias!r}; its aliases: {there}")


def _not_found(versions: list[AdapterRecord], name: str, wanted: str) -> AdapterNotFoundError:
    if not versions:
        return AdapterNotFoundError(f"there is no adapter {name!r}; list the adapters to see which there are")
    aliases = ", ".join(sorted(alias for record in versions for alias in record.aliases)) or "none"
    return AdapterNotFoundError(
        f"adapter {name!r} has no {wanted}; newest version: {versions[-1].version}, aliases: {aliases[:500]}"
    )


def _unclear(why: str) -> InvalidAdapterError:
    return InvalidAdapterError(why, reason="BAD_REFERENCE")
