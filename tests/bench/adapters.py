"""Random LoRA adapters, written as PEFT writes them: of a given rank on every linear layer, or very small."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapters.layout import BaseLayout


def write_random_adapter(folder: Path, layout: BaseLayout, *, rank: int, seed: int) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors; returns the folder."""
    modules = [name for name in layout.modules if name != layout.head]
    return _write(folder, layout, modules, "all-linear", rank, seed)


def write_small_adapter(folder: Path, layout: BaseLayout, *, seed: int) -> Path:
    """The same with rank 1 on a single layer: a few kilobytes, for having very many."""
    module = next(name for name in layout.modules if name != layout.head)
    return _write(folder, layout, [module], [module], 1, seed)


def _write(
    folder: Path, layout: BaseLayout, modules: Sequence[str], targets: str | list[str], rank: int, seed: int
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        shape, prefix = layout.modules[name], f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = _random(rank, shape.in_features, generator)
        tensors[f"{prefix}.lora_B.weight"] = _random(shape.out_features, rank, generator)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "bias": "none",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _random(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    scale: float = columns**-0.5 * 0.2
    return torch.randn(rows, columns, generator=generator) * scale
