"""Owns memory figures that others have published, and the shapes of their models. Knows no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from training.memory import predict_memory
from training.pace import GB
from training.shape import ModelShape
from training.workload import Storage, Trains, Workload

_COLUMNS: Final = ("7B", "13B", "30B", "70B", "110B", "8x7B", "8x22B")
_FIGURES: Final[Mapping[tuple[str, str], tuple[int, ...]]] = {
    ("full (AMP)", "32/16"): (120, 240, 600, 1200, 2000, 900, 2400),
    ("full", "16"): (60, 120, 300, 600, 900, 400, 1200),
    ("LoRA", "16"): (16, 32, 64, 160, 240, 120, 320),
    ("QLoRA", "8"): (10, 20, 40, 80, 140, 60, 160),
    ("QLoRA", "4"): (6, 12, 24, 48, 72, 30, 96),
    ("QLoRA", "2"): (4, 8, 16, 24, 48, 18, 48),
}
"""GB by method and bits, in the order of _COLUMNS: a vendor's of 2024, who states no batch or length."""

_BATCH_ROWS: Final = 1
_ROW_TOKENS: Final = 512


def _llama(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int
) -> ModelShape:
    return ModelShape(
        name=name,
        model_type="llama",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_width=hidden // heads,
        inner=inner,
        vocabulary=vocabulary,
    )


def _mixtral(name: str, layers: int, hidden: int, heads: int, inner: int, vocabulary: int) -> ModelShape:
    return ModelShape(
        name=name,
        model_type="mixtral",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_width=hidden // heads,
        inner=inner,
        vocabulary=vocabulary,
        experts=8,
        active_experts=2,
    )


SHAPES: Final[Mapping[str, ModelShape]] = {
    "7B": _llama("7B", 32, 4096, 32, 32, 11008, 32000),
    "13B": _llama("13B", 40, 5120, 40, 40, 13824, 32000),
    "30B": _llama("30B", 60, 6656, 52, 52, 17920, 32000),
    "70B": _llama("70B", 80, 8192, 64, 8, 28672, 32000),
    "110B": _llama("110B", 80, 8192, 64, 8, 49152, 152064),
    "8x7B": _mixtral("8x7B", 32, 4096, 32, 14336, 32000),
    "8x22B": _mixtral("8x22B", 56, 6144, 48, 16384, 32768),
}
"""Published shapes: Llama 1 and 2, Qwen1.5-110B, Mixtral 8x7B and 8x22B."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One published figure beside the formula's.

    Attributes:
        predicted_gb: a batch of one row of 512 tokens, rank 16, AdamW, nothing computed twice.
        smallest_gb: the same with checkpointing and paged 8-bit AdamW.
        weights_only: whether the formula counts the base's weights alone: nothing here trains on 2 bits.
    """

    method: str
    bits: str
    model: str
    published_gb: float
    predicted_gb: float
    smallest_gb: float
    weights_only: bool

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted_gb / self.published_gb


def comparisons() -> Iterator[Comparison]:
    """Every published figure, with what the formula says."""
    for (method, bits), figures in _FIGURES.items():
        for model, figure in zip(_COLUMNS, figures, strict=True):
            shape = SHAPES[model]
            yield Comparison(
                method=method,
                bits=bits,
                model=model,
                published_gb=figure,
                predicted_gb=_predicted_bytes(shape, method, bits, smallest=False) / GB,
                smallest_gb=_predicted_bytes(shape, method, bits, smallest=True) / GB,
                weights_only=bits == "2",
            )


def _predicted_bytes(shape: ModelShape, method: str, bits: str, *, smallest: bool) -> float:
    if bits == "2":
        return shape.linear_parameters / 4 + 2 * (shape.parameters - shape.linear_parameters)
    name, trains, storage = _WAYS[method, bits]
    memory = predict_memory(shape, _work(shape, name, trains, storage, smallest=smallest))
    if trains != "all":
        return memory.total_bytes
    per_parameter = _FULL_BYTES[bits] - (_SAVED_STATES[bits] if smallest else 0)
    rest = sum(size for part, size in memory.parts.items() if part not in _OF_PARAMETERS)
    return per_parameter * shape.parameters + rest


_WAYS: Final[Mapping[tuple[str, str], tuple[str, Trains, Storage]]] = {
    ("full (AMP)", "32/16"): ("full", "all", "none"),
    ("full", "16"): ("full", "all", "none"),
    ("LoRA", "16"): ("lora", "lora", "none"),
    ("QLoRA", "8"): ("lora_8bit", "lora", "int8"),
    ("QLoRA", "4"): ("qlora", "lora", "nf4"),
}
_FULL_BYTES: Final = {"32/16": 4 + 2 + 4 + 8, "16": 2 + 2 + 4}
"""A parameter's weight, with autocast its copy, its gradient and two states. Full training here keeps the
base's own weights besides, 4 bytes more, and has no form in 16 bits alone."""
_SAVED_STATES: Final = {"32/16": 6, "16": 2}
_OF_PARAMETERS: Final = ("base", "trained", "gradients", "optimizer")


def _work(shape: ModelShape, method: str, trains: Trains, storage: Storage, *, smallest: bool) -> Workload:
    return Workload(
        method=method,
        trains=trains,
        place="cuda",
        storage=storage,
        targets=tuple(module.name for module in shape.modules),
        batch_rows=_BATCH_ROWS,
        row_tokens=_ROW_TOKENS,
        kept_tokens=_ROW_TOKENS,
        checkpointing=smallest,
        optimizer="paged_adamw_8bit" if smallest else "adamw",
        activation_bytes=2,
        product_bytes=2,
    )
