"""GGUF files in llama.cpp itself: it must find the tokens and logits that transformers and PEFT find.

Skipped without llama-cpp-cffi, which is no dependency: docs/guides/export.md says how to have it.
"""

import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.sources import local_source
from tests.adapters.bases import distance
from tests.adapters.builders import make_adapter
from tests.e2e import cyllama_program, llama_program
from tests.training.exportable import RULES, TEXTS, build_exportable
from training.gguf_lora import export_gguf_lora
from training.gguf_model import export_gguf
from training.merge import merge_adapter

PROMPTS = TEXTS[:4]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, rotary positions stretched": {"rope_parameters": LLAMA3},
    "llama, head of its own width": {"head_dim": 32},
    "mistral": {"architecture": "mistral"},
    "qwen2, with biases": {"architecture": "qwen2"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ("q_proj", "k_proj", "down_proj")},
    "rslora on all": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": "all-linear", "lora_alpha": 5,
        "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.*.v_proj": 30},
    },
    "the head": {"target_modules": ("lm_head", "v_proj")},
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    tokens: list[list[int]]
    ends: list[int]
    logits: list[Tensor]


Asked = Callable[..., Answer]


@pytest.fixture
def llama(tmp_path: Path) -> Asked:
    """Asks llama.cpp for tokens of texts, and for the logits at every one of some tokens."""
    if llama_program.find_module() is None:
        pytest.skip(f"llama-cpp-cffi is neither importable nor in ${llama_program.FOLDER_VARIABLE}")
    return asking(llama_program.__name__, tmp_path)


@pytest.fixture
def newer_llama(tmp_path: Path) -> Asked:
    """Asks a newer llama.cpp for tokens of texts, and for the logits at the last of some tokens."""
    if not cyllama_program.is_there():
        pytest.skip(f"cyllama is neither importable nor in ${cyllama_program.FOLDER_VARIABLE}")
    return asking(cyllama_program.__name__, tmp_path)


def asking(program: str, tmp_path: Path) -> Asked:
    def ask(
        model: Path, ids: Sequence[list[int]] = (), *, lora: Path | None = None,
        texts: Sequence[str] = (), candidates: Sequence[int] = (),
    ) -> Answer:  # fmt: skip
        command = [sys.executable, "-m", program, str(model), str(tmp_path / "answer.npz")]
        command += [] if lora is None else ["--lora", str(lora)]
        asked = json.dumps({"ids": list(ids), "texts": list(texts), "candidates": list(candidates)})
        done = subprocess.run(command, input=asked, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "answer.npz") as answer:
            logits = [torch.from_numpy(answer[f"logits{place}"]) for place in range(len(ids))]
            return Answer(**json.loads(str(answer["told"])), logits=logits)

    return ask


@torch.no_grad()
def expected(model: Any, ids: Sequence[list[int]]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([each])).logits[0] for each in ids]


def encoded(folder: Path, texts: Sequence[str] = PROMPTS) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(text) for text in texts]


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    """Relative error; and of float32 weights the likeliest token at every position."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert distance(ours, theirs) < tolerance
        if tolerance <= 1e-4:
            assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def rebuilt(folder: Path, **config: Any) -> Path:
    """A model whose configuration changed shapes: its weights are made anew, biases included."""
    torch.manual_seed(0)
    from transformers import AutoConfig

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_has_transformers_logits(kind: str, tmp_path: Path, base_cache: Path, llama: Asked) -> None:
    folder = build_exportable(tmp_path / "model", MODELS[kind].get("architecture", "llama"))
    rebuilt(folder, **{name: value for name, value in MODELS[kind].items() if name != "architecture"})
    export_gguf(str(folder), tmp_path / "m.gguf", to="f32", cache_dir=base_cache, progress=False)
    ids = encoded(folder)
    wanted = expected(plain(folder), ids)
    assert_same(llama(tmp_path / "m.gguf", ids).logits, wanted)


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_a_llama_with_less_or_more_than_usual(
    changes: dict[str, bool], tmp_path: Path, base_cache: Path, llama: Asked
) -> None:
    folder = rebuilt(build_exportable(tmp_path / "model"), **changes)
    export_gguf(str(folder), tmp_path / "m.gguf", to="f32", cache_dir=base_cache, progress=False)
    ids = encoded(folder)
    assert_same(llama(tmp_path / "m.gguf", ids).logits, expected(plain(folder), ids))


@pytest.mark.parametrize(("to", "tolerance"), [("f16", 0.003), ("bf16", 0.02), ("q8_0", 0.1)])
def test_smaller_types_round(
    to: Any, tolerance: float, tmp_path: Path, base_cache: Path, llama: Asked
) -> None:
    """llama.cpp rounds activations to the type of the weights; rows in a wrong order are off by 1."""
    folder = build_exportable(tmp_path / "model")
    export_gguf(str(folder), tmp_path / "m.gguf", to=to, cache_dir=base_cache, progress=False)
    ids = encoded(folder)
    assert_same(llama(tmp_path / "m.gguf", ids).logits, expected(plain(folder), ids), tolerance)


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_texts_become_the_same_tokens(
    rule: str, with_bos: bool, tmp_path: Path, base_cache: Path, llama: Asked
) -> None:
    folder = build_exportable(tmp_path / "model", rule=rule, with_bos=with_bos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    export_gguf(str(folder), tmp_path / "m.gguf", cache_dir=base_cache, progress=False)
    texts = [*TEXTS, *random_texts(200)]
    found = llama(tmp_path / "m.gguf", texts=texts, candidates=range(len(tokenizer)))
    for text, tokens in zip(texts, found.tokens, strict=True):
        assert tokens == tokenizer.encode(text), text
    assert found.ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]


def random_texts(count: int) -> list[str]:
    """Of pieces that rules treat in different ways, in every order."""
    draw = random.Random(0)
    pieces = [
        *"aZ09'.,!?-_(\n\t \r",
        "  ",
        "it's",
        "'LL",
        "12345",
        "é",
        "e\u0301",
        "日本",
        "😀",
        "½",
        "<|user|>",
    ]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_has_pefts_logits(
    kind: str, architecture: Any, tmp_path: Path, base_cache: Path, llama: Asked
) -> None:
    folder = build_exportable(tmp_path / "model", architecture)
    model = plain(folder)
    adapter = make_adapter(model, tmp_path / "adapter", strength=0.3, **ADAPTERS[kind])
    where = {"cache_dir": base_cache, "progress": False}
    export_gguf(str(folder), tmp_path / "m.gguf", to="f32", **where)
    export_gguf_lora(adapter, str(folder), tmp_path / "a.gguf", **where)
    ids = encoded(folder)
    bare = expected(model, ids)
    live = expected(PeftModel.from_pretrained(model, adapter).eval(), ids)
    assert distance(bare[0], live[0]) > 0.05, "the adapter does something"
    assert_same(llama(tmp_path / "m.gguf", ids).logits, bare)
    assert_same(llama(tmp_path / "m.gguf", ids, lora=tmp_path / "a.gguf").logits, live)


@pytest.mark.parametrize(
    ("architecture", "rule"),
    [("llama", "smollm"), ("mistral", "llama-bpe"), ("qwen2", "qwen2"), ("qwen3", "qwen2")],
)
def test_a_newer_llama_cpp_agrees(
    architecture: Any, rule: str, tmp_path: Path, base_cache: Path, newer_llama: Asked
) -> None:
    folder = build_exportable(tmp_path / "model", architecture, rule)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    export_gguf(str(folder), tmp_path / "m.gguf", to="f32", cache_dir=base_cache, progress=False)
    ids, texts = (
        encoded(folder),
        [unicodedata.normalize("NFC", text) for text in (*TEXTS, *random_texts(200))],
    )
    found = newer_llama(tmp_path / "m.gguf", ids, texts=texts)
    assert found.tokens == [tokenizer.encode(text) for text in texts]
    assert_same(found.logits, [each[-1:] for each in expected(plain(folder), ids)])


def test_a_merged_model_is_the_live_adapter(tmp_path: Path, base_cache: Path, llama: Asked) -> None:
    folder = build_exportable(tmp_path / "model")
    model = plain(folder)
    adapter = make_adapter(model, tmp_path / "adapter", target_modules="all-linear")
    where = {"cache_dir": base_cache, "progress": False}
    merge_adapter(str(folder), adapter, tmp_path / "merged", quantization="none", dtype="float32", **where)
    export_gguf(str(tmp_path / "merged"), tmp_path / "m.gguf", to="f32", **where)
    ids = encoded(folder)
    live = expected(PeftModel.from_pretrained(model, adapter).eval(), ids)
    assert_same(llama(tmp_path / "m.gguf", ids).logits, live)


@pytest.mark.slow
def test_smollm2_with_and_without_an_adapter(tmp_path: Path, smollm2_cache: Path, llama: Asked) -> None:
    folder = local_source("smollm2", smollm2_cache).folder
    model = plain(folder)
    adapter = make_adapter(
        model, tmp_path / "adapter", target_modules="all-linear", strength=0.1, use_rslora=True
    )
    where = {"cache_dir": smollm2_cache, "progress": False}
    export_gguf("smollm2", tmp_path / "m.gguf", to="f32", **where)
    export_gguf_lora(adapter, "smollm2", tmp_path / "a.gguf", **where)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2+2?"}], tokenize=False)
    texts = [*TEXTS, chat, *random_texts(500)]
    ids = [tokenizer.encode(text) for text in [*PROMPTS, chat]]
    bare = expected(model, ids)
    live = expected(PeftModel.from_pretrained(model, adapter).eval(), ids)
    assert distance(bare[0], live[0]) > 0.05, "the adapter does something"
    found = llama(tmp_path / "m.gguf", ids, texts=texts, candidates=range(len(tokenizer)))
    assert found.tokens == [tokenizer.encode(text) for text in texts]
    assert_same(found.logits, bare)
    assert_same(llama(tmp_path / "m.gguf", ids, lora=tmp_path / "a.gguf").logits, live)
    assert found.ends == [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
