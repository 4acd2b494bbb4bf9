"""Folds an adapter of any kind that can be into a base's float32 weights. Knows no server and no training.

LoRA and rsLoRA, which servers apply as well, are folded here, DoRA, IA³ and biases by adapters/unserved.py.

R rank, D in-features, O out-features.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.base import Base, dequantized_base
from adapters.bundle import Bundle, read_bundle
from adapters.errors import WrongBaseError
from adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_bounded
from adapters.measures import in_digest_order, measure
from adapters.model_folder import untie
from adapters.quantize import Scheme
from adapters.spec import MAX_CONFIG_BYTES, parse_spec
from adapters.unserved import Folded, fold_unserved
from adapters.weights import LoraPair, load_pairs


def base_to_fold_into(
    source: str, scheme: Scheme, *, as_source: bool, cache_dir: Path | None = None, progress: bool = True
) -> Base:
    """A base in float32, in transformers' own layers; fingerprint and scheme are of the one trained on.

    Args:
        as_source: whether its weights are the source's own, and not what their quantisation left of them.

    Raises:
        BaseModelError: it cannot be read.
    """
    base = dequantized_base(
        source,
        quantization=scheme.quantization,
        double_quantization=scheme.double,
        cache_dir=cache_dir,
        progress=progress,
    )
    if not as_source:
        return base
    original = dequantized_base(source, quantization="none", cache_dir=cache_dir, progress=progress)
    return replace(base, model=original.model)


def checked_bundle(folder: Path, base: Base) -> Bundle | None:
    """An adapter's manifest; None if it has none.

    Raises:
        WrongBaseError: it says that the adapter was trained on another base, or another quantisation of it.
        AdapterError: it cannot be read.
    """
    bundle = read_bundle(folder)
    if bundle is not None and bundle.base_fingerprint != base.fingerprint:
        raise WrongBaseError(
            f"{folder} was trained on base {bundle.base_fingerprint}; {base.name} as {base.scheme.name} is "
            f"{base.fingerprint}; give the base and quantisation it was trained on"
        )
    return bundle


def fold_folder(base: Base, folder: Path) -> Folded:
    """Folds an adapter folder into base.model, in place.

    Args:
        base: dequantised, its model in transformers' own float32 layers.

    Raises:
        AdapterError: it is malformed, cannot be folded, or does not fit the base.
    """
    bundle = checked_bundle(folder, base)
    return fold_unserved(base, folder) or _fold_served(base, folder, bundle)


def _fold_served(base: Base, folder: Path, bundle: Bundle | None) -> Folded:
    """What servers apply, read as they read it."""
    spec = parse_spec(read_bounded(folder / CONFIG_FILE, MAX_CONFIG_BYTES))
    pairs = load_pairs(folder / WEIGHTS_FILE, spec, base.layout)
    scalings = {module: scaling for module, (_, scaling) in spec.ranks_and_scalings(base.layout).items()}
    measures = measure(spec, bundle, scalings, ((name, pairs[name]) for name in in_digest_order(pairs)))
    _fold(base, pairs, scalings)
    return Folded(measures.digest, len(pairs), measures.delta_norm)


@torch.no_grad()
def _fold(base: Base, pairs: Mapping[str, LoraPair], scalings: Mapping[str, float]) -> None:
    """Adds every update to its layer's float32 weight, in place: W += scaling · B @ A.

    In float64, where products of stored factors are exact, and rounded once. So the order of summation, which
    depends on processor and threads, hardly ever shows, and the sum has one fingerprint.
    """
    for name, pair in pairs.items():
        layer = base.model.get_submodule(name)
        if name == base.layout.head:
            untie(base.model, layer)
        delta_OD = (pair.b_OR.double() @ pair.a_RD.double()).mul_(scalings[name])
        layer.weight.copy_(oriented(delta_OD, layer).add_(layer.weight))


def oriented(weight: Tensor, layer: nn.Module) -> Tensor:
    """Between [O, D] and what the layer keeps."""
    return weight.T if isinstance(layer, Conv1D) else weight
