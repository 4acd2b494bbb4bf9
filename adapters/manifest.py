"""What an archive of a store says of itself: names, versions, and the files of each content. Knows no tar.

manifest.json                      this, first
<64 hex>/facts.json                what was found out about a content when it was published
<64 hex>/adapter_config.json …     its files
manifest.sha256                    of the first member, last: without it the archive is not whole
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from adapters.errors import AdapterError, InvalidAdapterError
from adapters.facts import AdapterFacts, StoredFile
from adapters.files import ADAPTER_FILES
from adapters.names import (
    check_alias,
    check_description,
    check_digest,
    check_labels,
    check_name,
    check_version,
)
from adapters.strict_json import brief, parse_object
from adapters.tar import refuse

FORMAT = 1
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
FACTS = "facts.json"
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
MAX_FACTS_BYTES = 16 * 1024 * 1024

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEMBERS = (FACTS, *ADAPTER_FILES)

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class ListedVersion:
    """A version as it was where it was exported."""

    name: str
    version: int
    digest: str
    pinned: bool
    aliases: tuple[str, ...]
    labels: Mapping[str, str]
    description: str
    created_s: float

    @property
    def reference(self) -> str:
        """ "name@3"."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    Attributes:
        last_versions: by name, the highest number ever used, which a deleted version may have had.
        contents: the members of each, by digest, in the order in which they come.
    """

    last_versions: Mapping[str, int]
    versions: tuple[ListedVersion, ...]
    contents: Mapping[str, tuple[StoredFile, ...]]

    def to_json(self) -> bytes:
        """As it stands in an archive."""
        document = {
            "format": FORMAT,
            "last_versions": dict(self.last_versions),
            "versions": [asdict(version) for version in self.versions],
            "contents": {
                digest: [asdict(member) for member in members] for digest, members in self.contents.items()
            },
        }
        return json.dumps(document, ensure_ascii=False).encode()


def parse_manifest(raw: bytes) -> Manifest:
    """A manifest in which every name, number and size is what it may be.

    Raises:
        InvalidAdapterError: it is not, or is of a later format.
    """
    document = parse_object(raw, source=MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    if document.get("format") != FORMAT:
        refuse(f"has format {brief(document.get('format'))}, this version reads {FORMAT}")
    contents = {
        check_digest(digest): _members(digest, members)
        for digest, members in _typed(document, "contents", dict).items()
    }
    versions = tuple(_version(entry, contents) for entry in _typed(document, "versions", list))
    if len({version.reference for version in versions}) != len(versions):
        refuse("lists a version twice")
    last_versions = _typed(document, "last_versions", dict)
    return Manifest(
        {check_name(name): check_version(_int(last)) for name, last in last_versions.items()},
        versions,
        contents,
    )


def parse_facts(raw: bytes, digest: str) -> AdapterFacts:
    """The facts of a content; InvalidAdapterError if they are malformed, or another's."""
    members = parse_object(raw, source=FACTS, max_bytes=MAX_FACTS_BYTES)
    expected = get_type_hints(AdapterFacts)
    if set(members) != set(expected) or members["digest"] != digest:
        refuse(f"has facts of {digest} that are of another version of this program, or of another content")
    for name, kind in expected.items():
        if not _fits(members[name], kind):
            refuse(f"has {brief(members[name])} as {name} of {digest}")
    lists = {name: tuple(value) for name, value in members.items() if isinstance(value, list)}
    return AdapterFacts(**(members | lists))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is one of a field of AdapterFacts."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    return type(value) is kind


def facts_json(facts: AdapterFacts) -> bytes:
    """As they stand in an archive."""
    return json.dumps(asdict(facts), ensure_ascii=False).encode()


def _members(digest: str, members: Any) -> tuple[StoredFile, ...]:
    if not isinstance(members, list):
        refuse(f"has no members of {digest}")
    found = tuple(_member(digest, member) for member in members)
    names = [member.name for member in found]
    if len(set(names)) != len(names) or not {FACTS, *ADAPTER_FILES[:2]} <= set(names):
        refuse(f"lists {brief(names)} of {digest}")
    return found


def _member(digest: str, member: Any) -> StoredFile:
    is_one = (
        isinstance(member, dict)
        and set(member) == {"name", "size_bytes", "sha256"}
        and member["name"] in _MEMBERS
        and type(member["size_bytes"]) is int
        and member["size_bytes"] >= 0
        and isinstance(member["sha256"], str)
        and _SHA256.fullmatch(member["sha256"])
    )
    if not is_one:
        refuse(f"has the member {brief(member)} of {digest}")
    return StoredFile(**member)


def _version(entry: Any, contents: Mapping[str, object]) -> ListedVersion:
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(ListedVersion)}:
        refuse(f"lists {brief(entry)}")
    try:
        version = ListedVersion(
            name=check_name(_str(entry["name"])),
            version=check_version(_int(entry["version"])),
            digest=check_digest(_str(entry["digest"])),
            pinned=entry["pinned"] is True,
            aliases=tuple(check_alias(_str(alias)) for alias in _typed(entry, "aliases", list)),
            labels=check_labels(
                {_str(key): _str(value) for key, value in _typed(entry, "labels", dict).items()}
            ),
            description=check_description(_str(entry["description"])),
            created_s=float(entry["created_s"]),
        )
    except (TypeError, ValueError) as error:
        refuse(f"lists {brief(entry)}: {error}")
    except AdapterError as error:
        refuse(f"lists {brief(entry.get('name'))}: {error}")
    if version.digest not in contents:
        refuse(f"has no files of {version.reference}")
    return version


def _typed(document: Mapping[str, Any], name: str, kind: type[ValueT]) -> ValueT:
    value = document.get(name)
    if not isinstance(value, kind):
        refuse(f"has {brief(value)} as {name}")
    return value


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is no text")
    return value


def _int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidAdapterError(f"{brief(value)} is no version", reason="BAD_ARCHIVE")
    return value
