"""Owns which kinds of adapters there are for this server: those it applies, and those it refuses and why.

A kind is refused by one row here, with the reason and the remedy. To apply it one day it becomes an
`AppliedKind`: what its files must hold and how large that is follow from the row; its arithmetic belongs in
adapters/factors.py (what a slot holds) and adapters/layers.py (what a layer adds). All kinds applied so far
are low-rank products. Knows no torch and no files.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from adapters.facts import Method
from adapters.layout import ModuleShape

Shapes = Mapping[str, tuple[int, int]]

MAX_VIRTUAL_TOKENS: Final = 4096
"""Learned positions before a prompt, of those that are trained and evaluated here."""


@dataclass(frozen=True, slots=True)
class AppliedKind:
    """How adapters of one method are checked, sized and scaled.

    Attributes:
        tensors: of a module of this shape and rank: end of each tensor's name → its shape.
        scaling: factor on the update, of alpha and rank.
    """

    tensors: Callable[[ModuleShape, int], Shapes]
    scaling: Callable[[float, int], float]


def _low_rank(shape: ModuleShape, rank: int) -> Shapes:
    return {
        "lora_A.weight": (rank, shape.in_features),
        "lora_B.weight": (shape.out_features, rank),
    }


APPLIED: Mapping[Method, AppliedKind] = MappingProxyType(
    {
        "lora": AppliedKind(_low_rank, scaling=lambda alpha, rank: alpha / rank),
        "rslora": AppliedKind(_low_rank, scaling=lambda alpha, rank: alpha / math.sqrt(rank)),
    }
)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why something is not applied here, and what to do instead."""

    why: str
    remedy: str = "retrain without it"

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}"


_TRAIN_LORA = "train with peft.LoraConfig, or merge it into a base of its own with PEFT's merge_and_unload"
_NO_MERGE = "train with peft.LoraConfig"
_IMPORTS = "it names code to import, which is never done here"
_PROMPTS = Refused("it puts learned vectors before the prompt", _NO_MERGE)
_PREFIXES = Refused("it puts learned keys and values before the prompt", _NO_MERGE)
_PRODUCTS = Refused("its update is another product than B @ A", _TRAIN_LORA)
_ROTATIONS = Refused("it rotates the weights of the shared base", _TRAIN_LORA)
_SHARED = Refused("its factors are shared or drawn at random, and scaled by learned vectors", _TRAIN_LORA)
_SPARSE = Refused("its update is sparse or in another basis, not B @ A", _TRAIN_LORA)
_ROUTED = Refused("it routes between several adapters", _NO_MERGE)

ANY_OTHER_TYPE = Refused("only LORA is applied here", _TRAIN_LORA)

REFUSED_TYPES: Mapping[str, Refused] = MappingProxyType(
    {
        "ADALORA": Refused("AdaLoRA scales each rank and masks some, which is more than B @ A", _TRAIN_LORA),
        "ADAPTION_PROMPT": _PREFIXES,
        "BITFIT": Refused("it changes biases of the shared base", _NO_MERGE),
        "BOFT": _ROTATIONS,
        "C3A": _SPARSE,
        "CARTRIDGE": _PREFIXES,
        "CPT": _PROMPTS,
        "FOURIERFT": _SPARSE,
        "HRA": _ROTATIONS,
        "IA3": Refused("IA³ multiplies activations by learned vectors", _TRAIN_LORA),
        "LN_TUNING": Refused("it replaces the norms of the shared base", _TRAIN_LORA),
        "LOHA": _PRODUCTS,
        "LOKR": _PRODUCTS,
        "MULTITASK_PROMPT_TUNING": _PROMPTS,
        "OFT": _ROTATIONS,
        "POLY": _ROUTED,
        "PREFIX_TUNING": _PREFIXES,
        "PROMPT_TUNING": _PROMPTS,
        "P_TUNING": _PROMPTS,
        "RANDLORA": _SHARED,
        "SHIRA": _SPARSE,
        "TRAINABLE_TOKENS": Refused("it changes embeddings of the shared base", _TRAIN_LORA),
        "VBLORA": _SHARED,
        "VERA": _SHARED,
        "WAVEFT": _SPARSE,
        "XLORA": _ROUTED,
    }
)
"""By peft_type."""

REFUSED_FIELDS: Mapping[str, Refused] = MappingProxyType(
    {
        "alora_invocation_tokens": Refused("activated LoRA switches on in mid-sequence"),
        "arrow_config": Refused("Arrow routes between several adapters"),
        "auto_mapping": Refused(
            _IMPORTS, "set it to null, or train with task_type='CAUSAL_LM' so that PEFT writes none"
        ),
        "base_model_class": Refused(_IMPORTS, "set it to null"),
        "enable_lora": Refused("it was for fused projections of very old PEFT"),
        "ensure_weight_tying": Refused("it ties an adapter to the embedding"),
        "kasa_config": Refused("KaSA truncates the shared base's weights"),
        "layer_replication": Refused("it restructures the shared base"),
        "lora_bias": Refused("an adapter may add a low-rank product and no bias"),
        "megatron_config": Refused(_IMPORTS, "set it to null"),
        "merge_weights": Refused("the shared base is never merged into"),
        "modules_to_save": Refused("it replaces whole modules of the shared base"),
        "monteclora_config": Refused("Monteclora samples its weights"),
        "parent_library": Refused(_IMPORTS, "set it to null"),
        "target_parameters": Refused(
            "only linear modules can be adapted here", "retrain with target_modules"
        ),
        "trainable_token_indices": Refused("it changes embeddings of the shared base"),
        "use_bdlora": Refused("block-diagonal LoRA is not applied here"),
        "use_dora": Refused(
            "DoRA is not applied here", "retrain without it, or merge it into the base with PEFT"
        ),
        "use_qalora": Refused("QA-LoRA pools its input, which is not done here"),
        "velora_config": Refused("VeLoRA stores more than the two factors"),
    }
)
"""By field of adapter_config.json, each of which must be off."""

BIAS = Refused("it changes biases of the shared base", "retrain with bias='none'")
MEGATRON_CORE = Refused(_IMPORTS, "set it to null")

_CONVERT = Refused(
    "it changed the weights of the base in training",
    "convert the adapter with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…) or "
    "retrain with init_lora_weights=true",
)
REFUSED_INITS: Mapping[str, Refused] = MappingProxyType(
    {"pissa": _CONVERT, "olora": _CONVERT, "corda": _CONVERT, "lora_ga": _CONVERT}
)
"""By how init_lora_weights begins: the factors fit a base whose weights were changed before training."""

ANY_OTHER_INIT = Refused(
    "the adapter was trained against changed base weights", "retrain with init_lora_weights=true"
)

_OF_THE_BASE = Refused(
    "it is a weight of the base", "save with save_pretrained(…, save_embedding_layers=False)"
)
_EMBEDDING = Refused("it adapts an embedding", "retrain with linear target_modules only")
REFUSED_TENSORS: Mapping[str, Refused] = MappingProxyType(
    {
        "lora_magnitude_vector": Refused("it belongs to DoRA", "retrain with use_dora=false"),
        "lora_embedding_A": _EMBEDDING,
        "lora_embedding_B": _EMBEDDING,
        "lora_B.bias": Refused("an adapter may not add a bias", "retrain with lora_bias=false"),
        ".base_layer.": _OF_THE_BASE,
        "embed_tokens.weight": _OF_THE_BASE,
        "lm_head.weight": _OF_THE_BASE,
    }
)
"""By part of a tensor's name."""
