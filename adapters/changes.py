"""What changed in a store, whichever process changed it. Knows no files and changes nothing."""

from adapters.catalogue import Catalogue
from adapters.errors import ChangesLostError
from adapters.facts import AdapterRecord
from adapters.rows import Change

PAGE = 100


class ChangeLog:
    """The changes of a store in order. Each version stands there once, with its last change."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def last(self) -> int:
        """The number of the newest change; changes from now on have greater ones."""
        with self._catalogue.reading() as rows:
            return rows.last_change()

    def after(self, sequence: int) -> list[Change]:
        """The next changes after this one, at most a page of them; each version as it is now.

        Raises:
            ChangesLostError: some were forgotten meanwhile; begin anew with everything.
        """
        with self._catalogue.reading() as rows:
            if not rows.knows_changes_since(sequence):
                raise ChangesLostError(
                    "more changed since the last look than is remembered; begin anew with all adapters"
                )
            return rows.changes(sequence, PAGE)

    def versions_with(self, digest: str, after: AdapterRecord | None) -> list[AdapterRecord]:
        """Versions with this content, a page of them, after one of them or from the first on."""
        start = ("", 0) if after is None else (after.name, after.version)
        with self._catalogue.reading() as rows:
            return rows.with_content(digest, after=start, limit=PAGE)

    def pinned(self) -> dict[str, str]:
        """Every pinned content, with a name that pins it."""
        with self._catalogue.reading() as rows:
            return rows.pinned()

    def is_pinned(self, digest: str) -> bool:
        """Whether any version with this content is."""
        with self._catalogue.reading() as rows:
            return rows.is_pinned(digest)

    def unreferenced(self, digests: list[str]) -> list[str]:
        """Those of the contents that no version has."""
        with self._catalogue.reading() as rows:
            return [digest for digest in digests if not rows.is_referenced(digest)]
