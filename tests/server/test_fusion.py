"""Which architectures run as fused native layers, that those compute the same, and that others still run."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from adapters.base import load_base
from server.batch import Batch, Row
from server.request import Request, SamplingParams
from server.runner import ModelRunner
from server.sequence import Sequence
from tests.adapters.bases import save_model
from tests.kernels.conditions import needs_native

pytestmark = needs_native

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FUSED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "phi3": {},
    "olmo2": {},  # norms after attention and activation; one norm for the queries of all heads
    "granite": {"residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 0]},
}
UNFUSED: dict[str, dict[str, Any]] = {
    "glm": {"head_dim": 16},  # rotates neighbours instead of halves
    "gpt_neox": {},
    "ministral3": {  # scales queries by their position, from the original length on
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "starcoder2": {},
    "cohere": {},
}


def run_of(folder: Path, kernels: Any, fused: bool, block_count: int = 32) -> tuple[Tensor, int]:
    """Logits of a prompt in two chunks and of one decoded token, and how many layers were fused."""
    base = load_base(
        str(folder), quantization="none", dtype="float32", device="cpu", kernels=kernels, progress=False
    )
    runner = ModelRunner(base, fuse_layers=fused)
    runner.allocate_cache(block_count, 4)
    sequence = Sequence(Request("x", tuple(range(3, 33)), SamplingParams()), 40, 0.0)
    sequence.blocks = list(range(block_count - 1, block_count - 11, -1))
    runner.run(Batch((Row(sequence, 0, 10),)))
    prompt = runner.run(Batch((Row(sequence, 10, 20),)))
    sequence.take(5)
    return torch.cat((prompt, runner.run(Batch((Row(sequence, 30, 1),))))), runner.fused_layers


@pytest.mark.parametrize("model_type", [*FUSED, *UNFUSED])
def test_native_layers_compute_what_transformers_computes(model_type: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / model_type, model_type, **SIZES, **(FUSED | UNFUSED)[model_type])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([[*range(3, 33), 5]])).logits[0, 29:]
    for kernels, fused in (("torch", False), ("native", False), ("native", True)):
        found, count = run_of(folder, kernels, fused)
        assert count == (2 if fused and model_type in FUSED else 0)
        assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_a_layer_that_differs_is_not_fused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has the modules of a Llama layer and a forward of its own."""
    caplog.set_level(logging.INFO, logger="server.fusion")
    folder = save_model(tmp_path / "llama", "llama", **SIZES)
    base = load_base(str(folder), quantization="none", dtype="float32", device="cpu", progress=False)
    layer = base.model.model.layers[1]
    plain = layer.forward
    layer.forward = lambda *args, **keywords: plain(*args, **keywords) * 1.001
    runner = ModelRunner(base)
    runner.allocate_cache(4, 4)
    assert runner.fused_layers == 0
    assert "fused they differ by" in caplog.text
    assert isinstance(base.model.model.layers, nn.ModuleList)
    assert base.model.model.layers[1] is layer


def test_the_pass_around_the_layers_is_direct_where_the_parts_are_all_there_is(tmp_path: Path) -> None:
    """Gemma 3 chooses between two rotary tables by layer, which only its own code knows."""
    for model_type, settings in FUSED.items():
        folder = save_model(tmp_path / model_type, model_type, **SIZES, **settings)
        base = load_base(str(folder), quantization="none", dtype="float32", device="cpu", progress=False)
        runner = ModelRunner(base)
        runner.allocate_cache(4, 4)
        assert (runner.direct is not None) == (model_type != "gemma3_text"), model_type


@pytest.mark.parametrize("method", ["embed_tokens", "norm"])
def test_a_model_that_does_more_than_its_parts_keeps_its_own_pass(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its forward changes what a part gives, as models with multipliers of their own do."""
    caplog.set_level(logging.INFO, logger="server.direct")
    folder = save_model(tmp_path / "llama", "llama", **SIZES)
    base = load_base(str(folder), quantization="none", dtype="float32", device="cpu", progress=False)
    backbone = base.model.model
    plain, part = backbone.forward, getattr(backbone, method).forward

    def forward(*args: Any, **keywords: Any) -> Any:
        getattr(backbone, method).forward = lambda x: part(x) * 1.01
        try:
            return plain(*args, **keywords)
        finally:
            getattr(backbone, method).forward = part

    backbone.forward = forward
    runner = ModelRunner(base)
    runner.allocate_cache(4, 4)
    assert runner.fused_layers == 2
    assert runner.direct is None
    assert "does more than its parts" in caplog.text


@pytest.mark.parametrize("table_bytes", [0, 2**20])
def test_rotary_angles_come_from_a_table_or_are_computed(
    table_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.direct._TABLE_BYTES", table_bytes)
    test_native_layers_compute_what_transformers_computes("llama", tmp_path)


def test_one_block_is_enough_to_try_out_the_layers(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", "llama", **SIZES)
    base = load_base(str(folder), quantization="none", dtype="float32", device="cpu", progress=False)
    runner = ModelRunner(base)
    runner.allocate_cache(1, 2)
    assert runner.fused_layers == 2
