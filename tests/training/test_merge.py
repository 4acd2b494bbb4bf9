"""Merging: equal to PEFT's own on float32, true to the live adapter on disk, and never half done."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.base import dequantized_model, load_base
from adapters.bundle import Bundle
from adapters.errors import InvalidAdapterError, WrongBaseError
from tests.adapters.bases import distance, logits, save_gpt2, save_tied_llama
from tests.adapters.builders import make_adapter
from tests.models import build_tiny_model
from training.merge import MERGE_FILE, merge_adapter

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.*.v_proj": 30}},
    "some layers": {"layers_to_transform": [1]},
    "bfloat16": {"dtype": torch.bfloat16},
}
ROUNDING = 0.025  # relative error of logits when weights are rounded to bfloat16 once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("merge") / "tiny")


@pytest.fixture
def plain(folder: Path, base_cache: Path) -> Any:
    return dequantized_model(str(folder), cache_dir=base_cache, progress=False)


@pytest.fixture
def merge(base_cache: Path) -> Any:
    def merge(source: Path, adapter: Path, out: Path, **options: Any) -> Any:
        merge_adapter(str(source), adapter, out, cache_dir=base_cache, progress=False, **options)
        return AutoModelForCausalLM.from_pretrained(out, dtype="auto")

    return merge


@pytest.mark.parametrize("kind", KINDS)
def test_float32_merge_is_pefts_own(kind: str, folder: Path, plain: Any, tmp_path: Path, merge: Any) -> None:
    adapter = make_adapter(plain, tmp_path / "adapter", **KINDS[kind])
    merged = merge(folder, adapter, tmp_path / "out", dtype="float32")
    base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    oracle = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    found = merged.state_dict()
    assert found.keys() == oracle.keys()
    for name, tensor in oracle.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(found[name], base[name]) for name in found)


def test_merged_model_is_the_live_adapter(folder: Path, plain: Any, tmp_path: Path, merge: Any) -> None:
    """Reloaded in a fresh process; the bare base, which it must not be, lies ten times farther away."""
    adapter = make_adapter(plain, tmp_path / "adapter", strength=0.3)
    base = logits(plain)
    live = logits(PeftModel.from_pretrained(plain, adapter).eval())
    assert distance(base, live) > 10 * ROUNDING
    merge(folder, adapter, tmp_path / "out")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "from tests.adapters.bases import logits\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n"
        "assert model.dtype == torch.bfloat16\n"
        "torch.save(logits(model.float()), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "logits")], check=True)
    assert distance(torch.load(tmp_path / "logits"), live) < ROUNDING


def test_merging_leaves_the_serving_base_alone(
    folder: Path, plain: Any, tmp_path: Path, merge: Any, base_cache: Path
) -> None:
    served = load_base(str(folder), cache_dir=base_cache, device="cpu", progress=False).model
    before = logits(served)
    merge(folder, make_adapter(plain, tmp_path / "adapter"), tmp_path / "out")
    assert torch.equal(logits(served), before)


def test_gpt2_keeps_its_transposed_layers(tmp_path: Path, merge: Any, base_cache: Path) -> None:
    folder = save_gpt2(tmp_path / "gpt2")
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    adapter = make_adapter(plain, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], strength=0.2)
    base = logits(plain)
    live = logits(PeftModel.from_pretrained(plain, adapter).eval())
    rewrite_adapter(adapter, fan_in_fan_out=False)  # what PEFT writes of a base that this project loaded
    merged = merge(folder, adapter, tmp_path / "out", dtype="float32")
    assert distance(base, live) > 0.05
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_tied_head_leaves_the_embedding(tmp_path: Path, merge: Any, base_cache: Path) -> None:
    folder = save_tied_llama(tmp_path / "tied")
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    adapter = make_adapter(plain, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    embedding, base = plain.get_input_embeddings().weight.clone(), logits(plain)
    live = logits(PeftModel.from_pretrained(plain, adapter).eval())
    merged = merge(folder, adapter, tmp_path / "out", dtype="float32")
    assert distance(base, live) > 0.05
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-4)


def test_an_unquantised_base(folder: Path, tmp_path: Path, merge: Any) -> None:
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = make_adapter(original, tmp_path / "adapter")
    merged = merge(folder, adapter, tmp_path / "out", quantization="none", dtype="float32")
    live = logits(PeftModel.from_pretrained(original, adapter).eval())
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-4)


def test_the_folder_is_complete_and_says_what_it_is_made_of(
    folder: Path, plain: Any, tmp_path: Path, merge: Any, base_cache: Path
) -> None:
    adapter = make_adapter(plain, tmp_path / "adapter")
    fingerprint = load_base(str(folder), cache_dir=base_cache, device="cpu", progress=False).fingerprint
    (adapter / "quickchange.json").write_text(Bundle(fingerprint, chat_template="{{ messages }}").to_json())
    merge(folder, adapter, tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    facts = json.loads((out / MERGE_FILE).read_text())
    assert facts["base_fingerprint"] == fingerprint
    assert facts["base"] == "tiny"
    assert facts["adapter_digest"].startswith("sha256:")
    assert facts["dtype"] == "bfloat16"
    assert facts["modules"] == 6
    assert facts["delta_norm"] > 0
    assert set(facts["versions"]) == {"quickchange", "torch", "transformers", "peft", "bitsandbytes"}
    assert str(tmp_path) not in "".join(path.read_text() for path in out.glob("*.json"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.encode("abc") == AutoTokenizer.from_pretrained(folder).encode("abc")
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_the_generation_configuration_is_the_sources_own(
    tmp_path: Path, merge: Any, base_cache: Path
) -> None:
    folder = build_tiny_model(tmp_path / "model")
    inconsistent = {"eos_token_id": [5, 9], "temperature": 0.3, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(inconsistent))
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    merge(folder, make_adapter(plain, tmp_path / "adapter"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == inconsistent


def test_an_adapter_of_another_base_is_refused(folder: Path, plain: Any, tmp_path: Path, merge: Any) -> None:
    adapter = make_adapter(plain, tmp_path / "adapter")
    (adapter / "quickchange.json").write_text(Bundle("sha256:" + "0" * 64).to_json())
    with pytest.raises(WrongBaseError, match="give the base and quantisation"):
        merge(folder, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_touched(folder: Path, tmp_path: Path, merge: Any) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="choose another"):
        merge(folder, tmp_path / "no-adapter", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bad_adapter_leaves_nothing(folder: Path, plain: Any, tmp_path: Path, merge: Any) -> None:
    adapter = make_adapter(plain, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapterError, match="NaN"):
        merge(folder, adapter, tmp_path / "results" / "out")
    assert not (tmp_path / "results").exists()


def test_a_failure_while_saving_leaves_nothing(
    folder: Path, plain: Any, tmp_path: Path, merge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(plain, tmp_path / "adapter")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(plain), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        merge(folder, adapter, tmp_path / "results" / "out")
    assert list((tmp_path / "results").iterdir()) == []


def rewrite_adapter(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
