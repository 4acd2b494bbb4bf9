"""Adapter residency in miniature, for tests of the scheduler."""

from collections.abc import Sequence, Set


class OneLoadAtATime:
    """Room for so many adapters, whose digests are numbers; a load takes until `finish_load`."""

    def __init__(self, room: int = 2) -> None:
        self.room = room
        self.resident: dict[str, int] = {}
        self.loading: str | None = None

    def acquire(self, digest: str) -> int | None:
        if digest in self.resident:
            self.resident[digest] += 1
            return int(digest) + 1
        if self.loading is None and len(self.resident) >= self.room:
            unused = [d for d, references in self.resident.items() if references == 0]
            if unused:
                del self.resident[unused[0]]
        if self.loading is None and len(self.resident) < self.room:
            self.loading = digest
        return None

    def is_loading(self, digest: str) -> bool:
        return digest == self.loading

    def release(self, digest: str) -> None:
        self.resident[digest] -= 1
        assert self.resident[digest] >= 0

    def in_the_way(self, digest: str, order: Sequence[str]) -> Set[str]:
        if self.loading is not None or 0 in self.resident.values():
            return frozenset()
        return {next(other for other in order if other in self.resident)}

    def finish_load(self) -> None:
        if self.loading is not None:
            self.resident[self.loading] = 0
            self.loading = None
