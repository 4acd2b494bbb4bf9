"""Adapters for tests of the store, which knows no format: any bytes will do. No torch."""

import hashlib
import os
from pathlib import Path
from typing import Any

from adapters.facts import AdapterFacts, AdapterRecord
from adapters.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.store import AdapterStore

# Where files cost no disk, for tests that open stores hundreds of times; None is the usual temporary folder.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def digest_of(content: str) -> str:
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def facts_of(content: str, fingerprint: str = "sha256:base") -> AdapterFacts:
    return AdapterFacts(
        digest=digest_of(content),
        method="lora",
        rank=4,
        alpha=8.0,
        target_modules=("q_proj",),
        size_bytes=2 + len(content.encode()),
        base_fingerprint=fingerprint,
        matched_modules=("model.layers.0.self_attn.q_proj",),
        delta_norm=1.5,
        dtype="F32",
        parameter_count=1,
    )


def stage(store: AdapterStore, content: str) -> Path:
    staged = store.new_staging()
    (staged / CONFIG_FILE).write_text("{}")
    (staged / WEIGHTS_FILE).write_text(content)
    return staged


def publish(store: AdapterStore, name: str, content: str, version: int | None = None) -> AdapterRecord:
    return store.publish(name, stage(store, content), facts_of(content), version=version)[0]


def references(store: AdapterStore, **filters: Any) -> list[str]:
    return [record.reference for record in store.list(**filters)[0]]


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def staged_by_anyone(root: Path) -> list[str]:
    return [str(path) for path in (root / "staging").glob("*/*")]
