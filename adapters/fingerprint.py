"""Owns the identity of a base: a digest of weights, configuration and quantisation. Loads no model.

fingerprint = SHA-256 of {weights digest, canonical configuration, quantisation scheme}
weights     = SHA-256 of the lines "name dtype shape SHA-256(bytes)", sorted by name

So it is the same on every machine, for every path and for every way of cutting the weights into files.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import BaseNotFoundError

# Keys of config.json that do not change what the weights compute.
_VOLATILE_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)
_MAX_HEADER_BYTES = 100_000_000  # as safetensors itself allows
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `path[start:end]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int


def fingerprint_of(folder: Path, scheme: str, cache_dir: Path) -> str:
    """ "sha256:…" of a model folder under a quantisation scheme; the weights are read once per machine.

    Raises:
        BaseNotFoundError: the folder has no readable config.json or safetensors weights.
    """
    identity = {
        "format": 1,
        "weights": _cached_weights_digest(weight_files(folder), cache_dir),
        "config": canonical_config(read_config(folder)),
        "quantization": scheme,
    }
    return "sha256:" + hashlib.sha256(_canonical_json(identity)).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BaseNotFoundError(f"{path} cannot be read ({error}); give a complete model folder") from error
    if not isinstance(config, dict):
        raise BaseNotFoundError(f"{path} is not a JSON object; give a complete model folder")
    return config


def canonical_config(value: Any) -> Any:
    """A configuration without volatile keys and without nulls, at every depth."""
    if isinstance(value, Mapping):
        return {
            key: canonical_config(item)
            for key, item in value.items()
            if key not in _VOLATILE_KEYS and item is not None
        }
    if isinstance(value, list):
        return [canonical_config(item) for item in value]
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as its index names them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise BaseNotFoundError(f"{folder} has no model.safetensors; give a folder with safetensors weights")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseNotFoundError(f"{index} is not a weight index; download the model again") from error
    paths = [folder / str(name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if "/" in str(name) or not path.is_file():
            raise BaseNotFoundError(f"{index} names {name!r}, which is not in the folder; download it again")
    return paths


def weights_digest(paths: list[Path]) -> str:
    """SHA-256 over every tensor, independent of how tensors lie in files."""
    tensors = sorted((t for path in paths for t in stored_tensors(path)), key=lambda tensor: tensor.name)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(_tensor_digest, tensors)
    lines = (
        json.dumps([tensor.name, tensor.dtype, tensor.shape, digest])
        for tensor, digest in zip(tensors, digests, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def stored_tensors(path: Path) -> list[StoredTensor]:
    """Every tensor of a safetensors file, from its header; bounds are checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise BaseNotFoundError(f"{path} is not a complete safetensors file; download the model again")
        raw = handle.read(length)
    try:
        header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        tensors = [_stored_tensor(name, entry, path, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseNotFoundError(f"{path} has a broken header; download the model again") from error
    for tensor in tensors:
        if not 8 + length <= tensor.start <= tensor.end <= size:
            raise BaseNotFoundError(f"{path} ends before tensor {tensor.name!r}; download the model again")
    return tensors


def _stored_tensor(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    start, end = (data_start + int(offset) for offset in entry["data_offsets"])
    return StoredTensor(
        name, str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), path, start, end
    )


def _tensor_digest(tensor: StoredTensor) -> str:
    """Read in pieces: what is mapped counts as this process's memory once it was looked at."""
    digest = hashlib.sha256()
    with tensor.path.open("rb") as handle:
        handle.seek(tensor.start)
        for start in range(tensor.start, tensor.end, _CHUNK_BYTES):
            digest.update(handle.read(min(_CHUNK_BYTES, tensor.end - start)))
    return digest.hexdigest()


def _cached_weights_digest(paths: list[Path], cache_dir: Path) -> str:
    """The weights digest, remembered by the files' names, sizes and modification times."""
    resolved = sorted(path.resolve() for path in paths)
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in resolved]
    key = hashlib.sha256(_canonical_json(stats)).hexdigest()
    record = cache_dir / "fingerprints" / key
    if record.is_file():
        return record.read_text()
    digest = weights_digest(paths)
    record.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=record.parent, prefix=".", delete=False) as staged:
        staged.write(digest)
    Path(staged.name).replace(record)
    return digest


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
