"""Owns which linear modules of a base a method adapts: presets by layout, names as PEFT matches them.

Presets go by where a module stands, in any architecture: what lies in a block's attention, and of that what
computes queries and values (a fused projection computes both), and the block's other linear modules, its MLP.
Knows no torch.
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Final

from adapters.layout import BaseLayout
from training.errors import RecipeError
from training.recipe import Recipe

_ATTENTION: Final = re.compile(r"\.[^.]*att(?:entio)?n[^.]*\.", re.IGNORECASE)
_BLOCK: Final = re.compile(r"(.*?\.\d+)\.")
_QUERY_OR_VALUE: Final = re.compile(
    r"w?(q|v|kv|qkv)|(q|v|kv|qkv|query|value|query_key_value)(_[ab])?(_proj|_lin|_layer)?|c_attn|in_proj",
    re.IGNORECASE,
)
_KEY_OR_VALUE: Final = re.compile(
    r"w?(k|v|kv|qkv)|(k|v|kv|qkv|key|value|query_key_value)(_[ab])?(_proj|_lin|_layer)?|c_attn|in_proj",
    re.IGNORECASE,
)
_SHOWN: Final = 3


def target_modules(recipe: Recipe, layout: BaseLayout) -> list[str]:
    """Names of the modules to adapt, in order, the shortest that mean exactly them.

    PEFT takes a name for every module that ends with it, and would write the full name of every layer's
    modules for "all-linear".

    Raises:
        RecipeError: a name is no linear module of this base, or the base has none of a preset's.
    """
    if isinstance(recipe.target_modules, tuple):
        for name in recipe.target_modules:
            _check_name(name, layout)
        return list(recipe.target_modules)
    preset = recipe.target_modules or _OWN_PRESETS.get(recipe.method, "all-linear")
    chosen = [name for name in layout.modules if _PRESETS[preset](name, layout)]
    if not chosen:
        raise RecipeError(
            f"target_modules is {preset}, but none of this base's linear modules is one; "
            f"there are {', '.join(_short_names(layout))}"
        )
    return _shortest_names(chosen, layout)


def adapted_modules(names: Collection[str], layout: BaseLayout) -> list[str]:
    """Full name of every linear module that a list of names means, in the base's order."""
    return [module for module in layout.modules if any(_means(name, module) for name in names)]


def feedforward_names(names: Collection[str], layout: BaseLayout) -> list[str]:
    """Those of the names that mean nothing but last layers of an MLP, whose inputs IA³ scales."""
    return [
        name
        for name in names
        if all(_is_mlp_end(module, layout) for module in adapted_modules([name], layout))
    ]


def check_rank(recipe: Recipe, layout: BaseLayout) -> None:
    """Refuses a rank that no update of some module can have.

    Raises:
        RecipeError: names the narrowest module.
    """
    if "rank" not in recipe.kind.settings:
        return
    widths = {
        name: min(layout.modules[name].in_features, layout.modules[name].out_features)
        for name in adapted_modules(target_modules(recipe, layout), layout)
    }
    narrowest = min(widths, key=lambda name: widths[name])
    if recipe.rank > widths[narrowest]:
        shape = layout.modules[narrowest]
        raise RecipeError(
            f"rank is {recipe.rank}, but {narrowest} is {shape.in_features}→{shape.out_features}: no update "
            f"of it has a rank above {widths[narrowest]}; lower rank, or leave it out of target_modules"
        )


def adapter_bytes(recipe: Recipe, layout: BaseLayout) -> int:
    """Bytes of a low-rank adapter's factors as they are saved, in float32."""
    shapes = [layout.modules[name] for name in adapted_modules(target_modules(recipe, layout), layout)]
    return sum(4 * (recipe.saved_rank or 0) * (shape.in_features + shape.out_features) for shape in shapes)


def _is_attention(name: str, layout: BaseLayout) -> bool:
    return name != layout.head and _ATTENTION.search(name) is not None


def _is_query_or_value(name: str, layout: BaseLayout) -> bool:
    return _is_attention(name, layout) and _QUERY_OR_VALUE.fullmatch(_last(name)) is not None


def _is_mlp(name: str, layout: BaseLayout) -> bool:
    return name != layout.head and _BLOCK.match(name) is not None and not _is_attention(name, layout)


def _is_mlp_end(name: str, layout: BaseLayout) -> bool:
    """Whether nothing of its block's MLP comes after it."""
    if not _is_mlp(name, layout):
        return False
    block = f"{_block(name)}."
    return name == [o for o in layout.modules if o.startswith(block) and _is_mlp(o, layout)][-1]


def _is_scaled(name: str, layout: BaseLayout) -> bool:
    """What IA³ scales: keys, values and the inputs of the MLP's last layer."""
    key_or_value = _is_attention(name, layout) and _KEY_OR_VALUE.fullmatch(_last(name)) is not None
    return key_or_value or _is_mlp_end(name, layout)


_PRESETS: Final[Mapping[str, Callable[[str, BaseLayout], bool]]] = MappingProxyType(
    {
        "all-linear": lambda name, layout: name != layout.head,
        "attention": _is_attention,
        "qv": _is_query_or_value,
        "mlp": _is_mlp,
        "scaled": _is_scaled,
    }
)
_OWN_PRESETS: Final[Mapping[str, str]] = MappingProxyType({"ia3": "scaled"})
"""By method, where it is not all-linear."""


def _block(name: str) -> str:
    match = _BLOCK.match(name)
    return match.group(1) if match else ""


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _means(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _shortest_names(chosen: Collection[str], layout: BaseLayout) -> list[str]:
    """The shortest ends of the chosen modules' names that no other module's name has."""
    others = [name for name in layout.modules if name not in set(chosen)]
    found = set()
    for module in chosen:
        parts = module.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        found.add(next(end for end in ends if not any(_means(end, other) for other in others)))
    return sorted(found)


def _check_name(name: str, layout: BaseLayout) -> None:
    if adapted_modules([name], layout):
        return
    known = _short_names(layout)
    close = difflib.get_close_matches(name, [*known, *layout.modules], n=_SHOWN, cutoff=0.5)
    nearest = f"the nearest are {', '.join(close)}; " if close else ""
    raise RecipeError(
        f"target_modules names {name!r}, which is no linear module of this base; {nearest}"
        f"there are {', '.join(known)} (embeddings and norms are trained by method full alone)"
    )


def _short_names(layout: BaseLayout) -> list[str]:
    return sorted({_last(name) for name in layout.modules})
