"""Owns what a planned run does, in the numbers that memory and time follow from. Knows no torch, no base."""

from dataclasses import dataclass
from typing import Literal

Trains = Literal["all", "lora", "dora", "ia3", "prefix", "prompt", "bitfit"]
Storage = Literal["nf4", "nf4-single", "fp4", "fp4-single", "int8", "none"]
"""How the frozen linear layers are kept; "-single" is without the second quantisation of the scales."""
PlannedOptimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Place = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One training step, as its memory and time see it.

    Attributes:
        method: its name in training/methods.py.
        trains: which weights.
        storage: of the frozen linear layers.
        rank: of LoRA and DoRA.
        targets: modules of a layer that LoRA, DoRA and IA³ adapt, such as "self_attn.q_proj"; all of them for
            other methods.
        virtual_tokens: of prefix and prompt tuning.
        batch_rows: B.
        row_tokens: of the longest row; the others are padded to it.
        shares_prefixes: whether rows are one sequence behind their common beginning; row_tokens and
            kept_tokens are then the sequence's, divided by the rows.
        kept_tokens: columns whose logits are computed: those of the longest answer, and one more.
        accumulates: whether a step has several batches, so that gradients are there before the last one.
        activation_bytes: of an activation; 2 or 4.
        product_bytes: of a dequantised weight; 2 or 4.
        heap_keeps: whether the C heap may take a step's activations anew while it holds the last step's.
    """

    method: str
    trains: Trains
    place: Place
    storage: Storage
    rank: int = 16
    targets: tuple[str, ...]
    virtual_tokens: int = 20
    dropout: bool = False
    optimizer: PlannedOptimizer = "adamw"
    batch_rows: int
    row_tokens: int
    kept_tokens: int
    shares_prefixes: bool = False
    accumulates: bool = False
    checkpointing: bool = False
    activation_bytes: int
    product_bytes: int
    heap_keeps: bool = False

    @property
    def columns(self) -> int:
        """W; prompt tuning puts its tokens before each row."""
        return self.row_tokens + (self.virtual_tokens if self.trains == "prompt" else 0)

    @property
    def key_columns(self) -> int:
        """Columns that are attended to; prefix tuning adds keys and values, but no tokens."""
        return self.columns + (self.virtual_tokens if self.trains == "prefix" else 0)

    @property
    def tokens(self) -> int:
        """T, padding included."""
        return self.batch_rows * self.columns

    @property
    def mask_values(self) -> int:
        """Of one layer's mask, for all rows."""
        if self.shares_prefixes:
            return self.tokens * self.batch_rows * self.key_columns
        return self.tokens * self.key_columns

    @property
    def kept_rows(self) -> int:
        """Rows of the logits."""
        return self.batch_rows * min(self.kept_tokens, self.columns)

    @property
    def trains_own_weights(self) -> bool:
        """The base is then loaded in float32, whatever its activations' type."""
        return self.trains in ("all", "bitfit")

    @property
    def weight_bytes(self) -> int:
        """Of a weight that is not quantised."""
        return 4 if self.trains_own_weights else self.activation_bytes
