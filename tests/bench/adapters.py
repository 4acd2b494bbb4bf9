"""Random LoRA adapters of a given rank on every linear layer, written as PEFT writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapters.layout import BaseLayout


def write_random_adapter(folder: Path, layout: BaseLayout, *, rank: int, seed: int) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors; returns the folder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layout.modules.items():
        if name == layout.head:
            continue
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = _random(rank, shape.in_features, generator)
        tensors[f"{prefix}.lora_B.weight"] = _random(shape.out_features, rank, generator)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
        "bias": "none",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _random(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator) * columns**-0.5 * 0.2
