"""Owns what a planned run does, in the numbers that memory and time follow from. Knows no torch, no base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Trains = Literal["all", "lora", "dora", "ia3", "prefix", "prompt", "bitfit"]
Storage = Literal["nf4", "nf4-single", "fp4", "fp4-single", "int8", "none"]
"""How the frozen linear layers are kept; "-single" is without the second quantisation of the scales."""
PlannedOptimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
Place = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Technique:
    """What a method trains, and how it keeps the base unless the run says otherwise."""

    trains: Trains
    storage: Storage


TECHNIQUES: Final[Mapping[str, Technique]] = {
    "full": Technique("all", "none"),
    "lora": Technique("lora", "none"),
    "qlora": Technique("lora", "nf4"),
    "rslora": Technique("lora", "nf4"),
    "lora_plus": Technique("lora", "nf4"),
    "loftq": Technique("lora", "nf4"),
    "pissa": Technique("lora", "none"),
    "lora_8bit": Technique("lora", "int8"),
    "dora": Technique("dora", "none"),
    "qdora": Technique("dora", "nf4"),
    "ia3": Technique("ia3", "nf4"),
    "prefix": Technique("prefix", "nf4"),
    "prompt": Technique("prompt", "nf4"),
    "bitfit": Technique("bitfit", "none"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One training step, as its memory and time see it.

    Attributes:
        method: its name in TECHNIQUES.
        storage: of the frozen linear layers.
        rank: of LoRA and DoRA.
        targets: names of the modules that LoRA and DoRA adapt.
        virtual_tokens: of prefix and prompt tuning.
        batch_rows: B.
        row_tokens: of the longest row; the others are padded to it.
        shares_prefixes: whether rows are one sequence behind their common beginning; row_tokens and
            kept_tokens are then the sequence's, divided by the rows.
        kept_tokens: columns whose logits are computed: those of the longest answer, and one more.
        accumulates: whether a step has several batches, so that gradients are there before the last one.
        activation_bytes: of an activation, and of a weight that is not quantised; 2 or 4.
        product_bytes: of a dequantised weight; 2 or 4.
    """

    method: str
    place: Place
    storage: Storage
    rank: int = 16
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    virtual_tokens: int = 32
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

    @property
    def trains(self) -> Trains:
        return TECHNIQUES[self.method].trains

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
    def trained_value_bytes(self) -> int:
        """PEFT keeps what it adds in float32; full fine-tuning trains the base as it is kept."""
        return self.activation_bytes if self.trains in ("all", "bitfit") else 4
