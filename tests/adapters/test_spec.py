"""The specification against PEFT itself: same targets, ranks and scalings, and nothing else let in."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from adapters.errors import AdapterError, InvalidAdapterError, UnsupportedAdapterError
from adapters.layout import BaseLayout, ModuleShape
from adapters.spec import MAX_CONFIG_BYTES, MAX_RANK, parse_spec
from tests.adapters.builders import FINGERPRINT, config_of, make_adapter

CONFIGS: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "full name": {"target_modules": ["model.layers.1.mlp.up_proj", "o_proj"]},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "regex": {"target_modules": r"model\.layers\.[01]\.(?:self_attn\.(q|k)_proj|mlp\.up_proj)"},
    "regex with lookahead": {"target_modules": r"(?!.*mlp).*(_proj|head)$"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, odd case": {"target_modules": "All-Linear", "r": 3},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True, "r": 6, "lora_alpha": 11},
    "rank pattern": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 7},
    },
    "alpha pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 64},
        "rank_pattern": {"v_proj": 8},
        "use_rslora": True,
    },
    # In sorted order, as PEFT writes them; in another order PEFT cannot load what it saved.
    "overlapping patterns": {"target_modules": ["q_proj"], "rank_pattern": {".*q_proj": 3, "q_proj": 2}},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "no such layer list": {
        "target_modules": ["q_proj", "model.layers.1.mlp.up_proj"],
        "layers_to_transform": [0],
        "layers_pattern": ["blocks", "h"],
    },
    "exclude suffixes": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "mlp.up_proj"]},
    "exclude by regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "fractional alpha": {"target_modules": ["q_proj"], "lora_alpha": 0.75},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_targets_ranks_and_scalings_are_those_of_peft(
    config: dict[str, Any], llama: PreTrainedModel, layout: BaseLayout, tmp_path: Path
) -> None:
    directory = make_adapter(llama, tmp_path, **config)
    adapted = PeftModel.from_pretrained(copy.deepcopy(llama), directory)
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }

    spec = parse_spec((directory / "adapter_config.json").read_bytes())

    assert spec.targets(layout) == tuple(theirs)
    assert spec.ranks_and_scalings(layout) == theirs
    assert {name: (spec.rank_of(name), spec.scaling_of(name)) for name in theirs} == theirs


def test_all_linear_leaves_the_head_out_and_a_suffix_does_not(layout: BaseLayout) -> None:
    assert layout.head == "lm_head"
    assert "lm_head" not in parse_spec(config_of(target_modules="all-linear")).targets(layout)
    assert len(parse_spec(config_of(target_modules="all-linear")).targets(layout)) == 14
    assert parse_spec(config_of(target_modules=["lm_head"])).targets(layout) == ("lm_head",)


MODULES = [
    f"{tower}.layers.{index}.{part}"
    for tower in ("model", "model.vision.h")
    for index in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.experts.3.up_proj", "proj")
] + ["lm_head", "proj"]
NAMES = st.sampled_from(
    ["q_proj", "proj", "up_proj", "self_attn.q_proj", "layers.1.proj", "lm_head", "3.up_proj", *MODULES]
)
PATTERNS = st.sampled_from(
    [
        "q_proj",
        ".*_proj",
        r"model\.layers\.\d+\.proj",
        "^model.layers.1.proj",
        "(?:self_attn|mlp).*",
        ".*(?!q)_proj",
        "layers.1.*",
        r"[a-z.]*\d{1,2}\.proj",
        "lm_head|proj",
    ]
)


@given(
    targets=st.one_of(PATTERNS, st.lists(NAMES, min_size=1, max_size=4)),
    exclude=st.one_of(st.none(), PATTERNS, st.lists(NAMES, max_size=2)),
    indices=st.one_of(st.none(), st.integers(0, 11), st.lists(st.sampled_from([0, 1, 3, 11]), max_size=3)),
    layer_lists=st.one_of(
        st.none(),
        st.sampled_from(["layers", "", "experts", r"\w+", "layers|h"]),
        st.lists(st.sampled_from(["layers", "experts", "blocks"]), max_size=2),
    ),
    ranks=st.dictionaries(st.one_of(PATTERNS, NAMES), st.integers(1, 64), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_matching_is_pefts_for_any_combination(
    targets: Any, exclude: Any, indices: Any, layer_lists: Any, ranks: dict[str, int]
) -> None:
    if isinstance(targets, str):
        indices = layer_lists = None
    if indices is None or indices == []:
        layer_lists = None
    fields = {
        "target_modules": targets,
        "exclude_modules": exclude,
        "layers_to_transform": indices,
        "layers_pattern": layer_lists,
        "rank_pattern": ranks,
    }
    with warnings.catch_warnings(action="ignore"):
        theirs = LoraConfig(r=5, **copy.deepcopy(fields))
    layout = BaseLayout({name: ModuleShape(8, 8) for name in MODULES}, "lm_head", FINGERPRINT)
    expected = tuple(name for name in MODULES if check_target_module_exists(theirs, name))
    spec = parse_spec(config_of(r=5, **fields))
    if not expected:
        with pytest.raises(InvalidAdapterError, match="match no linear module"):
            spec.targets(layout)
        return
    assert spec.targets(layout) == expected
    for name in expected:
        assert spec.rank_of(name) == ranks.get(get_pattern_key(ranks.keys(), name), 5)


# What PEFT does with these while it applies an adapter: nothing, or what the tests above compare.
HARMLESS_FIELDS = {
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}


@pytest.mark.parametrize(
    "field", sorted({field.name for field in dataclasses.fields(LoraConfig)} - HARMLESS_FIELDS)
)
def test_every_other_field_of_peft_is_refused_by_name_when_it_is_on(field: str) -> None:
    for value in (True, ["q_proj"], {"a": 1}, 3, "some.module"):
        with pytest.raises(UnsupportedAdapterError, match=rf"^{field} = .*: .+"):
            parse_spec(config_of(**{field: value}))


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_a_field_that_is_off_is_no_obstacle(value: object) -> None:
    assert parse_spec(config_of(use_dora=value, modules_to_save=value, auto_mapping=value)) == parse_spec(
        config_of()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"bias": "all"}, "bias = 'all'.*bias='none'"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "OLoRA"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "retrain"),
        ({"init_lora_weights": ["eva"]}, "retrain"),
        ({"init_lora_weights": {"custom": 1}}, "retrain"),
        ({"megatron_core": "my.evil.module"}, "megatron_core = 'my.evil.module'"),
        ({"auto_mapping": {"base_model_class": "A", "parent_library": "os"}}, "task_type='CAUSAL_LM'"),
    ],
)
def test_what_cannot_be_applied_is_refused_with_the_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=message):
        parse_spec(config_of(**fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_new_thing": True}, "UNKNOWN_FIELD"),
        ({"use_new_thing": False}, "UNKNOWN_FIELD"),
        ({"r": 0}, "BAD_CONFIG"),
        ({"r": MAX_RANK + 1}, "BAD_CONFIG"),
        ({"r": 4.0}, "BAD_CONFIG"),
        ({"r": True}, "BAD_CONFIG"),
        ({"r": "4"}, "BAD_CONFIG"),
        ({"r": None}, "BAD_CONFIG"),
        ({"lora_alpha": 0}, "BAD_CONFIG"),
        ({"lora_alpha": -1}, "BAD_CONFIG"),
        ({"lora_alpha": 1e300}, "BAD_CONFIG"),
        ({"lora_alpha": 10**400}, "BAD_CONFIG"),
        ({"target_modules": None}, "BAD_CONFIG"),
        ({"target_modules": []}, "BAD_CONFIG"),
        ({"target_modules": [""]}, "BAD_CONFIG"),
        ({"target_modules": [3]}, "BAD_CONFIG"),
        ({"target_modules": {"q_proj": 1}}, "BAD_CONFIG"),
        ({"target_modules": ["m"] * 5000}, "BAD_CONFIG"),
        ({"target_modules": "(q_proj"}, "BAD_PATTERN"),
        ({"exclude_modules": 7}, "BAD_CONFIG"),
        ({"layers_to_transform": "1"}, "BAD_CONFIG"),
        ({"layers_to_transform": [-1]}, "BAD_CONFIG"),
        ({"layers_to_transform": [1], "target_modules": ".*q_proj"}, "BAD_CONFIG"),
        ({"layers_pattern": "layers"}, "BAD_CONFIG"),
        ({"rank_pattern": {"q_proj": 0}}, "BAD_CONFIG"),
        ({"rank_pattern": ["q_proj"]}, "BAD_CONFIG"),
        ({"rank_pattern": {"q)(": 4}}, "BAD_PATTERN"),
        ({"alpha_pattern": {"q_proj": None}}, "BAD_CONFIG"),
        ({"use_rslora": "yes"}, "BAD_CONFIG"),
    ],
)
def test_bad_values_are_refused_and_named(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidAdapterError, match=next(iter(fields))) as refusal:
        parse_spec(config_of(**fields))
    assert refusal.value.reason == reason
    assert len(str(refusal.value)) < 1000


def test_a_target_that_matches_nothing_is_refused(layout: BaseLayout) -> None:
    for targets in (["q"], "q_proj", ["c_attn"]):
        with pytest.raises(InvalidAdapterError) as refusal:
            parse_spec(config_of(target_modules=targets)).targets(layout)
        assert refusal.value.reason == "NO_TARGET"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"r": 4, "r": 8}', "'r' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        (b'{"r": NaN}', "NaN"),
        (b'{"r": -Infinity}', "Infinity"),
        (b'{"r": 1e999}', "too large"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"\xff\xfe{\x00}\x00", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b" " * (MAX_CONFIG_BYTES + 1), "at most"),
    ],
)
def test_hostile_json_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidAdapterError, match=message) as refusal:
        parse_spec(raw)
    assert refusal.value.reason == "BAD_JSON"


@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
            ),
            max_leaves=12,
        ).flatmap(
            lambda value: st.sampled_from(
                [
                    "r",
                    "target_modules",
                    "rank_pattern",
                    "init_lora_weights",
                    "bias",
                    "layers_to_transform",
                    "layers_pattern",
                    "lora_alpha",
                    "use_dora",
                ]
            ).map(lambda field: config_of(**{field: value}))
        ),
    )
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_specification_or_an_adapter_error(raw: bytes) -> None:
    try:
        canonical = parse_spec(raw).canonical()
    except AdapterError:
        return
    assert json.loads(json.dumps(canonical)) == canonical


def test_canonical_form_forgets_order_of_sets_and_keeps_order_of_patterns() -> None:
    one = parse_spec(config_of(target_modules=["q_proj", "v_proj", "q_proj"], layers_to_transform=[1, 0]))
    same = parse_spec(
        config_of(target_modules=["v_proj", "q_proj"], layers_to_transform=[0, 1], peft_version="0.9")
    )
    other = parse_spec(
        config_of(target_modules=["v_proj", "q_proj"], layers_to_transform=[0, 1], lora_alpha=9)
    )
    assert one.canonical() == same.canonical() != other.canonical()

    first = parse_spec(config_of(rank_pattern={"q_proj": 2, ".*proj": 3})).canonical()
    second = parse_spec(config_of(rank_pattern={".*proj": 3, "q_proj": 2})).canonical()
    assert json.dumps(first) != json.dumps(second)
