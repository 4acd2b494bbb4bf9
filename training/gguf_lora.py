"""Writes a LoRA adapter as a GGUF file, as llama.cpp applies one beside its base. Knows no base's weights.

llama.cpp adds alpha / r · B @ A, with one alpha for the file and the r of each pair. What an adapter scales
in another way (rsLoRA, patterns) goes into its B, so that the update is the same.

R rank, D in-features, O out-features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from adapters.base import layout_of
from adapters.bundle import read_bundle
from adapters.cache import default_cache_dir
from adapters.errors import UnsupportedAdapterError, WrongBaseError
from adapters.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, read_bounded
from adapters.fingerprint import fingerprint_of
from adapters.layout import BaseLayout
from adapters.quantize import Scheme
from adapters.sources import Source, resolve_source
from adapters.spec import MAX_CONFIG_BYTES, AdapterSpec, parse_spec
from adapters.support import supported_config
from adapters.unserved_folder import unserved_kind
from adapters.validate import validate_adapter
from adapters.weights import LoraPair, load_pairs
from training.gguf_architecture import GgufArchitecture
from training.gguf_file import GgufTensor, GgufType, write_gguf

_MAX_RANK: Final = 1024
_SCHEMES: Final = (
    Scheme("nf4"), Scheme("none"), Scheme("nf4", False), Scheme("fp4"), Scheme("fp4", False), Scheme("int8"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufLoraReport:
    """What was written.

    Attributes:
        digest: the adapter's.
        architecture: llama.cpp's name.
        type: of the factors.
        trained_on: how the base was quantised that it was trained on; None if the adapter does not say.
    """

    file: Path
    digest: str
    architecture: str
    type: GgufType
    modules: int
    trained_on: str | None
    size_bytes: int


def export_gguf_lora(
    adapter_dir: Path,
    base_source: str,
    out: Path,
    *,
    to: GgufType = "f32",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> GgufLoraReport:
    """Writes one GGUF file that `llama-cli --lora` and others take beside a GGUF file of the base.

    Args:
        adapter_dir: a folder of LoRA or rsLoRA.
        base_source: what it was trained on, as for `adapters.base.load_base`; its weights are read only to
            see that it is.
        out: must not exist yet; appears complete or not at all.

    Raises:
        AdapterError: it is no LoRA, malformed, another base's, or changes what llama.cpp cannot.
        BaseModelError: the base cannot be read, or is none that GGUF files are written of.
        FileExistsError: out exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; remove it or choose another --out")
    kind = unserved_kind(adapter_dir)
    if kind is not None:
        raise UnsupportedAdapterError(
            f"{adapter_dir} is of kind {kind}, and llama.cpp applies LoRA alone; `quickchange merge` it, "
            "if it has weights to go into, and export the model",
            feature=kind,
        )
    cache = cache_dir or default_cache_dir()
    base = resolve_source(base_source, cache, progress=progress)
    scheme = _trained_on(adapter_dir, base, cache)
    config = supported_config(base.folder)
    architecture = GgufArchitecture(config)
    layout = _layout(config, fingerprint_of(base.folder, (scheme or _SCHEMES[0]).name, cache))
    facts = validate_adapter(adapter_dir, layout, max_rank=_MAX_RANK, beside=(CARD_FILE,))
    spec = parse_spec(read_bounded(adapter_dir / CONFIG_FILE, MAX_CONFIG_BYTES))
    _check_head(spec, layout, tied=config.tie_word_embeddings)
    pairs = load_pairs(adapter_dir / WEIGHTS_FILE, spec, layout)
    tensors = [
        tensor
        for module, pair in pairs.items()
        for tensor in _tensors(architecture, module, _rescaled(pair, spec.alpha, spec.scaling_of(module)))
    ]

    def describe(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_name(adapter_dir.resolve().name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", spec.alpha)

    write_gguf(out, architecture.name, tensors, describe, to=to, progress=progress)
    return GgufLoraReport(
        file=out,
        digest=facts.digest,
        architecture=architecture.name,
        type=to,
        modules=len(pairs),
        trained_on=None if scheme is None else scheme.name,
        size_bytes=out.stat().st_size,
    )


def _trained_on(adapter_dir: Path, base: Source, cache: Path) -> Scheme | None:
    """As the adapter's manifest has it; None without one."""
    bundle = read_bundle(adapter_dir)
    if bundle is None:
        return None
    for scheme in _SCHEMES:
        if fingerprint_of(base.folder, scheme.name, cache) == bundle.base_fingerprint:
            return scheme
    raise WrongBaseError(
        f"{adapter_dir} was trained on base {bundle.base_fingerprint}, which {base.name} is in no "
        "quantisation; give the base it was trained on"
    )


def _layout(config: Any, fingerprint: str) -> BaseLayout:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return layout_of(model, fingerprint)


def _check_head(spec: AdapterSpec, layout: BaseLayout, *, tied: bool) -> None:
    if tied and layout.head in spec.targets(layout):
        raise UnsupportedAdapterError(
            f"it adapts {layout.head}, which is the embedding in this base, and llama.cpp has no head of its "
            "own to adapt there; `quickchange merge` it and export the model",
            feature="lm_head",
        )


def _rescaled(pair: LoraPair, alpha: float, scaling: float) -> LoraPair:
    """So that alpha / R · B @ A is scaling · B @ A; as stored where it is that already."""
    factor = scaling * pair.a_RD.shape[0] / alpha
    return pair if factor == 1 else LoraPair(pair.a_RD, pair.b_OR.float() * factor)


def _tensors(architecture: GgufArchitecture, module: str, pair: LoraPair) -> Iterator[GgufTensor]:
    name = f"{architecture.name_of(module)}.weight"
    yield GgufTensor.of(f"{name}.lora_a", pair.a_RD)
    yield GgufTensor.of(f"{name}.lora_b", architecture.ordered(module, pair.b_OR))
