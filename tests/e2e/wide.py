"""A base wide enough for adapters of any size, quickly made. No test lives here."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import build_tiny_model, rewrite_config

HIDDEN, INTERMEDIATE, LAYERS = 512, 2048, 2
SHAPES = {  # out × in of each module of a layer
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
BYTES_PER_RANK = 4 * LAYERS * sum(out + into for out, into in SHAPES.values())


def build_wide_model(folder: Path) -> Path:
    """The tiny model's tokenizer and family, with layers as wide as a small real model's."""
    build_tiny_model(folder)
    rewrite_config(
        folder,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=HIDDEN // 8,
    )
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def write_wide_adapter(folder: Path, size_bytes: int, seed: int = 0) -> Path:
    """A valid adapter of about that size; its rank follows from it."""
    rank = size_bytes // BYTES_PER_RANK
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, (out_features, in_features) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            for name, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
                tensors[f"{prefix}.{name}.weight"] = torch.randn(shape, generator=generator) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [module.split(".")[1] for module in SHAPES]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
