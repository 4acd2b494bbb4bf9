"""Taking over the versions of another store: which are new here, which are there already, which clash.

Knows no files and no archive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters.errors import AdapterCorruptError, AdapterError, AdapterExistsError
from adapters.lookup import free_version, same_content
from adapters.manifest import ListedVersion
from adapters.rows import Rows
from adapters.transaction import Transaction


@dataclass(frozen=True, slots=True)
class Adopted:
    """What became of a version.

    Attributes:
        version: its number here.
        created: False if its content was a version of the name already.
        aliases_left: those that stayed where they pointed here.
    """

    listed: ListedVersion
    version: int
    created: bool
    aliases_left: tuple[str, ...] = ()


def check_clashes(rows: Rows, versions: Sequence[ListedVersion], *, renumber: bool) -> None:
    """Says before any work is done that `adopt` would refuse.

    Raises:
        AdapterExistsError: a number has other content here, or was used and deleted.
    """
    if not renumber:
        for listed in versions:
            _check_clash(rows, listed)


def adopt(
    rows: Transaction,
    versions: Sequence[ListedVersion],
    last_versions: Mapping[str, int],
    *,
    renumber: bool,
) -> tuple[Adopted, ...]:
    """Lists versions whose contents are listed already.

    An alias that a name has here stays where it points. A version that is there already stays as it is.

    Args:
        versions: of each name in ascending order.
        last_versions: no number up to these will be given to anything else.
        renumber: a version whose number is taken or was used gets the next one, instead of an error.

    Raises:
        AdapterExistsError: a number has other content here, or was used and deleted.
        CapacityError: a name has no more numbers.
    """
    adopted = tuple(_adopt_one(rows, listed, renumber=renumber) for listed in versions)
    for name, last in last_versions.items():
        rows.raise_last_version(name, last)
    return adopted


def _adopt_one(rows: Transaction, listed: ListedVersion, *, renumber: bool) -> Adopted:
    name, wanted = listed.name, listed.version
    try:
        there = same_content(rows, name, wanted, listed.digest)
        number = there.version if there else free_version(rows, name, wanted)
    except AdapterExistsError as error:
        if not renumber:
            raise _with_remedy(error) from None
        there = same_content(rows, name, None, listed.digest)
        number = there.version if there else free_version(rows, name, None)
    if there is not None:
        return Adopted(listed, number, created=False)
    if rows.content(listed.digest) is None:
        raise AdapterCorruptError(f"{listed.digest} was removed here meanwhile; import again")
    rows.add_version(name, number, listed.digest, listed.labels, listed.description, listed.created_s)
    left = tuple(alias for alias in listed.aliases if rows.aliased(name, alias) is not None)
    for alias in sorted(set(listed.aliases) - set(left)):
        rows.set_alias(name, alias, number)
    if listed.pinned:
        rows.set_pinned(name, number, True)
    return Adopted(listed, number, created=True, aliases_left=left)


def _check_clash(rows: Rows, listed: ListedVersion) -> None:
    try:
        if same_content(rows, listed.name, listed.version, listed.digest) is None:
            free_version(rows, listed.name, listed.version)
    except AdapterExistsError as error:
        raise _with_remedy(error) from None


def _with_remedy(error: AdapterError) -> AdapterExistsError:
    why = str(error).partition(";")[0]
    return AdapterExistsError(f"{why}; leave that name out, or import with new numbers (--renumber)")
