"""Ways to spoil an adapter's folder. No test lives here."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "quickchange.json"


PAYLOAD = "tests.e2e.payload"
"""A module that leaves a trace where it is imported."""


def trace_of(process_id: int) -> Path:
    """The file that appears if a child of this process imports PAYLOAD."""
    return Path(tempfile.gettempdir()) / f"quickchange-payload-{process_id}"


def with_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def with_header(folder: Path, change: Callable[[str], str]) -> None:
    """Rewrites the header's text; the data behind it stays."""
    path = folder / WEIGHTS
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + length].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
