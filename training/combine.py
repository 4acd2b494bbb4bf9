"""Makes one LoRA adapter of several, each with a weight. Knows no server; PEFT does the arithmetic.

linear               B and A are weighted and summed: of adapters of one rank
cat                  B·A is the weighted sum, exactly; ranks add up
svd                  the nearest to that sum of the rank that is asked for
ties, ties_svd       small values are dropped, signs that disagree are settled (Yadav et al. 2023)
dare_linear, …       values are dropped at random and the others scaled up (Yu et al. 2024)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from peft import PeftModel

from adapters.base import Base, load_base
from adapters.bundle import read_bundle
from adapters.cache import publish_folder
from adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from adapters.files import BUNDLE_FILE, CARD_FILE
from adapters.fold import checked_bundle
from adapters.quantize import Quantization
from adapters.unserved_folder import unserved_kind
from adapters.validate import validate_adapter
from training.provenance import manifest_of
from training.saving import save_with_peft

Combination = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"
]
COMBINATIONS: Final = get_args(Combination)
_COMBINED: Final = "default"  # which PEFT saves into the folder itself
_MAX_RANK: Final = 1024


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What was made.

    Attributes:
        rank: the largest of its modules.
    """

    folder: Path
    digest: str
    base: str
    base_fingerprint: str
    combination: Combination
    weights: Mapping[str, float]
    rank: int


def combine_adapters(
    base_source: str,
    adapters: Sequence[tuple[Path, float]],
    out_dir: Path,
    *,
    combination: Combination = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    quantization: Quantization = "nf4",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> CombineReport:
    """Writes an adapter of its own; the others stay as they are.

    Args:
        adapters: folders of LoRA adapters of this base, each with its weight.
        rank: of the result, for the combinations that end in svd; None for the largest of theirs.
        density: part of the values that ties and dare keep; they need it.
        seed: of what dare drops.

    Raises:
        AdapterError: an adapter is no LoRA, is another base's, or they cannot be combined like this.
        BaseModelError: the base cannot be read.
        FileExistsError: out_dir exists.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another --out")
    _check(adapters, combination, density)
    base = load_base(
        base_source, purpose="train", quantization=quantization, dtype="float32", cache_dir=cache_dir,
        progress=progress,
    )  # fmt: skip
    for folder, _ in adapters:
        _check_adapter(folder, base)
    torch.manual_seed(seed)
    model = _combined(base, adapters, combination, rank, density)
    digests: list[str] = []

    def write(folder: Path) -> None:
        save_with_peft(model, base, folder)
        (folder / BUNDLE_FILE).write_text(_manifest(base, adapters))
        digests.append(validate_adapter(folder, base.layout, max_rank=_MAX_RANK).digest)

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    publish_folder(out_dir, write)
    return CombineReport(
        folder=out_dir,
        digest=digests[0],
        base=base.name,
        base_fingerprint=base.fingerprint,
        combination=combination,
        weights={str(folder): weight for folder, weight in adapters},
        rank=model.peft_config[_COMBINED].r,
    )


def _check(adapters: Sequence[tuple[Path, float]], combination: Combination, density: float | None) -> None:
    if len(adapters) < 2:
        raise InvalidAdapterError("one adapter is nothing to combine; give two or more")
    if combination.startswith(("ties", "dare")) != (density is not None):
        raise InvalidAdapterError(
            "density is what ties and dare keep: give it with these, as 0.5, and with no other combination"
        )
    if density is not None and not 0 < density <= 1:
        raise InvalidAdapterError(f"density is {density}, must be above 0, to 1")


def _check_adapter(folder: Path, base: Base) -> None:
    kind = unserved_kind(folder)
    if kind is not None:
        raise UnsupportedAdapterError(
            f"{folder} is of kind {kind}, and LoRA adapters alone can be combined", feature=kind
        )
    checked_bundle(folder, base)
    validate_adapter(folder, base.layout, max_rank=_MAX_RANK, beside=(CARD_FILE,))


def _combined(
    base: Base,
    adapters: Sequence[tuple[Path, float]],
    combination: Combination,
    rank: int | None,
    density: float | None,
) -> Any:
    names = [f"adapter-{place}" for place in range(len(adapters))]
    model = PeftModel.from_pretrained(base.model, str(adapters[0][0]), adapter_name=names[0])
    for name, (folder, _) in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    try:
        model.add_weighted_adapter(
            names,
            [weight for _, weight in adapters],
            _COMBINED,
            combination_type=combination,
            svd_rank=rank,
            density=density,
        )
    except ValueError as error:
        raise InvalidAdapterError(f"these cannot be combined by {combination}: {error}") from error
    model.set_adapter(_COMBINED)
    return model


def _manifest(base: Base, adapters: Sequence[tuple[Path, float]]) -> str:
    """With the chat template that all of them have; the base's own if they differ."""
    bundles = [read_bundle(folder) for folder, _ in adapters]
    templates = {bundle.chat_template for bundle in bundles if bundle is not None}
    ours = manifest_of(base)
    (template,) = templates if len(templates) == 1 else (ours.chat_template,)
    return replace(ours, chat_template=template).to_json()
