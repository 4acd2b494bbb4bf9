"""Real PEFT adapters for tiny models, and what a float model offers them."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters.layout import BaseLayout, ModuleShape
from adapters.store import AdapterStore
from adapters.validate import validate_adapter
from quickchange.upload import REQUIRED_FILES
from tests.models import Architecture, build_tiny_model

FINGERPRINT = "sha256:" + "ba5e" * 16


def tiny_model(folder: Path, architecture: Architecture = "llama", seed: int = 0) -> PreTrainedModel:
    """A float32 model of two layers, loaded from `folder`, where it was written with its tokenizer."""
    build_tiny_model(folder, architecture, seed)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def layout_of(model: PreTrainedModel, fingerprint: str = FINGERPRINT) -> BaseLayout:
    """Every linear module of a model whose layers are plain nn.Linear."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    return BaseLayout(
        modules={
            name: ModuleShape(linear.in_features, linear.out_features) for name, linear in linears.items()
        },
        head=next((name for name, module in linears.items() if module is head), None),
        fingerprint=fingerprint,
    )


def make_adapter(
    model: PreTrainedModel,
    out_dir: Path,
    *,
    r: int = 4,
    seed: int = 0,
    target_modules: Sequence[str] | str = ("q_proj", "v_proj", "down_proj"),
    strength: float = 0.5,
    dtype: torch.dtype = torch.float32,
    **lora_config: Any,
) -> Path:
    """Saves a random adapter as PEFT does; the model itself is left alone.

    Args:
        strength: norm of each module's update relative to its weight; at 0.5 greedy tokens change at once.
        dtype: of the stored tensors.
        lora_config: any other field of peft.LoraConfig.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM", **lora_config)
    adapted = get_peft_model(copy.deepcopy(model), config)
    _randomise(adapted, seed, strength)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(out_dir, save_embedding_layers=False)
    (out_dir / "README.md").unlink()  # PEFT's model card is no part of an adapter
    return out_dir


def hollow_adapter(folder: Path) -> Path:
    """The files that an adapter must have, empty: as far as a command looks before somebody opens them."""
    folder.mkdir()
    for name in REQUIRED_FILES:
        (folder / name).touch()
    return folder


def put(store: AdapterStore, name: str, folder: Path, layout: BaseLayout, version: int | None = None) -> str:
    """Publishes an adapter's folder as a server would; its digest."""
    staged = store.new_staging()
    for file in folder.iterdir():
        (staged / file.name).write_bytes(file.read_bytes())
    facts = validate_adapter(staged, layout, max_rank=64)
    return store.publish(name, staged, facts, version=version)[0].facts.digest


def _randomise(adapted: nn.Module, seed: int, strength: float) -> None:
    """Fills A and B so that ‖scaling · B @ A‖ = strength · ‖W‖ in every adapted module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in adapted.modules():
            if not hasattr(module, "lora_A") or "default" not in module.lora_A:
                continue
            a_RD, b_OR = module.lora_A["default"].weight, module.lora_B["default"].weight
            a_RD.copy_(torch.randn(a_RD.shape, generator=generator))
            b_OR.copy_(torch.randn(b_OR.shape, generator=generator))
            delta_norm = (b_OR @ a_RD).norm() * module.scaling["default"]
            b_OR.mul_(strength * module.get_base_layer().weight.norm() / delta_norm)


def config_of(**fields: Any) -> bytes:
    """An adapter_config.json with the fewest fields, and these."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | fields
    return json.dumps(config).encode()
