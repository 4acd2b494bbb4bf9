"""Which fields of PEFT's adapter_config.json may stand, field by field. Knows no values that are used.

An allowlist: every field that PEFT 0.21 saves is used, or dropped because it only mattered in training, or
refused by name unless it is off. A field that is not listed here is refused unless it is null.
"""

from collections.abc import Mapping
from typing import Any

from adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from adapters.files import CONFIG_FILE
from adapters.strict_json import brief

_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_USED = frozenset(
    {
        *_REQUIRED,
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "megatron_core",
        "rank_pattern",
        "use_rslora",
    }
)
# Where it came from and how it was trained. fan_in_fan_out says that the base keeps its weights transposed
# (GPT-2); the factors are the same. The *_config ones only steer an initialisation that init_lora_weights
# asks for, and that field is checked; a converted CorDA adapter still carries its own.
_INFORMATIONAL = frozenset(
    {
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_RETRAIN = "retrain without it"
_IMPORTS = "it names code to import, which is never done here; set it to null"
_MUST_BE_OFF = {
    "alora_invocation_tokens": f"activated LoRA switches on in mid-sequence; {_RETRAIN}",
    "arrow_config": f"Arrow routes between several adapters; {_RETRAIN}",
    "auto_mapping": f"{_IMPORTS}, or train with task_type='CAUSAL_LM' so that PEFT writes none",
    "base_model_class": _IMPORTS,
    "enable_lora": f"it was for fused projections of very old PEFT; {_RETRAIN}",
    "ensure_weight_tying": f"it ties an adapter to the embedding; {_RETRAIN}",
    "kasa_config": f"KaSA truncates the shared base's weights; {_RETRAIN}",
    "layer_replication": f"it restructures the shared base; {_RETRAIN}",
    "lora_bias": f"an adapter may add a low-rank product and no bias; {_RETRAIN}",
    "megatron_config": _IMPORTS,
    "merge_weights": f"the shared base is never merged into; {_RETRAIN}",
    "modules_to_save": f"it replaces whole modules of the shared base; {_RETRAIN}",
    "monteclora_config": f"Monteclora samples its weights; {_RETRAIN}",
    "parent_library": _IMPORTS,
    "target_parameters": f"only linear modules can be adapted here; use target_modules; {_RETRAIN}",
    "trainable_token_indices": f"it changes embeddings of the shared base; {_RETRAIN}",
    "use_bdlora": f"block-diagonal LoRA is not applied here; {_RETRAIN}",
    "use_dora": f"DoRA is not applied here; {_RETRAIN}, or merge it into the base with PEFT",
    "use_qalora": f"QA-LoRA pools its input, which is not done here; {_RETRAIN}",
    "velora_config": f"VeLoRA stores more than the two factors; {_RETRAIN}",
}
_OFF: tuple[object, ...] = (None, False, "", [], {})

_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")
_BASE_KEEPING_INITS = ("eva", "mica")


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuses a configuration that asks for more than a low-rank update of linear modules.

    Raises:
        InvalidAdapterError: a field is missing or unknown.
        UnsupportedAdapterError: a field asks for what cannot be applied here.
    """
    _check_presence(config)
    _check_type(config)


def _check_presence(config: Mapping[str, Any]) -> None:
    for name in _REQUIRED:
        if config.get(name) is None:
            raise InvalidAdapterError(
                f"{name} is not set in {CONFIG_FILE}; save the adapter with PEFT's save_pretrained",
                reason="BAD_CONFIG",
            )
    for name, value in config.items():
        if name in _MUST_BE_OFF and value not in _OFF:
            raise UnsupportedAdapterError(f"{name} = {brief(value)}: {_MUST_BE_OFF[name]}")
        is_known = name in _USED or name in _INFORMATIONAL or name in _MUST_BE_OFF
        if not is_known and value is not None:
            raise InvalidAdapterError(
                f"unknown field {brief(name)} = {brief(value)} in {CONFIG_FILE}; if it is off, remove it or "
                "set it to null, otherwise this server cannot apply the adapter",
                reason="UNKNOWN_FIELD",
            )


def _check_type(config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise UnsupportedAdapterError(
            f"peft_type = {brief(config['peft_type'])}: only LORA is served; retrain with peft.LoraConfig"
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapterError(
            f"bias = {brief(config['bias'])}: it changes biases of the shared base; retrain with bias='none'"
        )
    if config.get("megatron_core") not in (
        None,
        "megatron.core",
    ):  # the default, unused without megatron_config
        raise UnsupportedAdapterError(f"megatron_core = {brief(config['megatron_core'])}: {_IMPORTS}")
    _check_init(config.get("init_lora_weights", True))


def _check_init(init: object) -> None:
    if init in _HARMLESS_INITS:
        return
    family = init.lower() if isinstance(init, str) else ""
    if family.startswith(_BASE_CHANGING_INITS):
        remedy = (
            "it changed the weights of the base in training; convert the adapter with PEFT's save_pretrained"
            "(…, path_initial_model_for_weight_conversion=…) or retrain with init_lora_weights=true"
        )
    elif family in _BASE_KEEPING_INITS:
        remedy = "it means nothing once the adapter is trained; set it to true"
    else:
        remedy = "the adapter was trained against changed base weights; retrain with init_lora_weights=true"
    raise UnsupportedAdapterError(f"init_lora_weights = {brief(init)}: {remedy}")
