"""Which versions a store need not keep any longer, and why. Touches neither files nor catalogue."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from adapters.errors import InvalidAdapterError
from adapters.facts import AdapterState
from adapters.quarantine import Quarantined
from adapters.rows import Entry

KEEP_LABEL = "keep"
"""A version with this label is never collected, whatever the label's value."""


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """What is kept besides versions with an alias, a pin, or the label "keep".

    Attributes:
        keep_versions: so many of the newest READY versions of each name.
        min_age_s: whatever is younger, in any state; damaged files that are in quarantine for less.
    """

    keep_versions: int
    min_age_s: float

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise InvalidAdapterError(
                f"keep_versions {self.keep_versions} would leave nothing of a name; keep at least 1",
                reason="BAD_POLICY",
            )
        if not self.min_age_s >= 0:
            raise InvalidAdapterError(
                f"min_age {self.min_age_s} must be at least 0 seconds", reason="BAD_POLICY"
            )


@dataclass(frozen=True, slots=True)
class Doomed:
    """A version that goes.

    Attributes:
        freed_bytes: of its files, if no version that stays has them too; counted at the last one that goes.
    """

    name: str
    version: int
    digest: str
    reason: str
    freed_bytes: int

    @property
    def reference(self) -> str:
        """ "name@3"."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Collection:
    """What a collection took away, or would take.

    Attributes:
        left_over_bytes: of contents that were deleted before, and that nobody uses any more.
        quarantined: damaged files.
    """

    versions: tuple[Doomed, ...]
    left_over_bytes: int
    quarantined: tuple[Quarantined, ...]

    @property
    def freed_bytes(self) -> int:
        """Of everything together."""
        of_versions = sum(version.freed_bytes for version in self.versions)
        return self.left_over_bytes + of_versions + sum(entry.size_bytes for entry in self.quarantined)


def doomed(entries: Iterable[Entry], policy: RetentionPolicy, now_s: float) -> tuple[Doomed, ...]:
    """The versions that the policy lets go, by name and number.

    Args:
        entries: every version of the store.
        now_s: seconds since the epoch.
    """
    by_name: defaultdict[str, list[Entry]] = defaultdict(list)
    users: defaultdict[str, int] = defaultdict(int)
    for entry in entries:
        by_name[entry.name].append(entry)
        users[entry.digest] += 1
    found = []
    for versions in by_name.values():
        for entry, reason in _of_one_name(versions, policy, now_s):
            users[entry.digest] -= 1
            freed_bytes = 0 if users[entry.digest] else entry.size_bytes
            found.append(Doomed(entry.name, entry.version, entry.digest, reason, freed_bytes))
    return tuple(sorted(found, key=lambda version: (version.name, version.version)))


def outdated(
    entries: Iterable[Quarantined], policy: RetentionPolicy, now_s: float
) -> tuple[Quarantined, ...]:
    """The damaged files that the policy lets go."""
    return tuple(entry for entry in entries if now_s - entry.since_s >= policy.min_age_s)


def _of_one_name(
    versions: Sequence[Entry], policy: RetentionPolicy, now_s: float
) -> Iterator[tuple[Entry, str]]:
    newer = 0
    for entry in sorted(versions, key=lambda entry: -entry.version):
        is_ready = entry.state is AdapterState.READY
        is_among_newest = is_ready and newer < policy.keep_versions
        newer += is_ready
        is_wanted = bool(entry.aliases) or entry.pinned or KEEP_LABEL in entry.labels
        if is_among_newest or is_wanted or now_s - entry.created_s < policy.min_age_s:
            continue
        yield entry, f"{newer - 1} newer ones are READY" if is_ready else f"it is {entry.state}"
