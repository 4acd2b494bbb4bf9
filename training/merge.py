"""Takes an adapter out of the server: folds it into its base and saves a plain model folder. Knows no server.

The adapter was trained against the NF4 base, so it is folded into exactly those weights, dequantised: in
float32, rounded once. It may also be folded into the source's own weights, and their sum quantised as the
base was: both lose what training corrected, and are labelled. (Quantised again, the base as the adapter knows
it would lose the adapter: it lies on the grid, and most of an update is smaller than half a step.)

Weights are read, quantised, summed and written some rows at a time (adapters/fold.py has the sum):
neither base nor model is ever in memory. Where transformers makes a model's weights of several of the
source's tensors, the whole base is. A base being served is never touched.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, cast, get_args

import torch
from torch import Tensor

from adapters.base import Base
from adapters.cache import publish_folder
from adapters.errors import BaseModelError
from adapters.fold import (
    Folding,
    Target,
    base_to_fold_into,
    checked_bundle,
    fold_in_place,
    folded_blocks,
    open_folding,
)
from adapters.model_folder import overflow, save_all_but_weights, save_model
from adapters.quantize import Quantization, Scheme
from adapters.skeleton import ScatteredError, Skeleton, skeleton_of
from training.shards import stored_names, write_shards
from training.versions import installed_versions

MERGE_FILE = "merge.json"
SHARD_BYTES: Final = 2_000_000_000

log = logging.getLogger(__name__)


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
    shard_bytes: int = SHARD_BYTES,
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
        shard_bytes: what a file of weights holds at most.

    Raises:
        AdapterError, BaseModelError: the adapter or the base cannot be read, or do not fit each other.
        FileExistsError: out_dir exists.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another --out")
    scheme = Scheme(quantization, double_quantization)
    _check(scheme, into)
    try:
        skeleton = skeleton_of(base_source, scheme, cache_dir=cache_dir, progress=progress)
        base = skeleton.base
    except ScatteredError as scattered:
        log.warning("%s; the whole base is read into memory, in float32", scattered)
        skeleton, base = None, merge_base(base_source, scheme, into, cache_dir=cache_dir, progress=progress)
    folding = open_folding(base, adapter_dir)
    bundle = checked_bundle(adapter_dir, base)
    template = None if bundle is None else bundle.chat_template

    def fill(staged: Path) -> None:
        if skeleton is None:
            fold_in_place(base, folding, into)
            save_model(staged, base, base.model, dtype=dtype, chat_template=template, shard_bytes=shard_bytes)
        else:
            save_all_but_weights(staged, base, base.model, dtype=dtype, chat_template=template)
            _write_weights(staged, skeleton, folding, into, shard_bytes, progress)
        (staged / MERGE_FILE).write_text(json.dumps(_facts(report()), indent=2) + "\n")

    def report() -> MergeReport:
        return MergeReport(
            folder=out_dir,
            base=base.name,
            base_fingerprint=base.fingerprint,
            adapter_digest=folding.digest,
            into=into,
            dtype=dtype,
            modules=folding.modules,
            delta_norm=folding.delta_norm,
        )

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    publish_folder(out_dir, fill)
    return report()


def merge_base(
    source: str, scheme: Scheme, into: Target, *, cache_dir: Path | None = None, progress: bool = True
) -> Base:
    """What an adapter is folded into, in float32; fingerprint and scheme are of the base it was trained on.

    Raises:
        BaseModelError: it cannot be read, or has no 4-bit weights that could be quantised again.
    """
    _check(scheme, into)
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


def _check(scheme: Scheme, into: Target) -> None:
    if into == "requantized" and not scheme.is_4bit:
        raise BaseModelError(
            f"a base in {scheme.name} has no 4-bit weights to quantise again; merge into dequantized"
        )


def _write_weights(
    folder: Path, skeleton: Skeleton, folding: Folding, into: Target, shard_bytes: int, progress: bool
) -> None:
    """One weight after another, in the type that the skeleton's model has by now."""
    from tqdm import tqdm

    model = skeleton.base.model
    names = stored_names(model)
    state = model.state_dict()
    with tqdm(total=len(names), desc="merge", unit="weight", disable=not progress) as bar:

        def blocks(stored: str) -> Iterator[Tensor]:
            name = names[stored]
            before = skeleton.blocks(name, dequantized=into == "dequantized")
            for block in folded_blocks(skeleton.base, folding, into, name, before):
                rounded = (block.T if skeleton.is_transposed(name) else block).to(state[name].dtype)
                if not torch.isfinite(rounded).all():
                    raise overflow(name, state[name].dtype)
                yield rounded
            bar.update()

        tensors = {stored: state[name] for stored, name in names.items()}
        write_shards(folder, tensors, blocks, shard_bytes=shard_bytes, parameters=model.num_parameters())


def _facts(report: MergeReport) -> dict[str, object]:
    """The report without its path, which means nothing on another machine, and the versions that made it."""
    made_of = {name: value for name, value in asdict(report).items() if name != "folder"}
    return {"format": 1} | made_of | {"versions": installed_versions()}
