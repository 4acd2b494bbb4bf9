"""Writes README.md, the model card of a result: Markdown below the YAML that hubs read. Knows no weights.

It repeats what training.json and quickchange.json say, for people; nothing reads it back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]  # PyYAML carries no types

from adapters.base import Base
from adapters.files import CARD_FILE
from adapters.origin import Origin
from adapters.smollm2 import HUB_ID, SOURCE
from training.data import TrainingData
from training.data_report import Side
from training.provenance import source_of, told_settings
from training.recipe import Recipe

UNKNOWN_LICENSE: Final = "unknown"
"""As hubs spell it."""

_METRICS: Final[Mapping[str, str]] = {
    "steps": "optimizer steps",
    "tokens": "tokens computed, without padding",
    "trained_parameters": "trained parameters",
    "final_loss": "training loss, mean of the last tenth of the steps, nats per learned token",
    "held_out_loss": "held-out loss of these weights, nats per learned token",
    "held_out_perplexity": "held-out perplexity of these weights",
    "held_out_lowest_loss": "lowest held-out loss of the run",
}
"""What is shown, in this order."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found out about the result: whether servers' checks pass, and what became of the canary."""

    validation: str
    canary: str


def write_model_card(
    folder: Path, recipe: Recipe, base: Base, data: TrainingData, origin: Origin, checked: Checked
) -> None:
    """Writes the card into the result's folder."""
    (folder / CARD_FILE).write_text(model_card(recipe, base, data, origin, checked), encoding="utf-8")


def model_card(recipe: Recipe, base: Base, data: TrainingData, origin: Origin, checked: Checked) -> str:
    """The text of the card, without anything of this machine."""
    sections = {
        "How to use it": _use(recipe, base),
        "Data": _data(recipe, data, origin),
        "Recipe": _fenced("yaml", _yaml(told_settings(recipe, base))),
        "Metrics": _table(
            ("metric", "value"),
            (
                (said, _number(origin.metrics[name]))
                for name, said in _METRICS.items()
                if name in origin.metrics
            ),
        ),
        "Evaluation": _evaluation(recipe, base, origin),
        "Versions": _table(("package", "version"), sorted(origin.versions.items())),
        "Limits": _limits(recipe, base, checked),
    }
    head = f"---\n{_yaml(_front_matter(recipe, base))}---\n\n# {_plain(recipe.out.name)}\n\n"
    return head + _what(recipe, base) + "".join(f"\n## {title}\n\n{text}" for title, text in sections.items())


def _front_matter(recipe: Recipe, base: Base) -> dict[str, Any]:
    return {
        "base_model": HUB_ID if source_of(base) == SOURCE else base.name,
        "library_name": "transformers" if recipe.kind.saved is None else "peft",
        "pipeline_tag": "text-generation",
        "license": recipe.license or UNKNOWN_LICENSE,
        "tags": ["quickchange", recipe.method, *(["adapter"] if recipe.kind.saved is not None else [])],
    }


def _what(recipe: Recipe, base: Base) -> str:
    made = "A model of its own, trained from" if recipe.kind.saved is None else "An adapter for"
    return (
        f"{made} {_code(base.name)} ({base.scheme.name}) by method {_code(recipe.method)}: "
        f"{recipe.kind.title}.\n"
        f"Fingerprint of the base: {_code(base.fingerprint)}.\n"
    )


# How to use it


def _use(recipe: Recipe, base: Base) -> str:
    if recipe.kind.saved is None:
        return _use_of_model(recipe)
    with_server = _with_server(recipe, base)
    return f"{with_server}\n{_with_libraries(recipe, base)}"


def _use_of_model(recipe: Recipe) -> str:
    folder = _plain(recipe.out.name)
    return (
        "With quickchange, as a base of its own:\n\n"
        + _fenced("console", f"$ quickchange serve --base ./{folder}\n")
        + "\nWith transformers:\n\n"
        + _fenced(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n",
        )
    )


def _with_server(recipe: Recipe, base: Base) -> str:
    why = recipe.kind.why_not_served
    folder = _plain(recipe.out.name)
    if why is not None:
        then = recipe.kind.afterwards.format(merge=recipe.merge_command, out=folder)
        return f"No quickchange server applies it ({why}); {then}.\n"
    if not base.scheme.is_served:
        return (
            f"No quickchange server holds a base in {base.scheme.name}: merge it, `{recipe.merge_command}`.\n"
        )
    plain = " --quantization none" if recipe.base_quantization == "none" else ""
    name = recipe.name or "NAME"
    return "With quickchange:\n\n" + _fenced(
        "console",
        f"$ quickchange serve --base {_plain(source_of(base))}{plain} --store ./store\n"
        f"$ quickchange adapters push ./{folder} --name {name}\n"
        f"$ quickchange generate --adapter {name} --chat 'a question'\n",
    )


def _with_libraries(recipe: Recipe, base: Base) -> str:
    folder, name = _plain(recipe.out.name), _plain(base.name)
    if recipe.method == "bitfit":
        return f"With transformers, into the base in float32{_stands_for(base)}:\n\n" + _fenced(
            "python",
            "from safetensors.torch import load_file\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained({name!r}, dtype="float32")\n'
            f'model.load_state_dict(load_file("{folder}/adapter_model.safetensors"), strict=False)\n',
        )
    imports, quantized = _quantization(recipe)
    said = f"With PEFT, on the base as it was in training ({base.scheme.name}){_stands_for(base)}:"
    return f"{said}\n\n" + _fenced(
        "python",
        f"from peft import PeftModel\nfrom transformers import AutoModelForCausalLM{imports}\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({name!r}{quantized})\n"
        f"model = PeftModel.from_pretrained(base, {folder!r})\n",
    )


def _stands_for(base: Base) -> str:
    """Of a base that no hub has under its name: what to put there."""
    return "" if "/" in base.name else f"; {_code(base.name)} stands for the folder of the base"


def _quantization(recipe: Recipe) -> tuple[str, str]:
    """What is imported for it, and the argument that asks for it."""
    if recipe.base_quantization == "none":
        return "", ""
    settings = (
        "load_in_8bit=True"
        if recipe.base_quantization == "int8"
        else f"load_in_4bit=True, bnb_4bit_quant_type={recipe.base_quantization!r}, "
        f"bnb_4bit_use_double_quant={recipe.quantizes_scales}"
    )
    return ", BitsAndBytesConfig", f", quantization_config=BitsAndBytesConfig({settings})"


# What it was made of


def _data(recipe: Recipe, data: TrainingData, origin: Origin) -> str:
    files = [("learned", recipe.data.name, f"`{data.sha256}`")]
    if recipe.eval_data is not None:
        files.append(("held out", recipe.eval_data.name, f"`{origin.eval_data_sha256}`"))
    sides = [("learned", data.report.train), ("held out", data.report.held_out)]
    return (
        _table(("", "file", "SHA-256"), ((what, _code(name), sha256) for what, name, sha256 in files))
        + "\n"
        + _table(
            ("rows", "number", "examples", "tokens", "learned tokens", "cut", "dropped"),
            (_counts(what, side) for what, side in sides if side is not None),
        )
    )


def _counts(what: str, side: Side) -> tuple[str, ...]:
    numbers = (
        side.rows, side.examples, side.tokens, side.learned_tokens, len(side.cut), len(side.dropped)
    )  # fmt: skip
    return (what, *map(str, numbers))


def _evaluation(recipe: Recipe, base: Base, origin: Origin) -> str:
    measured = (
        "The held-out loss above is all that was measured in training"
        if "held_out_loss" in origin.metrics
        else "Nothing was held out, so the loss above is that of rows it has learned"
    )
    command = _evaluate_command(recipe, base)
    if command is None:
        return f"{measured}. Answers are compared once it is merged.\n"
    return f"{measured}. Answers are compared by\n\n" + _fenced("console", f"$ {command}\n")


def _evaluate_command(recipe: Recipe, base: Base) -> str | None:
    """What measures the result; None if its base is one that `quickchange evaluate` does not load."""
    data = _plain(recipe.eval_data.name) if recipe.eval_data is not None else "held-out.jsonl"
    command, folder = f"quickchange evaluate --data {data}", f"./{_plain(recipe.out.name)}"
    if recipe.kind.saved is None:
        return f"{command} --base {folder} --quantization none"
    if not recipe.quantizes_scales:
        return None
    on_base = f"--base {_plain(source_of(base))} --quantization {recipe.base_quantization}"
    served = recipe.kind.why_not_served is None and base.scheme.is_served
    return f"{command} {on_base} --adapter {folder}{'' if served else ' --engine reference'}"


def _limits(recipe: Recipe, base: Base, checked: Checked) -> str:
    lines = [
        "It was trained for what the data shows; what it does elsewhere was not looked at.",
        f"Sequences were at most {recipe.max_length} tokens long.",
        "What the base gets wrong, and the terms of its licence, it has from the base.",
    ]
    if recipe.kind.saved is not None:
        lines += [
            f"It belongs to its base in {base.scheme.name}; on another one, or another quantisation, it "
            "answers otherwise.",
            f"Checks of a server: {checked.validation}. Canary: {checked.canary}.",
        ]
    if recipe.kind.why_not_served is None and recipe.canary_probes and checked.canary == "recorded":
        lines.append(
            "quickchange.json holds prompts of the data as token ids, and what was answered to them."
        )
    return "".join(f"- {line}\n" for line in lines)


# Markdown


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}```\n"


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    """A name without what would end a line or a code span."""
    return " ".join(text.replace("`", "'").split())


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
