"""Owns the table of training methods: what each is for, takes, knows and leaves behind. Knows no torch.

Whether a server applies what a method leaves is not said here: adapters/kinds.py says it, and is asked with
the configuration that is saved.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from adapters.errors import UnsupportedAdapterError
from adapters.peft_fields import check_fields
from training.errors import RecipeError

MethodName = Literal[
    "full", "lora", "qlora", "rslora", "dora", "qdora", "lora_8bit", "lora_plus", "pissa", "loftq", "ia3",
    "prefix", "prompt", "bitfit",
]  # fmt: skip
Quantization = Literal["nf4", "fp4", "int8", "none"]
Family = Literal["low_rank", "scales", "prefix", "prompt", "own_weights"]

USUAL_RATES: Final = (1e-5, 3e-4)
"""Learning rates of low-rank updates that are usual; a method's own default moves them up or down."""
_USUAL_RATE: Final = 2e-4

_LOW_RANK: Final = frozenset({"rank", "alpha", "dropout", "target_modules"})
_ANY_BASE: Final = ("nf4", "none", "fp4", "int8")
_FEWEST_FIELDS: Final = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way of training.

    Attributes:
        title: what it does, in a few words.
        family: what kind of weights it trains.
        quantizations: of bases that it takes; "auto" is the first.
        why_only: why it takes no others.
        learning_rate: unless the recipe says otherwise.
        settings: of the recipe, those that not every method knows.
        saved: fields of adapter_config.json that make what it saves what it is; None if it saves a model.
        rank_factor: rank of what is saved, in terms of the recipe's.
        afterwards: what to do with the result if no server applies it; names {merge}, the command, and {out}.
    """

    name: MethodName
    title: str
    family: Family = "low_rank"
    quantizations: tuple[Quantization, ...] = _ANY_BASE
    why_only: str = ""
    learning_rate: float = _USUAL_RATE
    settings: frozenset[str] = _LOW_RANK
    saved: Mapping[str, object] | None = field(default_factory=dict)
    rank_factor: int = 1
    afterwards: str = "make a base of its own of it with `{merge}`, or load the folder with PEFT"

    @property
    def rate_factor(self) -> float:
        """How much higher than usual its learning rates are."""
        return self.learning_rate / _USUAL_RATE

    @property
    def why_not_served(self) -> str | None:
        """Why no server applies what it saves; None if this version's servers do."""
        if self.saved is None:
            return "it makes a whole model and no adapter"
        try:
            check_fields(_FEWEST_FIELDS | dict(self.saved))
        except UnsupportedAdapterError as refused:
            return str(refused).partition("; ")[0]  # without the remedy, which is an uploader's
        return None


_FLOATS: Final = "it trains on 16- or 32-bit weights"
_METHODS: Final = (
    Method(
        name="qlora",
        title="low-rank updates of the 4-bit base that servers keep resident",
        quantizations=("nf4", "fp4"),
        why_only="for others there are lora and lora_8bit",
    ),
    Method(
        name="lora",
        title="low-rank updates of the unquantised base",
        quantizations=("none",),
        why_only="on a 4-bit base the same is called qlora, on an 8-bit one lora_8bit",
    ),
    Method(
        name="lora_8bit",
        title="low-rank updates of a base in LLM.int8()",
        quantizations=("int8",),
        why_only="on other bases the same is called qlora and lora",
    ),
    Method(
        name="rslora",
        title="low-rank updates scaled by α/√r, for large ranks",
        saved={"use_rslora": True},
    ),
    Method(
        name="lora_plus",
        title="low-rank updates whose B learns faster than A",
        learning_rate=1e-4,
        settings=_LOW_RANK | {"lora_plus_ratio"},
    ),
    Method(
        name="pissa",
        title="low-rank updates that begin as the largest singular vectors of the weights",
        quantizations=("none",),
        why_only="it takes its factors out of the weights, and what is left would have to be quantised anew; "
        "on a quantised base use loftq",
        rank_factor=2,
    ),
    Method(
        name="loftq",
        title="low-rank updates that begin with what quantisation lost",
        quantizations=("nf4", "fp4", "int8"),
        why_only="an unquantised base has lost nothing; use lora or pissa",
    ),
    Method(
        name="dora",
        title="low-rank updates of directions, with a magnitude of each output, on the unquantised base",
        quantizations=("none",),
        why_only="on a 4-bit base it is called qdora, and PEFT has none for int8",
        saved={"use_dora": True},
    ),
    Method(
        name="qdora",
        title="DoRA on the 4-bit base",
        quantizations=("nf4", "fp4"),
        why_only="on an unquantised base it is called dora, and PEFT has none for int8",
        saved={"use_dora": True},
    ),
    Method(
        name="ia3",
        title="IA³: learned factors on keys, values and the inputs of the MLP's last layer",
        family="scales",
        learning_rate=3e-3,
        settings=frozenset({"target_modules"}),
        saved={"peft_type": "IA3"},
    ),
    Method(
        name="prefix",
        title="learned keys and values before the prompt, in every layer",
        family="prefix",
        learning_rate=1e-2,
        settings=frozenset({"virtual_tokens"}),
        saved={"peft_type": "PREFIX_TUNING"},
        afterwards="load the folder with PEFT; it cannot be merged",
    ),
    Method(
        name="prompt",
        title="learned vectors before the prompt",
        family="prompt",
        learning_rate=3e-2,
        settings=frozenset({"virtual_tokens"}),
        saved={"peft_type": "PROMPT_TUNING"},
        afterwards="load the folder with PEFT; it cannot be merged",
    ),
    Method(
        name="bitfit",
        title="the base's biases alone",
        family="own_weights",
        quantizations=("none",),
        why_only=_FLOATS,
        learning_rate=1e-3,
        settings=frozenset(),
        saved={"peft_type": "BITFIT"},
        afterwards="make a base of its own of it with `{merge}`",
    ),
    Method(
        name="full",
        title="every weight of the base; leaves a model of its own",
        family="own_weights",
        quantizations=("none",),
        why_only=_FLOATS,
        learning_rate=2e-5,
        settings=frozenset(),
        saved=None,
        afterwards="serve it as a base of its own: quickchange serve --base {out}",
    ),
)

METHODS: Final[Mapping[str, Method]] = MappingProxyType({method.name: method for method in _METHODS})
"""By name, the most usual first."""

OWN_SETTINGS: Final = frozenset().union(*(method.settings for method in _METHODS))
"""Settings of a recipe that not every method knows."""

_NO_BOTTLENECK: Final = (
    "PEFT has no bottleneck adapters, and a server could not put small layers between those that all share; "
    "lora trains as few parameters"
)
_ABSENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bottleneck": _NO_BOTTLENECK,
        "houlsby": _NO_BOTTLENECK,
        "pfeiffer": _NO_BOTTLENECK,
        "adalora": "ranks that change while training are not trained here; use rslora with a large rank",
    }
)


def method_named(name: str) -> Method:
    """The row of the table.

    Raises:
        RecipeError: there is none of that name; the message says which there are, or why not.
    """
    if name in METHODS:
        return METHODS[name]
    if name in _ABSENT:
        raise RecipeError(f"method is {name!r}: {_ABSENT[name]}")
    raise RecipeError(f"method is {name!r}, must be one of {', '.join(METHODS)}")
