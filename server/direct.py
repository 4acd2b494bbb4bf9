"""The forward pass around fused layers, part by part instead of through the model's own code.

Around one native call for all layers a model does little: embeddings, rotary angles, a norm, the head. Its
own code for that takes a millisecond for masks, caches and options that are not used here. Whether the parts
compute what the model does, one pass of both says; a model that does more keeps its own. Knows no requests.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from server.fusion import FusedLayers, NativeCaches
from server.kv_cache import Step

log = logging.getLogger(__name__)

_PROBE_TOKENS = 5
_TOLERANCE = 1e-4
"""Of logits, relative to the largest: other orders of summation, nothing more."""
_TABLE_BYTES = 64 * 2**20
"""Of rotary angles for every position; of longer contexts they are computed in each step."""
_FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds whose angles depend on the position alone, not on the longest sequence so far."""

Forward = Callable[[Tensor, Tensor, Tensor, Step], Tensor]
"""Token ids [T], positions [T], indices of the rows that need logits [S], step → logits [S, V]."""


def model_forward(model: Any) -> Forward:
    """The pass as the model itself does it."""

    def forward(ids_T: Tensor, positions_T: Tensor, rows_S: Tensor, step: Step) -> Tensor:
        output = model(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            logits_to_keep=rows_S,
            use_cache=False,
            paged=step,
        )
        logits_SV: Tensor = output.logits[0]
        return logits_SV

    return forward


def direct_forward(model: Any, layers: FusedLayers, caches: NativeCaches) -> "DirectForward | None":
    """The same pass part by part; None if the model has other parts, or does more with them.

    Args:
        layers: all of the model's, in place.
        caches: whose first blocks may be overwritten.
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), None)
    rotary, norm = getattr(backbone, "rotary_emb", None), getattr(backbone, "norm", None)
    positions = min(model.config.max_position_embeddings, caches.block_count * caches.block_tokens)
    kind = getattr(rotary, "rope_type", None)
    if rotary is None or norm is None or not isinstance(kind, str) or kind not in _FIXED_ROTARY:
        return None
    direct = DirectForward(model, layers, _Angles(rotary, positions), norm)
    difference = _difference(direct, model_forward(model), positions, caches)
    if not difference <= _TOLERANCE:
        log.info("%s does more than its parts: logits differ by %.1e", type(model).__name__, difference)
        return None
    return direct


class _Angles:
    """Cosines and sines of rotary positions, [1, T, R] each."""

    def __init__(self, rotary: nn.Module, positions: int) -> None:
        self._rotary = rotary
        self._like = torch.empty(0)
        self._table: tuple[Tensor, ...] | None = None
        width = self._computed(torch.zeros(1, dtype=torch.long))[0].shape[-1]
        if 2 * positions * width * self._like.itemsize <= _TABLE_BYTES:
            self._table = self._computed(torch.arange(positions))

    def of(self, positions_T: Tensor) -> tuple[Tensor, ...]:
        if self._table is None:
            return self._computed(positions_T)
        return tuple(angles.index_select(1, positions_T) for angles in self._table)

    def _computed(self, positions_T: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            angles: tuple[Tensor, ...] = self._rotary(self._like, positions_T[None])
        return angles


class DirectForward:
    """What transformers' decoders compute around their layers; factors that a model has not are 1."""

    def __init__(self, model: Any, layers: FusedLayers, angles: _Angles, norm: nn.Module) -> None:
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._layers, self._angles, self._norm = layers, angles, norm
        self._embedding_factor = getattr(model.config, "embedding_multiplier", None)
        self._logits_divisor = getattr(model.config, "logits_scaling", None)
        self._softcap = getattr(model.config, "final_logit_softcapping", None)

    def __call__(self, ids_T: Tensor, positions_T: Tensor, rows_S: Tensor, step: Step) -> Tensor:
        """As any `Forward`."""
        logits_SV: Tensor = self._head(self.hidden(ids_T, positions_T, rows_S, step))
        if self._logits_divisor is not None:
            logits_SV = logits_SV / self._logits_divisor
        if self._softcap is not None:
            logits_SV = torch.tanh(logits_SV / self._softcap) * self._softcap
        return logits_SV

    def hidden(self, ids_T: Tensor, positions_T: Tensor, rows_S: Tensor, step: Step) -> Tensor:
        """[S, D]: what the head is given."""
        x_TD: Tensor = self._embedding(ids_T)
        if self._embedding_factor is not None:
            x_TD = x_TD * self._embedding_factor
        self._layers(x_TD[None], position_embeddings=self._angles.of(positions_T), paged=step)
        hidden_SD: Tensor = self._norm(x_TD.index_select(0, rows_S))
        return hidden_SD


def head_is_last(config: Any) -> bool:
    """Whether the head's products are the logits, with nothing after them."""
    names = ("logits_scaling", "final_logit_softcapping")
    return all(getattr(config, name, None) is None for name in names)


def _difference(direct: Forward, expected: Forward, positions: int, caches: NativeCaches) -> float:
    """Largest difference of logits, relative to the largest: of first tokens and of last ones."""
    count = min(_PROBE_TOKENS, positions)
    ids_T, worst = torch.arange(count), 0.0
    for first in (0, positions - count):
        results = []
        for forward in (direct, expected):
            with torch.inference_mode():
                results.append(forward(ids_T, ids_T + first, ids_T, caches.probe_step(count)))
        found_SV, expected_SV = results
        worst = max(worst, float((found_SV - expected_SV).abs().max() / expected_SV.abs().max()))
    return worst
