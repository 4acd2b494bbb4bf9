"""Which architectures are served, decided by what they are; every refusal says why."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from adapters.errors import BaseNotFoundError, UnsupportedBaseError
from adapters.support import supported_config
from tests.models import ARCHITECTURES, FAMILIES, Architecture, build_tiny_model, rewrite_config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoders_are_served(architecture: Architecture, tmp_path: Path) -> None:
    config = supported_config(build_tiny_model(tmp_path, architecture))
    assert config.model_type == FAMILIES[architecture].model_type


@pytest.mark.parametrize(
    "model_type", ["cohere2", "exaone4", "glm4", "ministral3", "olmo3", "opt", "phi", "starcoder2"]
)
def test_more_decoders_are_served(model_type: str, tmp_path: Path) -> None:
    assert supported_config(_config(tmp_path, model_type)).model_type == model_type


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("mamba", "neither to the whole past nor to a sliding window .linear_attention"),
        ("jamba", "neither to the whole past nor to a sliding window .linear_attention"),
        ("qwen3_next", "neither to the whole past nor to a sliding window .linear_attention"),
        ("llama4_text", "neither to the whole past nor to a sliding window .chunked_attention"),
        ("rwkv", "recurrent state"),
        ("bloom", "AttentionInterface"),
        ("mpt", "AttentionInterface"),
        ("falcon", "AttentionInterface"),
        ("bert", "looks ahead"),
        ("mixtral", "experts.gate_up_proj is a fused.*give a dense model"),
        ("qwen3_moe", "experts.gate_up_proj is a fused.*give a dense model"),
        ("gpt_oss", "experts.gate_up_proj is a fused.*give a dense model"),
        ("gemma3", "multimodal; give the text model alone"),
        ("llama4", "multimodal; give the text model alone"),
        ("vit", "no causal language model"),
    ],
)
def test_others_are_refused_with_the_reason(model_type: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBaseError, match=rf"{reason}.*docs/guides/models\.md"):
        supported_config(_config(tmp_path, model_type))


@pytest.mark.parametrize(
    ("architecture", "change"),
    [("gemma3_text", {"use_bidirectional_attention": True}), ("llama", {"is_causal": False})],
)
def test_a_decoder_that_was_made_an_encoder_is_refused(
    architecture: Architecture, change: dict[str, Any], tmp_path: Path
) -> None:
    folder = build_tiny_model(tmp_path, architecture)
    rewrite_config(folder, **change)
    with pytest.raises(UnsupportedBaseError, match="looks ahead"):
        supported_config(folder)


def test_a_configuration_that_makes_no_model_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path)
    rewrite_config(folder, hidden_act="no-such-function")
    with pytest.raises(
        UnsupportedBaseError, match=r"no model can be made of its configuration.*no-such-function"
    ):
        supported_config(folder)


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_scaled_positions_are_served(rope_type: str, tmp_path: Path) -> None:
    folder = _with_rope(tmp_path, rope_type)
    assert supported_config(folder).rope_parameters["rope_type"] == rope_type


def test_positions_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBaseError, match="longest sequence of a batch; give its variant for short"):
        supported_config(_with_rope(tmp_path, "dynamic"))


def test_phi3_for_long_contexts_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path, "phi3")
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **factors}
    rewrite_config(folder, rope_parameters=rope, original_max_position_embeddings=128)
    with pytest.raises(UnsupportedBaseError, match=r"longrope.*longest sequence of a batch"):
        supported_config(folder)


def test_models_that_bring_code_are_refused_and_the_code_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    (tmp_path / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
    brought = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "brand-new", "auto_map": brought}))
    with pytest.raises(UnsupportedBaseError, match="code from a model folder is never run"):
        supported_config(tmp_path)
    assert not canary.exists()


def test_code_beside_a_known_architecture_is_not_run(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path)
    canary = tmp_path / "ran"
    (folder / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
    rewrite_config(folder, auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"})
    assert supported_config(folder).model_type == "llama"
    assert not canary.exists()


def test_a_quantised_source_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path)
    rewrite_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedBaseError, match=r"already quantised \(gptq\).*16-bit"):
        supported_config(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '"llama"'])
def test_a_broken_configuration_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseNotFoundError, match=r"config\.json"):
        supported_config(tmp_path)


def _config(folder: Path, model_type: str) -> Path:
    """A configuration alone; its model never gets weights."""
    small: dict[str, Any] = {"num_hidden_layers": 2}
    if model_type == "gemma3":
        small = {}
    AutoConfig.for_model(model_type, **small).save_pretrained(folder)
    return folder


def _with_rope(folder: Path, rope_type: str) -> Path:
    build_tiny_model(folder)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rewrite_config(
        folder, rope_parameters={"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4} | llama3
    )
    return folder
