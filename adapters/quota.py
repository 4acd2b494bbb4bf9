"""How much a store may hold, by name and in all. Knows the catalogue, not the disk."""

from dataclasses import dataclass

from adapters.errors import CapacityError
from adapters.rows import Rows


@dataclass(frozen=True, slots=True)
class StoreQuota:
    """Upper limits; None is no limit."""

    max_bytes: int | None = None
    max_bytes_per_name: int | None = None
    max_versions_per_name: int | None = None

    def check(self, rows: Rows, name: str, size_bytes: int, *, total_bytes: int, growth_bytes: int) -> None:
        """Whether one more version fits.

        Args:
            size_bytes: of the version.
            total_bytes: of the store as a whole.
            growth_bytes: what it grows by: nothing if the content is there already.

        Raises:
            CapacityError: reason VERSIONS_QUOTA, NAME_QUOTA or STORE_QUOTA.
        """
        versions, name_bytes = rows.usage_of(name)
        if self.max_versions_per_name is not None and versions >= self.max_versions_per_name:
            raise _over(
                "VERSIONS_QUOTA",
                f"{name} has {versions} versions, and a name may have {self.max_versions_per_name}",
                f"one of {name}",
            )
        if self.max_bytes_per_name is not None and name_bytes + size_bytes > self.max_bytes_per_name:
            raise _over(
                "NAME_QUOTA",
                f"{name} has {name_bytes} bytes, this version {size_bytes}, and a name may have "
                f"{self.max_bytes_per_name}",
                f"one of {name}",
            )
        if self.max_bytes is not None and total_bytes + growth_bytes > self.max_bytes:
            raise _over(
                "STORE_QUOTA",
                f"the store has {total_bytes} bytes, {growth_bytes} more with what is uploaded now, and may "
                f"have {self.max_bytes}",
                "some",
            )


def _over(reason: str, what: str, which: str) -> CapacityError:
    return CapacityError(f"{what}; delete {which} with `quickchange adapters rm`", reason=reason)
