"""A base with an adapter folded in: which weights come of it, under which name, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters import host_memory
from adapters.base import Base
from adapters.bundle import Bundle
from adapters.errors import AdapterCorruptError, AdapterError
from adapters.files import ADAPTER_FILES, WEIGHTS_FILE
from adapters.fingerprint import fingerprint_of
from adapters.host_memory import HostMemory
from adapters.measures import stored_digest
from adapters.native import NativeLinear
from adapters.remote import RemotePlace
from adapters.remote_push import push_store
from adapters.replica import ReplicaStore
from adapters.store import AdapterStore
from adapters.validate import validate_adapter
from kernels.linear import unpacked_weight
from server.config import MIB, BaseSettings, ServerSettings
from server.memory import OutOfMemoryAtStartError
from server.resident import load_bare, load_merged
from server.setting_sources import SettingsError, settings_from
from tests.adapters.builders import make_adapter
from tests.adapters.published import spoil
from tests.models import build_tiny_model
from training.merge import merge_adapter


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("resident") / "tiny")


@pytest.fixture(scope="module")
def adapter(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return make_adapter(model, tmp_path_factory.mktemp("resident") / "sql", target_modules="all-linear")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store") as opened:
        yield opened


def _settings(source: Path, cache: Path, merged: object, **base: Any) -> ServerSettings:
    return ServerSettings(
        BaseSettings(str(source), device="cpu", cache_dir=cache, merged=str(merged), **base)
    )


def _weights(base: Base) -> dict[str, torch.Tensor]:
    """What the native layers stand for, by the name that a model folder has for it."""
    layers = {name: each for name, each in base.model.named_modules() if isinstance(each, NativeLinear)}
    return {
        f"{name}.weight": unpacked_weight(
            layer.packed.weights, layer.packed.scales, (layer.out_features, layer.in_features)
        )
        for name, layer in layers.items()
    }


@pytest.mark.parametrize(
    ("options", "into", "served"),
    [
        ({"quantization": "nf4", "merged_into": "requantized"}, "requantized", "nf4"),
        ({"quantization": "nf4"}, "dequantized", "none"),
        ({"quantization": "none"}, "dequantized", "none"),
    ],
)
def test_the_weights_are_those_that_merge_writes(
    options: dict[str, Any],
    into: Any,
    served: str,
    source: Path,
    adapter: Path,
    store: AdapterStore,
    base_cache: Path,
    tmp_path: Path,
) -> None:
    """So what `merge --into … --data` certifies is what is served; every other sum is another fingerprint."""
    settings = _settings(source, base_cache, adapter, dtype="float32", **options)
    base, merged = load_merged(settings, store)
    assert (merged.into, base.quantization, base.name) == (into, served, "tiny")
    expected = {"quantization": options["quantization"], "into": into, "dtype": "float32"}
    written = tmp_path / "written"
    merge_adapter(str(source), adapter, written, cache_dir=base_cache, progress=False, **expected)
    tensors, found = load_file(written / "model.safetensors"), _weights(base)
    assert len(found) == len(base.layout.modules)
    for name, weight in found.items():
        # One scale of native code may be another order of two factors away.
        torch.testing.assert_close(weight, tensors[name], rtol=1e-6, atol=0.0)
    bare = load_bare(settings.base)
    assert merged.bare_fingerprint == bare.fingerprint != base.fingerprint
    if into == "dequantized":
        assert base.fingerprint == fingerprint_of(written, "none", base_cache)
        return
    original = {"quantization": "nf4", "into": "original", "dtype": "float32"}
    merge_adapter(
        str(source), adapter, tmp_path / "original", cache_dir=base_cache, progress=False, **original
    )
    assert base.fingerprint == fingerprint_of(tmp_path / "original", "nf4-64-double", base_cache)


def test_it_is_made_once_and_its_template_is_the_adapters(
    source: Path, adapter: Path, store: AdapterStore, tmp_path: Path
) -> None:
    with_text = Path(shutil.copytree(adapter, tmp_path / "with-text"))
    fingerprint = load_bare(_settings(source, tmp_path, adapter, quantization="none").base).fingerprint
    (with_text / "quickchange.json").write_text(Bundle(fingerprint, chat_template="mine").to_json())
    settings = _settings(source, tmp_path, with_text, quantization="none")
    first, merged = load_merged(settings, store)
    (made,) = [path for path in (tmp_path / "merged").iterdir() if path.is_dir()]
    began_ns = (made / "model.safetensors").stat().st_mtime_ns
    again, _ = load_merged(settings, store)
    assert (made / "model.safetensors").stat().st_mtime_ns == began_ns
    assert first.fingerprint == again.fingerprint
    assert first.chat_template == "mine" != load_bare(settings.base).chat_template
    assert (merged.label, merged.identity.version) == ("with-text", 0)
    assert merged.identity.digest == stored_digest(with_text)
    assert first.layout.merged == "with-text"


def test_the_same_bits_with_any_number_of_threads(source: Path, adapter: Path, tmp_path: Path) -> None:
    """Or servers that merged the same could not share the adapters that were trained on it."""
    digests, threads = set(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = tmp_path / f"{count}"
            merge_adapter(
                str(source), adapter, out, dtype="float32", cache_dir=tmp_path / "cache", progress=False
            )
            digests.add(fingerprint_of(out, "none", tmp_path / "cache"))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def _published(store: AdapterStore, adapter: Path, base: Base) -> str:
    folder = store.new_staging()
    for file in ADAPTER_FILES[:2]:
        shutil.copy(adapter / file, folder)
    record, _ = store.publish("sql", folder, validate_adapter(folder, base.layout, max_rank=64))
    return record.facts.digest


def test_every_reference_of_a_store_means_a_version(
    source: Path, adapter: Path, store: AdapterStore, base_cache: Path
) -> None:
    settings = _settings(source, base_cache, "sql", quantization="none")
    digest = _published(store, adapter, load_bare(settings.base))
    store.update("sql", 1, set_aliases=("prod",))
    fingerprints = set()
    for reference in ("sql", "sql@1", "sql:prod", digest):
        base, merged = load_merged(_settings(source, base_cache, reference, quantization="none"), store)
        assert (merged.label, merged.identity.digest) == ("sql@1", digest)
        fingerprints.add(base.fingerprint)
    assert len(fingerprints) == 1
    store.delete("sql")
    assert store.remove_blob(digest), "no lease is left"


def test_a_copy_of_a_store_fetches_what_it_folds_in(
    source: Path, adapter: Path, store: AdapterStore, tmp_path: Path
) -> None:
    settings = _settings(source, tmp_path, "sql", quantization="none")
    digest = _published(store, adapter, load_bare(settings.base))
    place = RemotePlace((tmp_path / "remote").as_uri())
    push_store(store, place)
    with ReplicaStore(tmp_path / "copies", place) as replica:
        replica.refresh()
        assert replica.hold("sql")[1] is None, "its files are elsewhere"
        _, merged = load_merged(settings, replica)
    assert (merged.label, merged.identity.digest) == ("sql@1", digest)


def test_damaged_files_are_not_folded_in(
    source: Path, adapter: Path, store: AdapterStore, tmp_path: Path
) -> None:
    settings = _settings(source, tmp_path, "sql", quantization="none")
    digest = _published(store, adapter, load_bare(settings.base))
    spoil(store.path_of(digest) / WEIGHTS_FILE)
    with pytest.raises(AdapterCorruptError):
        load_merged(settings, store)
    assert not (tmp_path / "merged").exists()


def _refusals(tmp_path: Path, adapter: Path) -> dict[str, str]:
    """References and what is said of them."""
    prompt = tmp_path / "prompt"
    prompt.mkdir()
    (prompt / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    (other / "quickchange.json").write_text(Bundle("sha256:" + "0" * 64).to_json())
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "gpt2", "gpt2"))
    narrow = make_adapter(model, tmp_path / "narrow", target_modules=("c_attn",))
    return {
        "unheard-of": "there is no adapter 'unheard-of'",
        "./nowhere": "there is no folder nowhere",
        str(prompt): "learned vectors before the prompt",
        str(other): "was trained on base sha256:0000",
        str(narrow): "match no linear module of this base",
    }


def test_what_cannot_be_folded_in_is_refused_with_the_reason(
    source: Path, adapter: Path, store: AdapterStore, tmp_path: Path
) -> None:
    for reference, reason in _refusals(tmp_path, adapter).items():
        with pytest.raises(AdapterError) as refusal:
            load_merged(_settings(source, tmp_path, reference, quantization="none"), store)
        assert reason in str(refusal.value), reference
    assert not [path for path in (tmp_path / "merged").glob("*") if path.is_dir()], "nothing half made"


def test_a_folder_of_that_name_is_pointed_to(
    source: Path, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sql").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"say \./sql"):
        load_merged(_settings(source, tmp_path, "sql"), store)


def test_without_room_it_says_how_much_is_needed(
    source: Path, adapter: Path, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(source, tmp_path, adapter, quantization="none")

    def refused() -> str:
        with pytest.raises(OutOfMemoryAtStartError) as refusal:
            load_merged(settings, store)
        return str(refusal.value)

    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "now", lambda: HostMemory(0, MIB))
        assert "of memory while it is folded in, and 0 MiB are free" in refused()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
        assert f"of disk in {tmp_path}" in refused()
    load_merged(settings, store)
    monkeypatch.setattr(host_memory, "now", lambda: HostMemory(MIB // 8, MIB))
    assert "of cpu memory, not quantized, and 0 MiB are free" in refused()


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingsError, match="no 4-bit weights"):
        settings_from(
            {"base": "smollm2", "merged": "sql", "merged_into": "requantized", "quantization": "none"}, {}
        )
    assert settings_from({"base": "smollm2", "merged": "sql"}, {}).base.merged_into == "dequantized"
