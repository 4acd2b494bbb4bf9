"""Adapter residency in miniature, for tests of the scheduler."""

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType


class OneLoadAtATime:
    """Room for so many adapters, whose digests are numbers; a load takes until `finish_load`."""

    def __init__(self, room: int = 2, sizes: Mapping[str, int] = MappingProxyType({})) -> None:
        """
        Args:
            sizes: of the adapters that take more room than 1.
        """
        self.room = room
        self.sizes = sizes
        self.resident: dict[str, int] = {}
        self.loading: str | None = None

    def acquire(self, digest: str) -> int | None:
        if digest in self.resident:
            self.resident[digest] += 1
            return int(digest) + 1
        if self.loading is None:
            unused = [d for d, references in self.resident.items() if references == 0]
            in_use = sum(map(self.size, self.resident)) - sum(map(self.size, unused))
            if in_use + self.size(digest) <= self.room:
                while sum(map(self.size, self.resident)) + self.size(digest) > self.room:
                    del self.resident[unused.pop(0)]
                self.loading = digest
        return None

    def prepare(self, order: Sequence[str]) -> None:
        for place, digest in enumerate(order):
            if digest in self.resident or digest == self.loading:
                continue
            sooner = order[:place]
            idle = [d for d, references in self.resident.items() if references == 0 and d not in sooner]
            stay = sum(map(self.size, self.resident)) - sum(map(self.size, idle))
            if self.loading is not None or stay + self.size(digest) > self.room:
                return
            while sum(map(self.size, self.resident)) + self.size(digest) > self.room:
                del self.resident[idle.pop(0)]
            self.loading = digest

    def size(self, digest: str) -> int:
        return self.sizes.get(digest, 1)

    def is_resident(self, digest: str) -> bool:
        return digest in self.resident

    def is_loading(self, digest: str) -> bool:
        return digest == self.loading

    def release(self, digest: str) -> None:
        self.resident[digest] -= 1
        assert self.resident[digest] >= 0

    def in_the_way(self, digest: str, order: Sequence[str]) -> Set[str]:
        if self.loading is not None:
            return frozenset()
        unused = sum(self.size(d) for d, references in self.resident.items() if references == 0)
        missing = sum(map(self.size, self.resident)) - unused + self.size(digest) - self.room
        chosen = set()
        for other in order:
            if missing > 0 and other in self.resident:
                chosen.add(other)
                missing -= self.size(other)
        return chosen

    def finish_load(self) -> None:
        if self.loading is not None:
            self.resident[self.loading] = 0
            self.loading = None
