"""Makes a LoRA adapter of a fully fine-tuned model: the best of a rank there is. Knows no server.

Of each linear layer's change ΔW the r largest singular values and vectors make B·A, which of all matrices of
rank r is the nearest in the Frobenius norm (Eckart and Young 1936). What the model changed besides its linear
layers, no low-rank adapter holds; it is reported.

R rank, D in-features, O out-features.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from adapters.base import Base, dequantized_base
from adapters.cache import publish_folder
from adapters.errors import BaseModelError
from adapters.files import BUNDLE_FILE, CONFIG_FILE, WEIGHTS_FILE
from adapters.fingerprint import read_config
from adapters.model_folder import stored_weights, writing
from adapters.quantize import Quantization
from adapters.validate import validate_adapter
from training.provenance import manifest_of

_EXACT_SIZE: Final = 2048
"""Of the shorter side: larger ones get a randomised decomposition, which takes R columns and some more."""
_OVERSAMPLING: Final = 32
_POWER_ITERATIONS: Final = 4
_UNCHANGED: Final = 1e-6  # of a weight's norm: rounding
_TINY: Final = 1e-30


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was kept.

    Attributes:
        modules: how many linear layers the adapter changes.
        delta_norm: Frobenius norm of all changes of linear layers.
        error: of what is lost of them, relative to that norm.
        worst: the layer that loses most, and how much of its own change.
        left_out: weights besides linear layers that the model changed, with the relative size of the change.
    """

    folder: Path
    digest: str
    base: str
    base_fingerprint: str
    rank: int
    modules: int
    delta_norm: float
    error: float
    worst: tuple[str, float]
    left_out: dict[str, float]


def extract_adapter(
    base_source: str,
    model_dir: Path,
    out_dir: Path,
    *,
    rank: int,
    quantization: Quantization = "none",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> ExtractReport:
    """Writes an adapter that makes of the base, as nearly as its rank allows, a fine-tuned model.

    Args:
        base_source: what the model was trained from, as for `adapters.base.load_base`.
        model_dir: a model folder of the same architecture.
        out_dir: must not exist yet; appears complete or not at all.
        rank: R; layers that are smaller get as much as they can have.
        quantization: of the base that will serve the adapter. On a quantised one the adapter has to make good
            what quantisation lost as well, which is of full rank.

    Raises:
        BaseModelError: a model cannot be read, or they do not belong together.
        FileExistsError: out_dir exists.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another --out")
    base = dequantized_base(base_source, quantization=quantization, cache_dir=cache_dir, progress=progress)
    trained = _trained(model_dir, base)
    found = [
        _factored(name, base, trained, rank)
        for name in tqdm(_linear_modules(base), desc="extract", unit="layer", disable=not progress)
    ]
    kept = [each for each in found if each.delta_norm > 0]
    if not kept:
        raise BaseModelError(
            f"{model_dir} changes no linear layer of {base.name}: there is nothing to extract"
        )
    digests: list[str] = []

    def write(folder: Path) -> None:
        _save(folder, kept, base, rank)
        digests.append(validate_adapter(folder, base.layout, max_rank=rank).digest)

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    publish_folder(out_dir, write)
    worst = max(kept, key=lambda each: each.error)
    return ExtractReport(
        folder=out_dir,
        digest=digests[0],
        base=base.name,
        base_fingerprint=base.fingerprint,
        rank=rank,
        modules=len(kept),
        delta_norm=math.hypot(*(each.delta_norm for each in kept)),
        error=math.hypot(*(each.error * each.delta_norm for each in kept))
        / math.hypot(*(each.delta_norm for each in kept)),
        worst=(worst.name, worst.error),
        left_out=_left_out(base, trained),
    )


@dataclass(frozen=True, slots=True)
class _Factors:
    """Of one layer.

    Attributes:
        delta_norm: of its change.
        error: Frobenius norm of ΔW - B·A, relative to delta_norm.
    """

    name: str
    a_RD: Tensor
    b_OR: Tensor
    delta_norm: float
    error: float


def factored(delta_OD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, D] and B [O, R], each with the square root of the singular values.

    R is at most the shorter side of ΔW.
    """
    rank = min(rank, *delta_OD.shape)
    if min(delta_OD.shape) <= _EXACT_SIZE:
        u_OK, s_K, v_KD = torch.linalg.svd(delta_OD, full_matrices=False)
        u_OR, s_R, v_RD = u_OK[:, :rank], s_K[:rank], v_KD[:rank]
    else:
        columns = min(rank + _OVERSAMPLING, *delta_OD.shape)
        u_OK, s_K, v_DK = torch.svd_lowrank(delta_OD, q=columns, niter=_POWER_ITERATIONS)
        u_OR, s_R, v_RD = u_OK[:, :rank], s_K[:rank], v_DK[:, :rank].T
    root_R = s_R.sqrt()
    return root_R[:, None] * v_RD, u_OR * root_R


def _factored(name: str, base: Base, trained: Callable[[str, Tensor], Tensor], rank: int) -> _Factors:
    layer = base.model.get_submodule(name)
    delta = trained(f"{name}.weight", layer.weight) - layer.weight
    delta_OD = delta.T if isinstance(layer, Conv1D) else delta
    a_RD, b_OR = factored(delta_OD, rank)
    norm = float(delta_OD.norm())
    lost = float((delta_OD - b_OR @ a_RD).norm())
    relative = norm / max(float(layer.weight.norm()), _TINY)
    return _Factors(name, a_RD, b_OR, norm if relative > _UNCHANGED else 0.0, lost / max(norm, _TINY))


def _linear_modules(base: Base) -> list[str]:
    """All but the head, which is often the embedding too."""
    return [name for name in base.layout.modules if name != base.layout.head]


def _trained(folder: Path, base: Base) -> Callable[[str, Tensor], Tensor]:
    """Reads one weight of the fine-tuned model at a time, in float32."""
    ours, theirs = (read_config(path).get("architectures") for path in (base.folder, folder))
    if ours != theirs:
        raise BaseModelError(f"{folder} is a {theirs}, {base.name} a {ours}; give the base it was made from")
    read = stored_weights(folder, base.model)
    return lambda name, like: read(name, like).float()


def _left_out(base: Base, trained: Callable[[str, Tensor], Tensor]) -> dict[str, float]:
    """Every other weight that changed, such as norms, embeddings and biases."""
    linear = {f"{name}.weight" for name in _linear_modules(base)}
    changes = {}
    for name, weight in base.model.named_parameters():
        if name not in linear:
            change = float((trained(name, weight) - weight).norm()) / max(float(weight.norm()), _TINY)
            if change > _UNCHANGED:
                changes[name] = change
    return changes


def _save(folder: Path, kept: Sequence[_Factors], base: Base, rank: int) -> None:
    """As PEFT saves it, α = r: B·A is all there is to add."""
    ranks = {each.name: len(each.a_RD) for each in kept if len(each.a_RD) != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(each.name for each in kept),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    plain = json.loads((folder / CONFIG_FILE).read_text())
    plain["target_modules"] = sorted(plain["target_modules"])  # PEFT's set would come in another order
    (folder / CONFIG_FILE).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
    tensors = dict(pair for each in kept for pair in _tensors(each))
    with writing(WEIGHTS_FILE):
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / BUNDLE_FILE).write_text(manifest_of(base).to_json())


def _tensors(factors: _Factors) -> Iterator[tuple[str, Tensor]]:
    yield f"base_model.model.{factors.name}.lora_A.weight", factors.a_RD.contiguous()
    yield f"base_model.model.{factors.name}.lora_B.weight", factors.b_OR.contiguous()
