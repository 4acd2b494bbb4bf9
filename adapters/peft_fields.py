"""Which fields of PEFT's adapter_config.json may stand, field by field. Knows no values that are used.

An allowlist: every field that PEFT 0.21 saves is used, or dropped because it only mattered in training, or
refused by name unless it is off (adapters/kinds.py says why). A field that is not listed is refused unless it
is null.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from adapters.errors import AdapterError, InvalidAdapterError, UnsupportedAdapterError, raise_first
from adapters.files import CONFIG_FILE
from adapters.kinds import (
    ANY_OTHER_INIT,
    ANY_OTHER_TYPE,
    BIAS,
    MEGATRON_CORE,
    REFUSED_FIELDS,
    REFUSED_INITS,
    REFUSED_TYPES,
    Refused,
)
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
_OFF: tuple[object, ...] = (None, False, "", [], {})

# How the factors were begun says nothing once they are trained, as long as the base kept its weights.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_APPLIED_TYPE = "LORA"


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuses a configuration that asks for more than a low-rank update of linear modules.

    Raises:
        InvalidAdapterError: a field is missing or unknown.
        UnsupportedAdapterError: a field asks for what cannot be applied here.
    """
    _check_type(config.get("peft_type"))  # fields of another type mean other things
    raise_first(_faults(config))


def _check_type(peft_type: object) -> None:
    if peft_type is None:
        raise _not_set("peft_type")
    if not isinstance(peft_type, str):
        raise InvalidAdapterError(
            f"peft_type = {brief(peft_type)} in {CONFIG_FILE}: it must be a name such as {_APPLIED_TYPE!r}",
            reason="BAD_CONFIG",
        )
    if peft_type != _APPLIED_TYPE:
        refused = REFUSED_TYPES.get(peft_type, ANY_OTHER_TYPE)
        raise UnsupportedAdapterError(f"peft_type = {brief(peft_type)}: {refused}", feature=brief(peft_type))


def _faults(config: Mapping[str, Any]) -> Iterator[AdapterError]:
    yield from (_not_set(name) for name in _REQUIRED if config.get(name) is None)
    for name, value in config.items():
        refused = _refused(name, value)
        if refused is not None:
            yield UnsupportedAdapterError(f"{name} = {brief(value)}: {refused}", feature=name)
        elif not _is_known(name) and value is not None:
            yield InvalidAdapterError(
                f"unknown field {brief(name)} = {brief(value)} in {CONFIG_FILE}; if it is off, remove it or "
                "set it to null, otherwise this server cannot apply the adapter",
                reason="UNKNOWN_FIELD",
            )


def _is_known(name: str) -> bool:
    return name in _USED or name in _INFORMATIONAL or name in REFUSED_FIELDS


def _refused(name: str, value: object) -> Refused | None:
    """Why a field with this value cannot be applied; None if nothing is known against it."""
    match name:
        case "bias":
            return None if value == "none" else BIAS
        case "megatron_core":  # the default is unused without megatron_config
            return None if value in (None, "megatron.core") else MEGATRON_CORE
        case "init_lora_weights":
            return _refused_init(value)
        case _:
            return REFUSED_FIELDS.get(name) if value not in _OFF else None


def _refused_init(init: object) -> Refused | None:
    family = init.lower() if isinstance(init, str) else init
    if family in _HARMLESS_INITS:
        return None
    begins = (
        row for start, row in REFUSED_INITS.items() if isinstance(family, str) and family.startswith(start)
    )
    return next(begins, ANY_OTHER_INIT)


def _not_set(name: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"{name} is not set in {CONFIG_FILE}; save the adapter with PEFT's save_pretrained",
        reason="BAD_CONFIG",
    )
