"""Takes an adapter out of the server: folds it into its base and saves a plain model folder. Knows no server.

The adapter was trained against the NF4 base, so it is folded into exactly those weights, dequantised: in
float32, rounded once. It may also be folded into the source's own weights, and their sum quantised as the
base was: both lose what training corrected, and are labelled. (Quantised again, the base as the adapter knows
it would lose the adapter: it lies on the grid, and most of an update is smaller than half a step.) The
model is a private copy; a base being served is never touched. The arithmetic is in adapters/fold.py.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from adapters.base import Base
from adapters.bundle import Bundle
from adapters.cache import publish_folder
from adapters.errors import BaseModelError
from adapters.fold import base_to_fold_into, checked_bundle, fold_folder, oriented
from adapters.model_folder import save_model
from adapters.quantize import Quantization, Scheme, requantized
from adapters.unserved import Folded
from training.versions import installed_versions

MERGE_FILE = "merge.json"

Target = Literal["dequantized", "requantized", "original"]
"""What the sum is of: the base as the adapter knows it; the source's own weights, quantised or not."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merged model was made of; saved beside it as merge.json.

    Attributes:
        into: what the adapter was folded into.
        modules: how many linear layers changed.
        delta_norm: Frobenius norm of all that was added.
    """

    folder: Path
    base: str
    base_fingerprint: str
    adapter_digest: str
    into: Target
    dtype: str
    modules: int
    delta_norm: float


def merge_adapter(
    base_source: str,
    adapter_dir: Path,
    out_dir: Path,
    *,
    quantization: Quantization = "nf4",
    double_quantization: bool = True,
    into: Target = "dequantized",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> MergeReport:
    """Writes base + adapter as an ordinary model folder, which needs neither PEFT nor this project.

    Args:
        base_source: as for `adapters.base.load_base`.
        adapter_dir: a PEFT folder of LoRA, DoRA or IA³, or one of biases.
        out_dir: must not exist yet; appears complete or not at all.
        quantization, double_quantization: of the base that the adapter was trained on.
        into: "dequantized" is the live adapter; "requantized", of 4-bit bases, and "original" are not.
        dtype: what the float32 sum is rounded to.

    Raises:
        AdapterError, BaseModelError: the adapter or the base cannot be read, or do not fit each other.
        FileExistsError: out_dir exists.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another --out")
    base = merge_base(
        base_source,
        Scheme(quantization, double_quantization),
        into,
        cache_dir=cache_dir,
        progress=progress,
    )
    folded = fold_adapter(base, adapter_dir, into)
    report = MergeReport(
        folder=out_dir,
        base=base.name,
        base_fingerprint=base.fingerprint,
        adapter_digest=folded.digest,
        into=into,
        dtype=dtype,
        modules=folded.modules,
        delta_norm=folded.delta_norm,
    )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    bundle = checked_bundle(adapter_dir, base)
    publish_folder(out_dir, lambda staged: _save(staged, base, bundle, report))
    return report


def merge_base(
    source: str, scheme: Scheme, into: Target, *, cache_dir: Path | None = None, progress: bool = True
) -> Base:
    """What an adapter is folded into, in float32; fingerprint and scheme are of the base it was trained on.

    Raises:
        BaseModelError: it cannot be read, or has no 4-bit weights that could be quantised again.
    """
    if into == "requantized" and not scheme.is_4bit:
        raise BaseModelError(
            f"a base in {scheme.name} has no 4-bit weights to quantise again; merge into dequantized"
        )
    return base_to_fold_into(
        source, scheme, as_source=into != "dequantized", cache_dir=cache_dir, progress=progress
    )


def target_of(merged: Path) -> Target:
    """What a merged folder says the adapter was folded into.

    Raises:
        BaseModelError: it says something else.
    """
    path = merged / MERGE_FILE
    try:
        into = json.loads(path.read_text(encoding="utf-8"))["into"] if path.exists() else "dequantized"
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BaseModelError(f"{path} cannot be read ({error}); merge again") from error
    if into not in get_args(Target):
        raise BaseModelError(
            f"{path} says into {into!r}, not one of {', '.join(get_args(Target))}; merge again"
        )
    return cast(Target, into)


def fold_adapter(base: Base, folder: Path, into: Target) -> Folded:
    """Folds an adapter of any kind that can be into a `merge_base`'s float32 weights, in place.

    Raises:
        AdapterError: it is malformed, cannot be folded, or does not fit the base.
    """
    folded = fold_folder(base, folder)
    if into == "requantized":
        _quantize_again(base)
    return folded


@torch.no_grad()
def _quantize_again(base: Base) -> None:
    """Every layer that is quantised in the base; the head is not."""
    for name in base.layout.modules:
        if name != base.layout.head:
            layer = base.model.get_submodule(name)
            layer.weight.copy_(oriented(requantized(oriented(layer.weight, layer), base.scheme), layer))


def _save(folder: Path, base: Base, bundle: Bundle | None, report: MergeReport) -> None:
    template = None if bundle is None else bundle.chat_template
    save_model(folder, base, base.model, dtype=report.dtype, chat_template=template)
    (folder / MERGE_FILE).write_text(json.dumps(_facts(report), indent=2) + "\n")


def _facts(report: MergeReport) -> dict[str, object]:
    """The report without its path, which means nothing on another machine, and the versions that made it."""
    made_of = {name: value for name, value in asdict(report).items() if name != "folder"}
    return {"format": 1} | made_of | {"versions": installed_versions()}
