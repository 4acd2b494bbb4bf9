"""What an upload announces: its header, checked before a byte of it comes. Knows neither calls nor disks."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from adapters.bundle import MAX_BUNDLE_BYTES
from adapters.errors import CapacityError
from adapters.facts import StoredFile
from adapters.files import BUNDLE_FILE, CONFIG_FILE, WEIGHTS_FILE
from adapters.names import check_description, check_labels, check_name, check_version
from adapters.spec import MAX_CONFIG_BYTES
from quickchange.v1 import adapters_pb2
from server.errors import InvalidRequestError

_REQUIRED_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)
_ALLOWED_FILES: Final = (*_REQUIRED_FILES, BUNDLE_FILE)
_JSON_LIMITS: Final = {CONFIG_FILE: MAX_CONFIG_BYTES, BUNDLE_FILE: MAX_BUNDLE_BYTES}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_UPLOAD_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """A header that passed its checks.

    Attributes:
        upload_id: what the uploader calls it, to go on with it after a cut; empty if that is not wanted.
        version: None for the next one.
    """

    upload_id: str
    name: str
    version: int | None
    files: tuple[StoredFile, ...]
    validate_only: bool
    labels: Mapping[str, str]
    description: str

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> str:
        """The same text for the same header, for comparing them after a restart."""
        return json.dumps(asdict(self), sort_keys=True)

    def differences(self, text: str) -> list[str]:
        """Names of the header's fields in which the plan that `to_json` made a text of is another one."""
        mine, other = json.loads(self.to_json()), json.loads(text)
        return [field for field in mine if mine[field] != other.get(field)]


def plan_of(header: adapters_pb2.UploadHeader, max_upload_bytes: int) -> UploadPlan:
    """
    Raises:
        InvalidRequestError, InvalidAdapterError: naming what is wrong.
        CapacityError: the upload is larger than this server takes.
    """
    plan = UploadPlan(
        upload_id=check_upload_id(header.upload_id, "header.upload_id") if header.upload_id else "",
        name=check_name(header.name),
        version=check_version(header.version) if header.HasField("version") else None,
        files=tuple(_file_of(file, index) for index, file in enumerate(header.files)),
        validate_only=header.validate_only,
        labels=check_labels(header.labels),
        description=check_description(header.description),
    )
    names = [file.name for file in plan.files]
    if len(set(names)) != len(names) or not set(_REQUIRED_FILES) <= set(names):
        raise InvalidRequestError(
            "header.files",
            f"are {', '.join(names) or 'none'}; send {' and '.join(_REQUIRED_FILES)} once each, "
            f"and {BUNDLE_FILE} if there is one",
        )
    if plan.size_bytes > max_upload_bytes:
        raise CapacityError(
            f"the upload has {plan.size_bytes} bytes, at most {max_upload_bytes} are taken",
            reason="UPLOAD_TOO_LARGE",
        )
    return plan


def check_upload_id(upload_id: str, field: str) -> str:
    """The id itself if an upload may be called so.

    Raises:
        InvalidRequestError: naming the field that has it.
    """
    if not _UPLOAD_ID.fullmatch(upload_id):
        raise InvalidRequestError(
            field, "must be 1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-', and begin with a letter or digit"
        )
    return upload_id


def _file_of(file: adapters_pb2.UploadFile, index: int) -> StoredFile:
    where = f"header.files[{index}]"
    if file.name not in _ALLOWED_FILES:
        raise InvalidRequestError(
            f"{where}.name", f"is {file.name[:128]!r}, must be one of {', '.join(_ALLOWED_FILES)}"
        )
    if file.size_bytes == 0:
        raise InvalidRequestError(f"{where}.size_bytes", "is 0, must be the size of the file")
    limit = _JSON_LIMITS.get(file.name)
    if limit is not None and file.size_bytes > limit:
        raise InvalidRequestError(
            f"{where}.size_bytes", f"is {file.size_bytes}, {file.name} may have at most {limit}"
        )
    if not _SHA256.fullmatch(file.sha256):
        raise InvalidRequestError(f"{where}.sha256", "must be 64 lower-case hexadecimal digits")
    return StoredFile(file.name, file.size_bytes, file.sha256)
