"""A server that cannot start says why in one line, with the remedy, and exits with status 1."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.process import environment

TIB = 2**40


def in_a_small_disk(command: Sequence[str], folder: Path, size: str) -> list[str]:
    """The command with a file system of its own, which is full at once."""
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    return ["unshare", "-Urm", "sh", "-c", script, str(folder), *command]


def can_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    command = in_a_small_disk(["true"], folder, "16k")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def serve_command(base: Path, store: Path, flags: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "quickchange", "serve", "--base", str(base), "--store", str(store)]
    command += ["--port", "0", "--metrics-port", "0", "--device", "cpu"]
    return [*command, "--quantization", "none", "--dtype", "float32", *flags]


def said_by(command: Sequence[str]) -> str:
    """The one line of a server that does not start."""
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment({}), timeout=300, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def broken(base: Path, tmp_path: Path) -> Path:
    """A copy of the base, to be damaged."""
    return Path(shutil.copytree(base, tmp_path / "broken"))


def said_of(base: Path, tmp_path: Path, *flags: str) -> str:
    return said_by(serve_command(base, tmp_path / "store", flags))


def test_a_store_on_a_full_disk(base: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_mount(disk):
        pytest.skip("no file system can be mounted here (unshare -Urm)")
    line = said_by(in_a_small_disk(serve_command(base, disk / "store", []), disk, "16k"))
    assert f"--store {disk / 'store'}: " in line
    assert "full" in line or "No space left" in line


def test_a_store_that_nobody_can_write_to(base: Path) -> None:
    store = Path("/proc/quickchange")  # where not even root makes folders
    line = said_by(serve_command(base, store, []))
    assert f"--store {store}: the adapter store cannot be written" in line


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = said_of(tmp_path / "empty", tmp_path)
    assert line == f"error: {tmp_path / 'empty'} has no config.json; give a complete model folder"


def test_a_model_of_an_unknown_kind(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text()) | {"model_type": "nonesuch"}
    (broken / "config.json").write_text(json.dumps(config))
    line = said_of(broken, tmp_path)
    assert line.startswith(
        "error: broken (model_type 'nonesuch') is not an architecture of this transformers"
    )


def test_a_configuration_that_is_no_json(broken: Path, tmp_path: Path) -> None:
    (broken / "config.json").write_text("{")
    assert str(broken / "config.json") in said_of(broken, tmp_path)


def test_weights_that_are_cut_off(broken: Path, tmp_path: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = said_of(broken, tmp_path)
    assert f"{weights} ends before tensor" in line
    assert "download the model again" in line


def test_a_model_that_cannot_answer_is_never_ready(broken: Path, tmp_path: Path) -> None:
    weights = broken / "model.safetensors"
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    line = said_of(broken, tmp_path)
    assert "cannot be served" in line
    assert "logits differ by nan" in line


def test_a_base_larger_than_all_memory(broken: Path, tmp_path: Path) -> None:
    """Its weights are a file with a hole of four terabytes."""
    rows, width = 2**24, 2**16
    header = {"w": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, 4 * rows * width]}}
    raw = json.dumps(header).encode()
    with (broken / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + 4 * rows * width)
    line = said_of(broken, tmp_path)
    assert "need at least 2048.0 GiB of cpu memory" in line
    assert "GiB are free" in line
    assert "quantization nf4" in line


def test_keys_and_values_larger_than_all_memory(base: Path, tmp_path: Path) -> None:
    line = said_of(base, tmp_path, "--kv-bytes", str(TIB), "--max-running-requests", "4096")
    assert "keys and values are to have " in line
    assert "GiB are free" in line
    assert "--kv-bytes" in line
