"""Takes an adapter out of the server: folds it into its base and saves a plain model folder. Knows no server.

The adapter was trained against the NF4 base, so it is folded into exactly those weights, dequantised: in
float32, rounded once. (Requantising the sum and adding to the original 16-bit weights both lose what training
corrected.) The model is a private copy; a base being served is never touched.

R rank, D in-features, O out-features.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from adapters.base import Base, Quantization, dequantized_base
from adapters.bundle import Bundle, read_bundle
from adapters.cache import publish_folder
from adapters.errors import InvalidAdapterError, WrongBaseError
from adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_bounded
from adapters.measures import in_digest_order, measure
from adapters.quantize import progress_bars
from adapters.spec import MAX_CONFIG_BYTES, AdapterSpec, parse_spec
from adapters.weights import LoraPair, load_pairs

MERGE_FILE = "merge.json"
_GENERATION_FILE = "generation_config.json"
_PACKAGES = ("quickchange", "torch", "transformers", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merged model was made of; saved beside it as merge.json.

    Attributes:
        modules: how many linear layers changed.
        delta_norm: Frobenius norm of all that was added.
    """

    folder: Path
    base: str
    base_fingerprint: str
    adapter_digest: str
    dtype: str
    modules: int
    delta_norm: float


def merge_adapter(
    base_source: str,
    adapter_dir: Path,
    out_dir: Path,
    *,
    quantization: Quantization = "nf4",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> MergeReport:
    """Writes base + adapter as an ordinary model folder, which needs neither PEFT nor this project.

    Args:
        base_source: as for `adapters.base.load_base`.
        adapter_dir: a PEFT LoRA folder.
        out_dir: must not exist yet; appears complete or not at all.
        quantization: of the base that the adapter was trained on.
        dtype: what the float32 sum is rounded to.

    Raises:
        AdapterError, BaseModelError: the adapter or the base cannot be read, or do not fit each other.
        FileExistsError: out_dir exists.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another --out")
    base = dequantized_base(base_source, quantization=quantization, cache_dir=cache_dir, progress=progress)
    spec, bundle, pairs = _read_adapter(adapter_dir, base)
    scalings = {module: scaling for module, (_, scaling) in spec.ranks_and_scalings(base.layout).items()}
    measures = measure(spec, bundle, scalings, ((name, pairs[name]) for name in in_digest_order(pairs)))
    report = MergeReport(
        folder=out_dir,
        base=base.name,
        base_fingerprint=base.fingerprint,
        adapter_digest=measures.digest,
        dtype=dtype,
        modules=len(pairs),
        delta_norm=measures.delta_norm,
    )
    fold(base, pairs, scalings)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    publish_folder(out_dir, lambda staged: _save(staged, base, bundle, report))
    return report


@torch.no_grad()
def fold(base: Base, pairs: Mapping[str, LoraPair], scalings: Mapping[str, float]) -> None:
    """Adds every update to its layer's float32 weight, in place: W += scaling · B @ A."""
    for name, pair in pairs.items():
        layer = base.model.get_submodule(name)
        if name == base.layout.head:
            _untie(base.model, layer)
        delta_OD = (pair.b_OR.float() @ pair.a_RD.float()) * scalings[name]
        layer.weight += _oriented(delta_OD, layer)


def _read_adapter(folder: Path, base: Base) -> tuple[AdapterSpec, Bundle | None, Mapping[str, LoraPair]]:
    spec = parse_spec(read_bounded(folder / CONFIG_FILE, MAX_CONFIG_BYTES))
    bundle = read_bundle(folder)
    if bundle is not None and bundle.base_fingerprint != base.fingerprint:
        raise WrongBaseError(
            f"{folder} was trained on base {bundle.base_fingerprint}; {base.name} as {base.quantization} is "
            f"{base.fingerprint}; give the base and quantisation it was trained on"
        )
    return spec, bundle, load_pairs(folder / WEIGHTS_FILE, spec, base.layout)


def _oriented(delta_OD: Tensor, layer: nn.Module) -> Tensor:
    return delta_OD.T if isinstance(layer, Conv1D) else delta_OD


def _untie(model: Any, head: nn.Module) -> None:
    """Gives the head a weight of its own: live, an adapter on the head does not change the embedding."""
    embedding = model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _save(folder: Path, base: Base, bundle: Bundle | None, report: MergeReport) -> None:
    base.model.to(getattr(torch, report.dtype))
    for name, parameter in base.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InvalidAdapterError(f"{name} overflows {report.dtype} after the merge; merge to float32")
    base.model.config.dtype = report.dtype
    if bundle is not None and bundle.chat_template is not None:
        base.tokenizer.chat_template = bundle.chat_template
    base.tokenizer.save_pretrained(folder)
    original = base.folder / _GENERATION_FILE
    if original.is_file():  # copied: save_pretrained refuses many that are published and work
        base.model.generation_config = GenerationConfig()
    with progress_bars(False):
        base.model.save_pretrained(folder)
    if original.is_file():
        shutil.copyfile(original, folder / _GENERATION_FILE)
    (folder / MERGE_FILE).write_text(json.dumps(_facts(report), indent=2) + "\n")


def _facts(report: MergeReport) -> dict[str, object]:
    """The report without its path, which means nothing on another machine, and the versions that made it."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    made_of = {name: value for name, value in asdict(report).items() if name != "folder"}
    return {"format": 1} | made_of | {"versions": versions}
