"""Brings the files of a published content into a folder, and believes nothing of them. Knows no names."""

from collections.abc import Sequence
from pathlib import Path

from adapters.bundle import read_bundle
from adapters.errors import AdapterCorruptError, InvalidAdapterError, UnsupportedAdapterError
from adapters.facts import AdapterFacts, StoredFile
from adapters.measures import stored_digest
from adapters.remote import GoingOn, RemotePlace


def fetch_content(
    place: RemotePlace, facts: AdapterFacts, files: Sequence[StoredFile], folder: Path, going_on: GoingOn
) -> None:
    """The files, each as it was published, and together the content that they are said to be.

    Args:
        facts: what the place says of the content.
        folder: an empty one.
        going_on: asked now and then; False ends it with StoreUnreachableError.

    Raises:
        AdapterCorruptError: they are not there, or not that.
        StoreUnreachableError, CapacityError
    """
    digest = facts.digest
    place.fetch(digest, files, folder, going_on)
    try:
        found, bundle = stored_digest(folder), read_bundle(folder)
    except (InvalidAdapterError, UnsupportedAdapterError) as error:
        raise AdapterCorruptError(f"the files of {digest} at {place.url} are no adapter: {error}") from error
    if found != digest:
        raise AdapterCorruptError(f"{place.url} has the content {found} under the digest {digest}")
    if bundle is not None and bundle.base_fingerprint != facts.base_fingerprint:
        raise AdapterCorruptError(
            f"{place.url} has {digest} as checked for base {facts.base_fingerprint}, and it was made for "
            f"{bundle.base_fingerprint}"
        )
