"""Writes a model folder for others: transformers 4 and 5, vLLM, hubs. Knows no adapters; computes nothing.

The weights' bytes stay what they are, cut into files of a bounded size. config.json and tokenizer_config.json
say what they say in the words of both transformers 4 and 5: version 4 takes a folder of version 5 without
complaint and with the default rotary base, or stops at names that it does not know.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from tqdm import tqdm

from adapters.cache import default_cache_dir, publish_folder
from adapters.errors import UnsupportedBaseError
from adapters.files import CARD_FILE
from adapters.fingerprint import StoredTensor, read_config
from adapters.model_folder import all_weights, read_weight, writing
from adapters.sources import Source, resolve_source
from adapters.support import supported_config
from adapters.text import generation_config, text_of
from training.document import Block, Code, Document, Heading, Items, Paragraph
from training.export_card import card
from training.merge import MERGE_FILE

_TYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COPIED: Final = (".json", ".jinja", ".txt", ".model", ".md")
_NOT_COPIED: Final = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")
_LEGAL: Final = ("LICENSE", "LICENCE", "NOTICE")
_ANY_TOKENIZER: Final = "PreTrainedTokenizerFast"
"""What version 4 calls a tokenizer that tokenizer.json describes; 5 knows the name."""


@dataclass(frozen=True, slots=True)
class ModelExport:
    """What was written.

    Attributes:
        architecture: the class of transformers, by which vLLM chooses its own.
        dtype: of the weights.
        files: that hold weights.
        weight_bytes: in them.
    """

    folder: Path
    architecture: str
    dtype: str
    files: int
    weight_bytes: int


def export_model(
    source: str,
    out_dir: Path,
    *,
    shard_bytes: int,
    licence: str | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> ModelExport:
    """Writes a model folder with all that others need of one.

    Args:
        source: a model folder such as `merge` writes, or what else `adapters.base.load_base` takes.
        out_dir: must not exist yet; appears complete or not at all.
        shard_bytes: at most so many of weights in one file; a larger tensor has a file of its own.
        licence: for the card, if one is made.

    Raises:
        BaseModelError: the model cannot be read, or is none that others load: quantised, of code of its own,
            of no architecture, or its weights are of several types.
        FileExistsError: out_dir exists.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another --out")
    found = resolve_source(source, cache_dir or default_cache_dir(), progress=progress)
    config = supported_config(found.folder)
    text_of(found.folder, config, generation_config(found.folder, config))  # a tokenizer that loads
    weights = list(all_weights(found.folder).values())
    architecture, dtype = _architecture(found), _dtype(found, weights)
    shards = list(_shards(weights, shard_bytes))

    def write(folder: Path) -> None:
        _write_weights(folder, shards, progress=progress)
        _write_json(folder / "config.json", _config(read_config(found.folder), config, dtype))
        _write_tokenizer_config(found.folder, folder)
        for path in _beside(found.folder):
            shutil.copyfile(path, folder / path.name)
        if not (folder / CARD_FILE).exists():
            text = _card(out_dir.name, found, dtype, licence)
            (folder / CARD_FILE).write_text(text, encoding="utf-8")

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    publish_folder(out_dir, write)
    size = sum(each.end - each.start for each in weights)
    return ModelExport(out_dir, architecture, dtype, len(shards), size)


def _architecture(found: Source) -> str:
    names = read_config(found.folder).get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise UnsupportedBaseError(
            f"{found.name} has architectures {names!r} in its config.json; vLLM needs the one class, such as "
            "['LlamaForCausalLM']"
        )
    return str(names[0])


def _dtype(found: Source, weights: Iterable[StoredTensor]) -> str:
    kinds = sorted({each.dtype for each in weights})
    if len(kinds) != 1 or kinds[0] not in _TYPES:
        raise UnsupportedBaseError(
            f"{found.name} has weights of {', '.join(kinds)}, not of one of {', '.join(_TYPES)}; save it in "
            "one type, as `quickchange merge` does"
        )
    return _TYPES[kinds[0]]


# Weights


def _shards(weights: Iterable[StoredTensor], limit: int) -> Iterator[list[StoredTensor]]:
    shard: list[StoredTensor] = []
    size = 0
    for each in weights:
        more = each.end - each.start
        if shard and size + more > limit:
            yield shard
            shard, size = [], 0
        shard.append(each)
        size += more
    yield shard


def _write_weights(folder: Path, shards: list[list[StoredTensor]], *, progress: bool) -> None:
    """As transformers names them; one shard is in memory at a time."""
    count = len(shards)
    names = [f"model-{place:05}-of-{count:05}.safetensors" for place in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    for name, shard in zip(
        names, tqdm(shards, desc="export", unit="file", disable=not progress), strict=True
    ):
        with writing(name):
            tensors = {each.name: read_weight(each) for each in shard}
            save_file(tensors, folder / name, metadata={"format": "pt"})
    if count > 1:
        places = {each.name: name for name, shard in zip(names, shards, strict=True) for each in shard}
        size = sum(each.end - each.start for shard in shards for each in shard)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


# What others read of it


def _config(raw: Mapping[str, Any], config: Any, dtype: str) -> dict[str, Any]:
    """With the type and the rotary positions under their old names too."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {**raw, "dtype": dtype, "torch_dtype": dtype, **_old_rope(config.model_type, rope)}


def _old_rope(model_type: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions as version 4 has them; version 5 may have others for each type of layer."""
    if not rope:
        return {}
    if "rope_theta" not in rope:
        local = rope.get("sliding_attention") or {}
        old = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        return _old_rope(model_type, rope.get("full_attention") or {}) | old
    theta, part = rope["rope_theta"], rope.get("partial_rotary_factor")
    apart = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in rope.items() if name not in apart}
    is_scaled = rope.get("rope_type", "default") != "default"
    old = {"rope_theta": theta, "rope_scaling": scaling if is_scaled else None}
    if model_type == "gpt_neox":
        old |= {"rotary_emb_base": theta, **({} if part is None else {"rotary_pct": part})}
    elif part is not None:
        old["partial_rotary_factor"] = part
    return old


def _write_tokenizer_config(source: Path, folder: Path) -> None:
    path = source / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = _ANY_TOKENIZER
    if isinstance(settings.get("extra_special_tokens"), list):  # version 4 has a mapping there
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("backend", "is_local", "local_files_only"):  # of the machine it was saved on
        settings.pop(name, None)
    _write_json(folder / path.name, settings)


def _beside(folder: Path) -> Iterator[Path]:
    """Tokenizer, chat template, generation configuration, card, certificate, licence."""
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in _COPIED or path.name.startswith(_LEGAL)
        if wanted and path.name not in _NOT_COPIED and path.is_file():
            yield path


def _card(name: str, found: Source, dtype: str, licence: str | None) -> str:
    path = found.folder / MERGE_FILE
    merged = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    blocks: list[Block] = [Paragraph(f"A model in {dtype}."), Heading("How to use it")]
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r}, dtype={dtype!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})\n"
    )
    blocks += [Paragraph("With transformers:"), Code(code, "python")]
    blocks += [Paragraph("With vLLM:"), Code(f"$ vllm serve ./{name}\n", "console")]
    told = ("base", "base_fingerprint", "adapter_digest", "into", "modules")
    facts = [(key, str(merged[key])) for key in told if key in merged]
    if facts:
        blocks += [Heading("What it is made of"), Items(facts)]
    return card(
        Document(name, blocks),
        base=merged.get("base"),
        library="transformers",
        licence=licence,
        tags=("merge",) if merged else (),
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
