"""Brings the base into memory as the settings ask: bare, or with one adapter folded in. Knows no requests."""

import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adapters.base import Base, load_base
from adapters.bundle import check_text
from adapters.cache import default_cache_dir
from adapters.errors import AdapterCorruptError, AdapterNotFoundError, InvalidAdapterError
from adapters.quantize import Quantization, Scheme
from adapters.replica import ReplicaStore
from adapters.room import memory_free_on
from adapters.store import AdapterStore
from server.config import MIB, BaseSettings, ServerSettings
from server.memory import OutOfMemoryAtStartError
from server.merged import MergedAdapter
from server.request import AdapterIdentity

if TYPE_CHECKING:
    from adapters.merged import Merge

log = logging.getLogger(__name__)

_ELSEWHERE = (
    "give it room, run `quickchange merge` on a larger machine and serve its folder as --base, or serve the "
    "adapter without merging it"
)


def load_bare(settings: BaseSettings) -> Base:
    """The base as it is; errors as `load_base`."""
    return _loaded(settings, settings.source, settings.quantization)


def load_merged(settings: ServerSettings, store: AdapterStore) -> tuple[Base, MergedAdapter]:
    """The base with the adapter that the settings name in its weights, under a fingerprint of its own.

    Raises:
        AdapterError: there is no such adapter, it cannot be folded, or was made for another base.
        BaseModelError: the base cannot be served.
        OutOfMemoryAtStartError: there is no room to fold it, or for what comes of it.
    """
    # Here, since PEFT, which folds DoRA and its like, takes a second and memory that others do not need.
    from adapters.merged import make_merge, planned_merge

    wanted = settings.base
    assert wanted.merged is not None, "the caller asked for one"
    cache, progress = wanted.cache_dir or default_cache_dir(), sys.stderr.isatty()
    with _adapter(wanted.merged, store) as (folder, record):
        merge = planned_merge(
            wanted.source,
            Scheme(wanted.quantization),
            folder,
            cache,
            as_source=wanted.merged_into == "requantized",
            progress=progress,
        )
        _check_room(merge, cache)
        if wanted.merged_into == "dequantized":
            _check_dense(merge, wanted)
        make_merge(merge, cache, progress=progress)
    quantization = wanted.quantization if wanted.merged_into == "requantized" else "none"
    base = _loaded(wanted, str(merge.folder), quantization)
    if merge.bundle is not None:
        check_text(merge.bundle, base.eos_token_ids, base.chat_template)
    identity = record or AdapterIdentity(folder.resolve().name, 0, merge.digest)
    merged = MergedAdapter(identity, wanted.merged_into, merge.fingerprint)
    _tell(merged, base, wanted)
    return replace(base, name=merge.name, layout=replace(base.layout, merged=merged.label)), merged


def _loaded(settings: BaseSettings, source: str, quantization: Quantization) -> Base:
    return load_base(
        source,
        purpose="serve",
        quantization=quantization,
        dtype=settings.dtype,
        device=settings.device,
        kernels=settings.kernels,
        matmul_precision=settings.matmul_precision,
        cache_dir=settings.cache_dir,
        progress=sys.stderr.isatty(),
    )


def _tell(merged: MergedAdapter, base: Base, settings: BaseSettings) -> None:
    log.info(
        "adapter merged adapter=%s digest=%s into=%s bare_base=%s base=%s",
        merged.label,
        merged.identity.digest,
        merged.into,
        merged.bare_fingerprint,
        base.fingerprint,
    )
    if merged.into == "requantized":
        log.warning(
            "%s is merged into 4-bit weights, which are not quite the live adapter: `quickchange merge "
            "--into requantized --data` measures by how much; dequantized weights are it",
            merged.label,
        )
    elif settings.quantization != "none" and base.device.type == "cpu":
        log.warning(
            "the base with %s is not quantized; on a CPU the live adapter on 4-bit weights takes less "
            "memory, and less time while few requests run",
            merged.label,
        )


@contextmanager
def _adapter(reference: str, store: AdapterStore) -> Iterator[tuple[Path, AdapterIdentity | None]]:
    """The folder that is meant, and what the store calls it; None for a folder outside of it."""
    if "/" in reference:
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            raise AdapterNotFoundError(f"there is no folder {folder}; without a slash it means the store's")
        yield folder, None
        return
    try:
        record, lease = store.hold(reference)
        digest = record.facts.digest
        if lease is None and isinstance(store, ReplicaStore):
            store.fetch(digest)
            lease = store.keep(digest)
    except (AdapterNotFoundError, InvalidAdapterError) as error:
        hint = f"; for the folder of that name say ./{reference}" if Path(reference).is_dir() else ""
        raise AdapterNotFoundError(f"{error}{hint}") from None
    if lease is None:
        raise AdapterCorruptError(f"the files of {record.reference} are not in the store; publish it again")
    try:
        store.verify(digest)
        yield store.path_of(digest), AdapterIdentity(record.name, record.version, digest)
    finally:
        lease.release()


def _check_room(merge: "Merge", cache: Path) -> None:
    """Whether the adapter can be folded in here, before minutes go into it."""
    if merge.is_made:
        return
    cache.mkdir(parents=True, exist_ok=True)
    _require(merge, "memory while it is folded in", merge.making_bytes, memory_free_on(torch.device("cpu")))
    _require(merge, f"disk in {cache}", merge.folder_bytes, shutil.disk_usage(cache).free)


def _check_dense(merge: "Merge", settings: BaseSettings) -> None:
    """Whether weights that are not quantised fit, in the type in which they are loaded."""
    on_cuda = settings.device != "cpu" and torch.cuda.is_available()
    is_float32 = settings.dtype == "float32" or (settings.dtype == "auto" and not on_cuda)
    needed_bytes = merge.parameters * (4 if is_float32 else 2)
    device = torch.device("cuda" if on_cuda else "cpu")
    _require(merge, f"{device} memory, not quantized", needed_bytes, memory_free_on(device))


def _require(merge: "Merge", what: str, needed_bytes: int, there_bytes: int) -> None:
    if needed_bytes > there_bytes:
        raise OutOfMemoryAtStartError(
            f"the {merge.parameters} parameters of {merge.name} need {needed_bytes // MIB} MiB of {what}, "
            f"and {there_bytes // MIB} MiB are free; {_ELSEWHERE}"
        )
