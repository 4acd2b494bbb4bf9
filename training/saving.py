"""Writes what a method trained, family by family. Knows no report, no canary and no server.

low_rank, scales, prefix, prompt  the folder that PEFT saves
bitfit                            the same two files: {"peft_type": "BITFIT"} and the biases by their names
full                              an ordinary model folder
"""

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from adapters.base import Base, source_model
from adapters.files import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from adapters.fingerprint import read_config
from adapters.model_folder import save_model
from training.recipe import Recipe

_DEFAULT: Final = "default"  # others PEFT saves into folders of their own
_FLOATS: Final = ("float32", "bfloat16", "float16")


def save_trained(model: Any, base: Base, recipe: Recipe, folder: Path) -> None:
    """Fills the folder with what the method made.

    Args:
        model: as `attached` settled it.
    """
    if recipe.method == "full":
        _save_full(base, folder)
    elif recipe.method == "bitfit":
        _save_biases(base, folder)
    else:
        save_with_peft(model, base, folder)


def save_with_peft(model: Any, base: Base, folder: Path) -> None:
    """The adapter that PEFT calls "default"; the same bytes for the same weights."""
    config = model.peft_config[_DEFAULT]
    config.base_model_name_or_path = base.name  # not where it lies on this machine
    for field in ("target_modules", "feedforward_modules"):
        if getattr(config, field, None):  # PEFT's set would come in another order each time
            setattr(config, field, sorted(getattr(config, field)))
    model.save_pretrained(
        folder, safe_serialization=True, selected_adapters=[_DEFAULT], save_embedding_layers=False
    )
    for path in folder.iterdir():
        if path.name not in ADAPTER_FILES:  # PEFT's model card, a form to be filled in
            path.unlink()


def _save_biases(base: Base, folder: Path) -> None:
    """Format 1 of its own: values, not differences; load_state_dict(…, strict=False) puts them in."""
    config = {"peft_type": "BITFIT", "format": 1, "base_model_name_or_path": base.name}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    trained = {n: p.detach().contiguous().cpu() for n, p in base.model.named_parameters() if p.requires_grad}
    save_file(trained, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _save_full(base: Base, folder: Path) -> None:
    """In the layers and the type of the source, whose transposed layers the base keeps as plain ones."""
    model = source_model(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            trained = base.model.get_parameter(name)
            transposed = (
                isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and trained.ndim == 2
            )
            parameter.copy_(trained.T if transposed else trained)
    save_model(folder, base, model, dtype=_source_dtype(base), chat_template=None)


def _source_dtype(base: Base) -> str:
    config = read_config(base.folder)
    stated = config.get("dtype") or config.get("torch_dtype")
    return stated if stated in _FLOATS else "float32"
