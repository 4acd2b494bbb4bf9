"""GGUF files read back by gguf's own reader: what is in them, what is refused. In llama.cpp: tests/e2e."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.base import dequantized_model
from adapters.bundle import Bundle
from adapters.errors import BaseModelError, UnsupportedAdapterError, WrongBaseError
from adapters.fingerprint import fingerprint_of
from tests.adapters.builders import make_adapter
from tests.models import build_tiny_model, rewrite_config
from tests.training.exportable import build_exportable
from training.gguf_lora import export_gguf_lora
from training.gguf_model import export_gguf

QUERY = "model.layers.1.self_attn.q_proj"
Export = Callable[..., gguf.GGUFReader]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_exportable(tmp_path / "model")


@pytest.fixture
def export(tmp_path: Path, base_cache: Path) -> Export:
    def export(folder: Path, **options: Any) -> gguf.GGUFReader:
        export_gguf(str(folder), tmp_path / "out.gguf", cache_dir=base_cache, progress=False, **options)
        return gguf.GGUFReader(tmp_path / "out.gguf")

    return export


@pytest.fixture
def export_lora(tmp_path: Path, base_cache: Path) -> Export:
    def export(adapter: Path, folder: Path, **options: Any) -> gguf.GGUFReader:
        out = tmp_path / "lora.gguf"
        export_gguf_lora(adapter, str(folder), out, cache_dir=base_cache, progress=False, **options)
        return gguf.GGUFReader(out)

    return export


def contents(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def tensors(reader: gguf.GGUFReader) -> dict[str, np.ndarray[Any, Any]]:
    return {each.name: gguf.dequantize(each.data, each.tensor_type) for each in reader.tensors}


def unpermuted(rows: np.ndarray[Any, Any], head_dim: int = 16) -> np.ndarray[Any, Any]:
    """llama.cpp's rows of queries and keys in transformers' order: of each head even ones, then odd."""
    heads = [rows[at : at + head_dim] for at in range(0, len(rows), head_dim)]
    return np.concatenate([half for head in heads for half in (head[::2], head[1::2])])


# Models


def test_every_weight_is_there_and_queries_are_in_llamas_order(folder: Path, export: Export) -> None:
    found = tensors(export(folder, to="f32"))
    stored = load_file(folder / "model.safetensors")
    assert len(found) == len(stored)
    for ours, theirs in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("blk.1.attn_output.weight", "model.layers.1.self_attn.o_proj.weight"),
    ):
        np.testing.assert_array_equal(found[ours], stored[theirs])
    for ours, theirs in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        weight = stored[f"model.layers.1.self_attn.{theirs}.weight"].numpy()
        assert not np.array_equal(found[f"blk.1.{ours}.weight"], weight)
        np.testing.assert_array_equal(unpermuted(found[f"blk.1.{ours}.weight"]), weight)


def test_the_model_is_described(folder: Path, export: Export) -> None:
    reader = export(folder, to="f32")
    wanted = {
        "general.architecture": "llama", "general.type": "model", "general.name": "model",
        "general.file_type": 0, "llama.block_count": 2, "llama.context_length": 512,
        "llama.embedding_length": 64, "llama.feed_forward_length": 128, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16, "llama.vocab_size": 288,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10_000.0,
    }  # fmt: skip
    assert {name: contents(reader, name) for name in wanted} == wanted
    assert contents(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)


def test_the_tokenizer_is_described(folder: Path, export: Export) -> None:
    reader, tokenizer = export(folder), AutoTokenizer.from_pretrained(folder)
    tokens, types = (contents(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    vocabulary = tokenizer.get_vocab()
    assert len(tokens) == len(types) == 288
    assert all(tokens[place] == token for token, place in vocabulary.items())
    assert tokens[287] == "[PAD287]"
    kinds = {
        kind.name: [tokens[at] for at, each in enumerate(types) if each == kind] for kind in gguf.TokenType
    }
    assert set(kinds["CONTROL"]) == {"<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"}
    assert kinds["USER_DEFINED"] == ["<mine>"]
    assert kinds["UNUSED"] == [f"[PAD{place}]" for place in range(len(vocabulary), 288)]
    assert len(contents(reader, "tokenizer.ggml.merges")) == 16
    wanted = {
        "model": "gpt2", "pre": "gpt-2", "bos_token_id": vocabulary["<s>"],
        "eos_token_id": vocabulary["</s>"], "padding_token_id": vocabulary["<pad>"],
        "add_bos_token": False, "add_eos_token": False,
    }  # fmt: skip
    assert {name: contents(reader, f"tokenizer.ggml.{name}") for name in wanted} == wanted
    assert contents(reader, "tokenizer.chat_template") == tokenizer.chat_template


@pytest.mark.parametrize(
    ("to", "kind", "error"),
    [("f16", "F16", 1e-3), ("bf16", "BF16", 4e-3), ("q8_0", "Q8_0", 6e-3)],
)
def test_matrices_are_rounded_and_vectors_are_not(
    to: str, kind: str, error: float, folder: Path, export: Export
) -> None:
    reader = export(folder, to=to)
    stored = load_file(folder / "model.safetensors")
    types = {each.name: each.tensor_type.name for each in reader.tensors}
    assert {types[name] for name in types if "norm" not in name} == {kind}
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    found = tensors(reader)
    weight = stored["model.layers.0.mlp.down_proj.weight"].numpy()
    assert 0 < np.abs(found["blk.0.ffn_down.weight"] - weight).max() < error * np.abs(weight).max()
    np.testing.assert_array_equal(found["output_norm.weight"], stored["model.norm.weight"])


def test_rows_that_are_no_whole_blocks_are_f16(tmp_path: Path, folder: Path, export: Export) -> None:
    rewrite_config(folder, intermediate_size=72)
    config = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, ignore_mismatched_sizes=True)
    config.save_pretrained(folder)
    types = {each.name: each.tensor_type.name for each in export(folder, to="q8_0").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_head_that_is_the_embedding_is_not_written_twice(
    tmp_path: Path, folder: Path, export: Export
) -> None:
    rewrite_config(folder, tie_word_embeddings=True)
    found = tensors(export(folder))
    assert "output.weight" not in found
    assert "token_embd.weight" in found


@pytest.mark.parametrize("architecture", ["olmo2", "gemma2", "gpt_neox"])
def test_other_architectures_are_refused(architecture: Any, tmp_path: Path, export: Export) -> None:
    folder = build_tiny_model(tmp_path / "other", architecture)
    with pytest.raises(
        BaseModelError, match=r"LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM are"
    ):
        export(folder)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "type 'linear'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    changes: dict[str, Any], said: str, folder: Path, export: Export
) -> None:
    rewrite_config(folder, **changes)
    with pytest.raises(BaseModelError, match=re.escape(said)):
        export(folder)


def test_a_sliding_window_is_refused(tmp_path: Path, export: Export) -> None:
    with pytest.raises(BaseModelError, match="sliding window"):
        export(build_tiny_model(tmp_path / "window", "mistral"))


CUT = pre_tokenizers.Split(Regex(r"\d|\w+"), "isolated")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda backend: setattr(backend, "pre_tokenizer", CUT), "none of gpt-2, smollm, llama-bpe, qwen2"),
        (lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()), "normalizer"),
        (lambda backend: setattr(backend.model, "ignore_merges", True), "ignore_merges true"),
        (lambda backend: setattr(backend.model, "byte_fallback", True), "byte_fallback"),
    ],
)
def test_text_that_would_be_cut_otherwise_is_refused(
    change: Callable[[Tokenizer], None], said: str, folder: Path, tmp_path: Path, export: Export
) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(backend)
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(BaseModelError, match=said):
        export(folder)
    assert not (tmp_path / "out.gguf").exists()


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path, export: Export) -> None:
    with pytest.raises(BaseModelError, match="has no merges"):
        export(build_tiny_model(tmp_path / "bytes"))


@pytest.mark.parametrize(("value", "to"), [(float("nan"), "f32"), (1e5, "f16")])
def test_what_does_not_fit_the_type_leaves_nothing(
    value: float, to: str, folder: Path, tmp_path: Path, export: Export
) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"blk\.1\.ffn_up\.weight has values"):
        export(folder, to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing_and_is_said_so(
    folder: Path, tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, *_: object, **__: object) -> None:
        raise OSError("128 requested and 0 written")  # as numpy says it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match=r"out.gguf cannot be written .* is the disk full\?"):
        export(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_file_is_not_touched(folder: Path, tmp_path: Path, export: Export) -> None:
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another --out"):
        export(folder)
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_the_weights_that_nf4_stands_for(folder: Path, export: Export, base_cache: Path) -> None:
    found = tensors(export(folder, to="f32", quantization="nf4"))
    stored = dequantized_model(str(folder), cache_dir=base_cache, progress=False).state_dict()
    assert len(found) == len(stored)
    for ours, theirs in (("blk.0.ffn_down", "mlp.down_proj"), ("blk.0.attn_v", "self_attn.v_proj")):
        weight = stored[f"model.layers.0.{theirs}.weight"]
        np.testing.assert_array_equal(found[f"{ours}.weight"], weight)
        assert len(np.unique(np.abs(weight[0]))) <= 16 * 2, "of 64 and 128 values in a row"


# Adapters


def test_an_adapters_update_is_the_same(folder: Path, tmp_path: Path, export_lora: Export) -> None:
    """With scalings of three kinds, in one file with one alpha; queries' rows in llama.cpp's order."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = make_adapter(
        model, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=6,
        use_rslora=True, rank_pattern={"q_proj": 7}, alpha_pattern={"layers.1.*.v_proj": 30},
    )  # fmt: skip
    reader = export_lora(adapter, folder)
    wanted = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }  # fmt: skip
    assert {name: contents(reader, name) for name in wanted} == wanted
    found, stored = tensors(reader), load_file(adapter / "adapter_model.safetensors")
    assert len(found) == len(stored) == 12
    for name, module, alpha, rank in (
        ("blk.1.attn_q", QUERY, 6, 7),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj", 6, 4),
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj", 30, 4),
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj", 6, 4),
    ):
        a_RD, b_OR = (stored[f"base_model.model.{module}.lora_{each}.weight"].numpy() for each in "AB")
        ours = found[f"{name}.weight.lora_b"] @ found[f"{name}.weight.lora_a"] * (6.0 / rank)
        ours = unpermuted(ours) if "attn_q" in name else ours
        np.testing.assert_allclose(ours, b_OR @ a_RD * (alpha / rank**0.5), rtol=1e-4, atol=1e-5)


def test_a_plain_adapters_factors_are_as_stored(folder: Path, tmp_path: Path, export_lora: Export) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["up_proj"], lora_alpha=12)
    found, stored = tensors(export_lora(adapter, folder)), load_file(adapter / "adapter_model.safetensors")
    for factor in "AB":
        weight = stored[f"base_model.model.model.layers.0.mlp.up_proj.lora_{factor}.weight"]
        np.testing.assert_array_equal(found[f"blk.0.ffn_up.weight.lora_{factor.lower()}"], weight)


def test_adapters_that_llama_cpp_cannot_apply_are_refused(
    folder: Path, tmp_path: Path, export_lora: Export
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = make_adapter(model, tmp_path / "dora", use_dora=True)
    with pytest.raises(UnsupportedAdapterError, match=r"of kind dora.*quickchange merge"):
        export_lora(adapter, folder)
    adapter = make_adapter(model, tmp_path / "plain")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for changes in ({"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UnsupportedAdapterError, match=next(iter(changes))):
            export_lora(adapter, folder)
    rewrite_config(folder, tie_word_embeddings=True)
    with pytest.raises(UnsupportedAdapterError, match="lm_head, which is the embedding"):
        export_lora(make_adapter(model, tmp_path / "head", target_modules=["lm_head"]), folder)
    assert not (tmp_path / "lora.gguf").exists()


def test_an_adapter_knows_its_base(
    folder: Path, tmp_path: Path, export_lora: Export, base_cache: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = make_adapter(model, tmp_path / "adapter")
    for scheme in ("nf4-64-double", "none", "fp4-64"):
        fingerprint = fingerprint_of(folder, scheme, base_cache)
        (adapter / "quickchange.json").write_text(Bundle(fingerprint).to_json())
        out = tmp_path / f"{scheme}.gguf"
        report = export_gguf_lora(adapter, str(folder), out, cache_dir=base_cache, progress=False)
        assert report.trained_on == scheme
        assert report.modules == 6
    other = shutil.copytree(folder, tmp_path / "other")
    rewrite_config(other, rms_norm_eps=0.5)
    with pytest.raises(WrongBaseError, match="in no quantisation"):
        export_lora(adapter, other)
