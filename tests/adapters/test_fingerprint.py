"""A base's identity: what must change it, and what must not."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters import fingerprint
from adapters.errors import BaseNotFoundError
from adapters.fingerprint import fingerprint_of
from tests.models import build_tiny_model, rewrite_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "model")


@pytest.fixture
def known(folder: Path, tmp_path: Path) -> str:
    return fingerprint_of(folder, "nf4", tmp_path / "cache")


def test_it_is_a_digest(known: str) -> None:
    assert known.startswith("sha256:")
    assert len(known) == len("sha256:") + 64


def test_the_place_and_the_way_of_sharding_do_not_matter(folder: Path, known: str, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "other-name"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other, max_shard_size="100KB")
    shutil.copy(folder / "config.json", other)
    assert len(list(other.glob("model-*.safetensors"))) > 1
    assert fingerprint_of(other, "nf4", tmp_path / "other-cache") == known


def test_volatile_configuration_does_not_matter(folder: Path, known: str, tmp_path: Path) -> None:
    rewrite_config(
        folder,
        transformers_version="9.9",
        dtype="bfloat16",
        torch_dtype="float16",
        use_cache=False,
        architectures=["B", "A"],
        _name_or_path="/home/someone",
        sliding_window=None,
    )
    assert fingerprint_of(folder, "nf4", tmp_path / "cache") == known


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"rope_parameters": {}}])
def test_configuration_that_changes_results_matters(
    folder: Path, known: str, tmp_path: Path, change: dict[str, object]
) -> None:
    rewrite_config(folder, **change)
    assert fingerprint_of(folder, "nf4", tmp_path / "cache") != known


def test_the_quantisation_matters(folder: Path, known: str, tmp_path: Path) -> None:
    assert fingerprint_of(folder, "none", tmp_path / "cache") != known


def test_one_bit_of_one_weight_matters(folder: Path, known: str, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].view(dtype=tensors["model.norm.weight"].dtype)[0] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_of(folder, "nf4", tmp_path / "cache") != known


def test_a_tensor_under_another_name_matters(folder: Path, known: str, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    first, second = (f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_of(folder, "nf4", tmp_path / "cache") != known


def test_weights_are_read_once(
    folder: Path, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_again(paths: list[Path]) -> str:
        raise AssertionError(f"{paths} were read again")

    monkeypatch.setattr(fingerprint, "weights_digest", read_again)
    assert fingerprint_of(folder, "nf4", tmp_path / "cache") == known
    later = (folder / "model.safetensors").stat().st_mtime_ns + 1
    os.utime(folder / "model.safetensors", ns=(later, later))
    with pytest.raises(AssertionError, match="read again"):
        fingerprint_of(folder, "nf4", tmp_path / "cache")


def test_damaged_weights_are_named(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (
        b"",
        whole[:6],
        whole[:40],
        whole[:-1],
        b"\xff" * 8 + whole[8:],
        whole[:9] + b"}" + whole[10:],
    ):
        weights.write_bytes(damaged)
        with pytest.raises(BaseNotFoundError, match=r"model\.safetensors.*download"):
            fingerprint_of(folder, "nf4", tmp_path / "cache")


def test_an_index_that_leaves_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseNotFoundError, match="outside"):
        fingerprint_of(folder, "nf4", tmp_path / "cache")
