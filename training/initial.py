"""How low-rank factors begin other than with A at random and B = 0: LoftQ's way and PiSSA's. Knows no data.

LoftQ  s·B·A begins as the best approximation of rank r of what quantisation lost, W − Q(W). The base keeps
       the codes that it is served with: the method's further steps would requantise what all share.
PiSSA  s·B₀·A₀ is the best approximation of rank r of W itself, and while training the base is W − s·B₀·A₀.
       What was learned is s·(B·A − B₀·A₀), an ordinary update of rank 2 r of the base as it was.

R rank, D in-features, O out-features, s = α/r.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from adapters.base import Base, source_model
from adapters.layout import BaseLayout
from adapters.quantize import plain_weight
from adapters.wrapping import wrapped
from training.peft_configs import lora_config
from training.recipe import Recipe
from training.untouched import Untouched

_ITERATIONS: Final = 16  # of the subspace: minutes for a large base instead of hours


def pissa_config(recipe: Recipe, layout: BaseLayout) -> LoraConfig:
    """LoRA that PEFT begins with the weights' largest singular vectors, which it takes out of them."""
    config = lora_config(recipe, layout)
    config.init_lora_weights = f"pissa_niter_{_ITERATIONS}"
    return config


def trained_factors(model: PeftModel) -> dict[str, Tensor]:
    """Copies of A and B of every module, by the names under which they are saved."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def ordinary_lora(
    model: PeftModel, initial: Mapping[str, Tensor], base: Base, recipe: Recipe, untouched: Untouched
) -> PeftModel:
    """What PiSSA learned, as LoRA of rank 2 r on the original base, which gets its weights back.

    Args:
        initial: the factors with which the training began.
    """
    learned = {
        name: _difference(name, tensor, initial[name]) for name, tensor in trained_factors(model).items()
    }
    untouched.restore()
    config = lora_config(recipe, base.layout)
    config.r, config.lora_alpha = 2 * recipe.rank, 2 * recipe.effective_alpha
    ordinary = wrapped(base.model, config)
    set_peft_model_state_dict(ordinary, learned)
    return ordinary


@torch.no_grad()
def begin_with_lost(model: PeftModel, base: Base) -> None:
    """Sets every module's factors to what quantisation took from its weight, as far as rank r goes."""
    source, name_of = source_model(base), {id(module): name for name, module in base.model.named_modules()}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            quantized_OD = plain_weight(layer.get_base_layer())
            source_OD = _rows_of_outputs(source.get_submodule(name_of[id(layer)]))
            _set_factors(layer, source_OD.to(quantized_OD.device) - quantized_OD)


def _rows_of_outputs(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def _set_factors(layer: Any, wanted_OD: Tensor) -> None:
    """A and B such that s·B·A is the best approximation of `wanted` of their rank, with equal shares."""
    (adapter,) = layer.lora_A
    a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    rank = a.shape[0]
    oversampled = min(2 * rank, *wanted_OD.shape)
    u_OR, s_R, v_DR = torch.svd_lowrank(wanted_OD, q=oversampled, niter=_ITERATIONS)
    root_R = s_R[:rank].sqrt()
    b.copy_(u_OR[:, :rank] * root_R / scaling)
    a.copy_((v_DR[:, :rank] * root_R).T)


def _difference(name: str, trained: Tensor, initial: Tensor) -> Tensor:
    """B·A − B₀·A₀ as one product: [B, −B₀] · [A; A₀]."""
    if "lora_A" in name:
        return torch.cat([trained, initial], dim=0)
    return torch.cat([trained, -initial], dim=1)
