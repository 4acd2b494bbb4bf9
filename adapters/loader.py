"""Threads that bring adapters from disk to memory and between its tiers. Knows no budgets and no slots."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapters.bundle import check_base, read_bundle
from adapters.copies import FactorCopies
from adapters.errors import AdapterCorruptError
from adapters.factors import AdapterFactors, read_factors
from adapters.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.layout import BaseLayout
from adapters.spec import parse_spec
from adapters.store import AdapterStore
from adapters.tier import TierName
from adapters.weights import load_pairs


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter in memory.

    Attributes:
        disk_s: what it took to read it from disk, the time it was read.
    """

    factors: AdapterFactors
    disk_s: float


class AdapterLoader:
    """One thread reads, one checks what is read, one copies.

    Copies run in the order in which they were asked for. So what leaves the device has left it before
    something comes that needs its room, and a copy never waits for a disk.
    """

    def __init__(
        self, store: AdapterStore, layout: BaseLayout, copies: FactorCopies, dtype: torch.dtype
    ) -> None:
        """
        Args:
            dtype: type in which factors are kept and applied.
        """
        self._store, self._layout, self._copies, self._dtype = store, layout, copies, dtype
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._verifier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-verifier")
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-copier")

    def read(self, digest: str, tier: TierName) -> "Future[Loaded]":
        """From disk. Errors of the future: AdapterError, OSError, RuntimeError, MemoryError."""
        return self._reader.submit(self._read, digest, tier)

    def promote(self, digest: str, on_host: "Future[Loaded]") -> "Future[Loaded]":
        """From host to device; from disk, if it never arrived on the host. Errors as `read`."""
        return self._copier.submit(self._promote, digest, on_host)

    def demote(self, loaded: Loaded) -> "Future[Loaded]":
        """From device to host. Errors of the future: RuntimeError, MemoryError."""
        return self._copier.submit(self._demote, loaded)

    def close(self) -> None:
        """Ends the threads after what they are doing now."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._verifier.shutdown(wait=True)
        self._copier.shutdown(wait=True, cancel_futures=True)

    # In the threads

    def _read(self, digest: str, tier: TierName) -> Loaded:
        loaded = self._read_to_host(digest)
        return self._copier.submit(self._to_device, loaded).result() if tier == "device" else loaded

    def _read_to_host(self, digest: str) -> Loaded:
        began_s = time.monotonic()
        # Hashing runs beside the reading, and without the interpreter.
        verified = self._verifier.submit(self._verify, digest)
        try:
            folder = self._store.path_of(digest)
            self._check_base(folder)
            spec = parse_spec((folder / CONFIG_FILE).read_bytes())
            pairs = load_pairs(folder / WEIGHTS_FILE, spec, self._layout)
            factors = read_factors(pairs, spec, self._dtype, page_locked=self._copies.are_needed)
        finally:
            verified.result()  # that the files changed explains any other error
        return Loaded(factors, time.monotonic() - began_s)

    def _check_base(self, folder: Path) -> None:
        bundle = read_bundle(folder)
        check_base(bundle.base_fingerprint if bundle else None, self._layout)

    def _verify(self, digest: str) -> None:
        try:
            self._store.verify(digest)
        except AdapterCorruptError as error:
            self._store.mark_failed(digest, str(error))
            raise

    def _promote(self, digest: str, on_host: "Future[Loaded]") -> Loaded:
        arrived = on_host.exception() is None
        return self._to_device(on_host.result() if arrived else self._read_to_host(digest))

    def _to_device(self, loaded: Loaded) -> Loaded:
        return replace(loaded, factors=self._copies.to_device(loaded.factors))

    def _demote(self, loaded: Loaded) -> Loaded:
        return replace(loaded, factors=self._copies.to_host(loaded.factors))
