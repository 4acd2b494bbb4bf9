"""Writes an adapter folder for others: PEFT of any recent version, vLLM. Knows no base and no weights of one.

adapter_config.json      what differs from PEFT's defaults; fields that a version does not know would stop it
adapter_model.safetensors
chat_template.jinja      the adapter's own, if it has one
README.md                the adapter's own card, or one made here

quickchange.json stays behind unless it is asked for: nobody else reads it, and its canary holds prompts of
the training data. For vLLM, which takes one rank and one scaling for all modules and no patterns, ranks are
filled up with zeros and scalings go into B, so that every update stays what it is.

R rank, D in-features, O out-features.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from adapters.bundle import read_bundle
from adapters.cache import publish_folder
from adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from adapters.files import BUNDLE_FILE, CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, read_bounded
from adapters.model_folder import writing
from adapters.spec import MAX_CONFIG_BYTES, AdapterSpec, parse_spec
from adapters.strict_json import parse_object
from adapters.unserved_folder import unserved_kind
from adapters.weights import LoraPair, TensorInfo, read_header, read_pairs, tensor_name
from training.document import Block, Code, Document, Heading, Paragraph
from training.export_card import card

Reader = Literal["peft", "vllm"]

TEMPLATE_FILE: Final = "chat_template.jinja"
_VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What its --max-lora-rank may be."""
_BY_PATTERN: Final = frozenset(
    {"alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "rank_pattern"}
)
"""Fields that choose modules or set them apart; vLLM reads none of them."""
_ALWAYS: Final = ("bias", "lora_alpha", "peft_type", "r", "target_modules", "task_type", "use_rslora")


@dataclass(frozen=True, slots=True)
class AdapterExport:
    """What was written.

    Attributes:
        rank: the largest; None of what has no rank.
        rewritten: whether factors are stored otherwise than before; the updates are the same.
        serve: the command that serves it with vLLM; None if it was not written for that.
    """

    folder: Path
    reader: Reader
    rank: int | None
    rewritten: bool
    serve: str | None


def export_adapter(
    adapter_dir: Path,
    out_dir: Path,
    *,
    reader: Reader = "peft",
    base_name: str | None = None,
    with_manifest: bool = False,
    licence: str | None = None,
) -> AdapterExport:
    """Writes the adapter as others load it.

    Args:
        adapter_dir: LoRA or rsLoRA; for PEFT also DoRA, IA³, prefix and prompt tuning.
        out_dir: must not exist yet; appears complete or not at all.
        base_name: what others call the base, such as its hub id; None for what the adapter says.
        with_manifest: whether quickchange.json goes along, canary included.
        licence: for the card, if one is made.

    Raises:
        AdapterError: it is malformed, or of a kind that the reader does not take.
        FileExistsError: out_dir exists.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another --out")
    adapter = _read(adapter_dir, reader, base_name)
    serve = None if reader != "vllm" else _serve(adapter, out_dir)

    def write(folder: Path) -> None:
        (folder / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
        if adapter.tensors is None:
            shutil.copyfile(adapter_dir / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        else:
            with writing(WEIGHTS_FILE):
                save_file(dict(adapter.tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        _write_beside(adapter_dir, folder, with_manifest=with_manifest)
        if not (folder / CARD_FILE).exists():
            text = _card(out_dir.name, adapter.config, licence, serve)
            (folder / CARD_FILE).write_text(text, encoding="utf-8")

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    publish_folder(out_dir, write)
    return AdapterExport(out_dir, reader, adapter.rank, adapter.tensors is not None, serve)


@dataclass(frozen=True, slots=True)
class _Adapter:
    """As it is to be written.

    Attributes:
        rank: the largest; None of what has no rank.
        tensors: None if the file stays as it is.
    """

    config: Mapping[str, Any]
    rank: int | None = None
    tensors: Mapping[str, Tensor] | None = None


def _read(folder: Path, reader: Reader, base_name: str | None) -> _Adapter:
    kind = unserved_kind(folder)
    if kind == "biases" or (reader == "vllm" and kind is not None):
        raise UnsupportedAdapterError(
            f"{folder} is of kind {kind}, which {'PEFT' if kind == 'biases' else 'vLLM'} does not load; "
            "`quickchange merge` it, if it has weights to go into, and export the model",
            feature=kind,
        )
    raw = read_bounded(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    config = parse_object(raw, source=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)
    config["base_model_name_or_path"] = base_name or config.get("base_model_name_or_path")
    header = read_header(folder / WEIGHTS_FILE)
    if config["peft_type"] == "LORA":
        config = _plain_config(config)
    if kind is not None:
        return _Adapter(config)
    spec = parse_spec(raw)
    modules = _modules(spec, header)
    if reader == "vllm":
        return _uniform(spec, config, folder, header, modules)
    return _Adapter(config, max(spec.rank_of(module) for module in modules))


def _modules(spec: AdapterSpec, header: Mapping[str, TensorInfo]) -> list[str]:
    """Of the tensors in the file, in their order; exactly two of each, of the rank that it should have.

    Raises:
        InvalidAdapterError: it is otherwise.
    """
    start, end = tensor_name("\0", "A").split("\0")
    modules = [
        name[len(start) : -len(end)] for name in header if name.startswith(start) and name.endswith(end)
    ]
    expected = {tensor_name(module, factor) for module in modules for factor in "AB"}
    odd = sorted(expected.symmetric_difference(header))
    if odd or not modules:
        raise InvalidAdapterError(
            f"{odd[0] if odd else 'every tensor'} in {WEIGHTS_FILE} is missing or is none of LoRA's; save "
            "the adapter again",
            reason="UNKNOWN_TENSOR",
        )
    for module in modules:
        rank = spec.rank_of(module)
        found = header[tensor_name(module, "A")].shape[0], header[tensor_name(module, "B")].shape[-1]
        if found != (rank, rank):
            raise InvalidAdapterError(
                f"{module} has factors of rank {found[0]} and {found[1]}, its configuration says {rank}",
                reason="SHAPE_MISMATCH",
            )
    return modules


# For vLLM


def _uniform(
    spec: AdapterSpec,
    config: Mapping[str, Any],
    folder: Path,
    header: Mapping[str, TensorInfo],
    modules: Sequence[str],
) -> _Adapter:
    """With one rank and one scaling for all modules, each of them named."""
    rank = max(spec.rank_of(module) for module in modules)
    if rank > _VLLM_RANKS[-1]:
        raise UnsupportedAdapterError(
            f"{folder} has rank {rank}, vLLM takes {_VLLM_RANKS[-1]} at most; `quickchange merge` it",
            feature="r",
        )
    named = {name: value for name, value in config.items() if name not in _BY_PATTERN}
    named["target_modules"] = sorted(modules)
    if not spec.rank_pattern and not spec.alpha_pattern:
        return _Adapter(named, rank)
    scaling = spec.alpha / rank
    tensors: dict[str, Tensor] = {}
    for module, pair in read_pairs(folder / WEIGHTS_FILE, header, modules):
        wide = _widened(pair, rank, spec.scaling_of(module) / scaling)
        tensors |= {tensor_name(module, "A"): wide.a_RD, tensor_name(module, "B"): wide.b_OR}
    return _Adapter({**named, "r": rank, "use_rslora": False}, rank, tensors)


def _widened(pair: LoraPair, rank: int, factor: float) -> LoraPair:
    """With rows and columns of zeros up to the rank; the product is multiplied by the factor."""
    more = rank - pair.a_RD.shape[0]
    scaled = pair.b_OR if factor == 1 else pair.b_OR.float() * factor
    return LoraPair(
        torch.nn.functional.pad(pair.a_RD, (0, 0, 0, more)).contiguous(),
        torch.nn.functional.pad(scaled, (0, more)).contiguous(),
    )


def _serve(adapter: _Adapter, out_dir: Path) -> str:
    room = next(each for each in _VLLM_RANKS if each >= (adapter.rank or 0))
    base = adapter.config.get("base_model_name_or_path") or "BASE"
    return f"vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules {out_dir.name}={out_dir}"


# Files


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is PEFT's default."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(LoraConfig)
    }
    return {
        name: value
        for name, value in config.items()
        if name in _ALWAYS or (value is not None and defaults.get(name) != value)
    }


def _write_beside(source: Path, folder: Path, *, with_manifest: bool) -> None:
    bundle = read_bundle(source)
    if bundle is not None and bundle.chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(bundle.chat_template, encoding="utf-8")
    copied = [CARD_FILE, *([BUNDLE_FILE] if with_manifest else [])]
    for name in copied:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _card(name: str, config: Mapping[str, Any], licence: str | None, serve: str | None) -> str:
    base = str(config.get("base_model_name_or_path") or "the base")
    peft = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(base, {name!r})\n"
    )
    what = f"An adapter for {base}, of type {config.get('peft_type')}."
    blocks: list[Block] = [
        Paragraph(what),
        Heading("How to use it"),
        Paragraph("With PEFT:"),
        Code(peft, "python"),
    ]
    if serve is not None:
        blocks += [Paragraph("With vLLM:"), Code(f"$ {serve}\n", "console")]
    return card(Document(name, blocks), base=base, library="peft", licence=licence, tags=("adapter",))
