"""What an adapter can attach to: the linear modules of a base, by name and shape. Knows no weights."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Shape of a linear module: y = W x with W of [out_features, in_features]."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseLayout:
    """Names and shapes of a base's linear modules, and the base's identity.

    Attributes:
        modules: every linear module by its full name in the model, e.g. "model.layers.0.self_attn.q_proj",
            the output head included.
        head: name of the output head, which PEFT's "all-linear" leaves out; None if the model has none.
        fingerprint: "sha256:…" of base weights, configuration and quantisation scheme.
        merged: the adapter that is folded into the base's weights; empty if none is. Adapters must then say
            that they were made for this base, since all others were made for the bare one.
    """

    modules: Mapping[str, ModuleShape]
    head: str | None
    fingerprint: str
    merged: str = ""
