"""What is known about an adapter once it was checked and stored. Plain values; no files, no tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Method = Literal["lora", "rslora"]


class AdapterState(StrEnum):
    """What the catalogue says of a version; anything short of READY is not served."""

    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """The result of a validation.

    Attributes:
        digest: "sha256:…" over canonical configuration and tensors.
        rank: the largest rank of any module.
        alpha: the configured alpha, before any alpha_pattern.
        target_modules: as configured: suffixes, or one regular expression or "all-linear".
        size_bytes: of all files together.
        base_fingerprint: of the base it was checked against.
        matched_modules: every module of that base that it changes.
        delta_norm: Frobenius norm of the whole update, scaling included.
        dtype: storage type of the tensors, e.g. "F32"; several are joined with "+".
        parameter_count: elements of all its tensors.
    """

    digest: str
    method: Method
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size_bytes: int
    base_fingerprint: str
    matched_modules: tuple[str, ...]
    delta_norm: float
    dtype: str
    parameter_count: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a stored adapter, as it was when it was published."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One version of one name, as the catalogue has it.

    Attributes:
        etag: changes whenever anything else here changes.
        created_s, updated_s: seconds since the epoch.
        error: why the state is FAILED; empty otherwise.
    """

    name: str
    version: int
    facts: AdapterFacts
    files: tuple[StoredFile, ...]
    etag: str
    state: AdapterState
    pinned: bool
    aliases: tuple[str, ...]
    labels: Mapping[str, str]
    description: str
    created_s: float
    updated_s: float
    error: str

    @property
    def reference(self) -> str:
        """The one reference that always means this version: "name@3"."""
        return f"{self.name}@{self.version}"
