"""Owns the noise on embedded tokens in training (NEFTune). Knows no Trainer, whose own outlives a failed run.

B rows, T tokens, D width of the model.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(model: Any, alpha: float) -> Iterator[None]:
    """Within the block, embeddings in training get uniform noise of at most α / √(T·D); 0 is none.

    Source: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", 2023.
    """
    if not alpha:
        yield
        return

    def add_noise(module: nn.Module, _: Any, embedded_BTD: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTD
        bound = alpha / math.sqrt(embedded_BTD.shape[1] * embedded_BTD.shape[2])
        return embedded_BTD + torch.empty_like(embedded_BTD).uniform_(-bound, bound)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
