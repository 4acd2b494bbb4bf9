"""Owns bases with one adapter folded in: made once, kept as plain model folders. Knows no server.

Such a folder holds the weights and the configuration that `quickchange merge --dtype float32` writes, `--into
dequantized` or, as a source, `original`. So it has the same fingerprint, and an adapter that was trained on
what `merge` wrote fits a server that merged the same.
"""

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.bundle import Bundle, read_bundle
from adapters.cache import make_once
from adapters.fingerprint import fingerprint_of, stored_tensors, weight_files
from adapters.fold import base_to_fold_into, fold_folder
from adapters.measures import stored_digest
from adapters.model_folder import save_model
from adapters.quantize import Scheme
from adapters.sources import resolve_source
from adapters.unserved import unserved_digest
from adapters.unserved_folder import unserved_kind

log = logging.getLogger(__name__)

_FORMAT = 1  # another number if another sum comes out


@dataclass(frozen=True, slots=True)
class Merge:
    """A base and an adapter that are to be one.

    Attributes:
        name: of the bare base.
        source: its folder.
        scheme: how it is quantised where the adapter was trained.
        fingerprint: of the bare base under the scheme.
        adapter: the adapter's folder.
        bundle: its manifest; None if it has none.
        as_source: whether the update is added to the source's own weights, which are to be quantised, and not
            to the base as the adapter knows it.
        digest: of the adapter's content.
        folder: where the result is, or will be.
        parameters: of the base.
    """

    name: str
    source: Path
    scheme: Scheme
    fingerprint: str
    adapter: Path
    bundle: Bundle | None
    as_source: bool
    digest: str
    folder: Path
    parameters: int

    @property
    def is_made(self) -> bool:
        """Whether this machine has the result already."""
        return self.folder.is_dir()

    @property
    def making_bytes(self) -> int:
        """Memory that making it takes at most: the base as it is loaded and as it is changed, in float32."""
        return (3 if self.as_source else 2) * self.folder_bytes

    @property
    def folder_bytes(self) -> int:
        """Of the disk that the result takes."""
        return 4 * self.parameters


def planned_merge(
    source: str,
    scheme: Scheme,
    adapter: Path,
    cache_dir: Path,
    *,
    as_source: bool = False,
    progress: bool = True,
) -> Merge:
    """What is to be merged, and where to; no weights are loaded.

    Args:
        source: as for `adapters.base.load_base`.
        adapter: a folder of LoRA, DoRA or IA³, or one of biases.
        as_source: see `Merge`.

    Raises:
        BaseModelError: there is no such base.
        AdapterError: the adapter is malformed, or of a kind that cannot be folded.
    """
    found = resolve_source(source, cache_dir, progress=progress)
    fingerprint = fingerprint_of(found.folder, scheme.name, cache_dir)
    bundle = read_bundle(adapter)
    digest = _digest_of(adapter)
    tensors = [tensor for path in weight_files(found.folder) for tensor in stored_tensors(path)]
    return Merge(
        name=found.name,
        source=found.folder,
        scheme=scheme,
        fingerprint=fingerprint,
        adapter=adapter,
        bundle=bundle,
        as_source=as_source,
        digest=digest,
        folder=cache_dir / "merged" / _key(fingerprint, digest, bundle, as_source),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
    )


def make_merge(merge: Merge, cache_dir: Path, *, progress: bool = True) -> None:
    """Makes the folder, unless it is there.

    Raises:
        AdapterError: the adapter does not fit the base.
        BaseModelError: the base cannot be loaded.
    """
    began_s = time.monotonic()
    build = partial(_build, merge, cache_dir, progress=progress)
    made = make_once(merge.folder, build)
    log.info(
        "merged base=%s adapter=%s %s seconds=%.1f folder=%s",
        merge.name,
        merge.digest,
        "made" if made else "found",
        time.monotonic() - began_s,
        merge.folder,
    )


def _build(merge: Merge, cache_dir: Path, staged: Path, *, progress: bool) -> None:
    base = base_to_fold_into(
        str(merge.source), merge.scheme, as_source=merge.as_source, cache_dir=cache_dir, progress=progress
    )
    fold_folder(base, merge.adapter)
    template = None if merge.bundle is None else merge.bundle.chat_template
    save_model(staged, base, base.model, dtype="float32", chat_template=template)


def _digest_of(adapter: Path) -> str:
    """As a store has it; of what no store takes, over its files."""
    if unserved_kind(adapter) in ("dora", "ia3", "biases"):
        return unserved_digest(adapter)
    return stored_digest(adapter)


def _key(fingerprint: str, digest: str, bundle: Bundle | None, as_source: bool) -> str:
    """Of all that decides what the folder holds."""
    parts = [_FORMAT, fingerprint, digest, None if bundle is None else bundle.canonical(), as_source]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
