"""The C structures of native/quickchange_kernels.h, field by field. Knows no tensors."""

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import ClassVar

Fields = ClassVar[list[tuple[str, type]]]


class ElementType(IntEnum):
    """qc_type."""

    FLOAT32 = 0
    BFLOAT16 = 1


class WeightForm(IntEnum):
    """qc_form."""

    NF4 = 0
    FLOAT32 = 1
    BFLOAT16 = 2


class Precision(IntEnum):
    """qc_precision."""

    HIGHEST = 0
    MEDIUM = 1


class Bfloat16(IntEnum):
    """qc_bf16: what an instruction set's products of medium precision are, beside its float32 ones."""

    NONE = 0
    SLOWER = 1
    FASTER = 2


class Activation(IntEnum):
    """qc_activation."""

    SILU = 0
    GELU_TANH = 1


class Factors(Structure):
    """qc_factors."""

    a: int | None
    b: int | None
    rank: int
    type: int
    scaling: float
    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("rank", c_int32),
        ("type", c_int32),
        ("scaling", c_float),
        ("unused", c_int32),
    )


class Linear(Structure):
    """qc_linear."""

    slots: object
    slot_count: int
    precision: int
    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("slots", POINTER(Factors)),
        ("slot_count", c_int64),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("form", c_int32),
        ("group", c_int32),
        ("precision", c_int32),
        ("unused", c_int32),
    )


class SegmentRecord(Structure):
    """qc_segment."""

    _fields_ = (("start", c_int32), ("end", c_int32), ("slot", c_int32), ("scale", c_float))


class Paging(Structure):
    """qc_paging."""

    _fields_ = (
        ("positions", c_void_p),
        ("sequences", c_void_p),
        ("tables", c_void_p),
        ("table_width", c_int32),
        ("block_tokens", c_int32),
    )


class CacheRecord(Structure):
    """qc_cache."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("type", c_int32),
        ("kv_heads", c_int32),
        ("key_width", c_int32),
        ("value_width", c_int32),
    )


class RuleRecord(Structure):
    """qc_attention_rule."""

    _fields_ = (("scale", c_float), ("softcap", c_float), ("window", c_int32), ("heads", c_int32))


class LayerRecord(Structure):
    """qc_layer."""

    _fields_ = (
        ("qkv", POINTER(Linear) * 3),
        ("output", POINTER(Linear)),
        ("gate_up", POINTER(Linear) * 2),
        ("down", POINTER(Linear)),
        ("input_norm", c_void_p),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("after_mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("cache", POINTER(CacheRecord)),
        ("rule", RuleRecord),
        ("norm_epsilon", c_float),
        ("residual_scale", c_float),
        ("qkv_parts", c_int32),
        ("gate_up_parts", c_int32),
        ("hidden", c_int32),
        ("intermediate", c_int32),
        ("rotary_width", c_int32),
        ("activation", c_int32),
        ("norm_all_heads", c_int32),
    )


class StepRecord(Structure):
    """qc_step."""

    _fields_ = (
        ("segments", c_void_p),
        ("segment_count", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("paging", Paging),
        ("rows", c_int32),
        ("threads", c_int32),
    )


class ScreenRecord(Structure):
    """qc_screen."""

    _fields_ = (("codes", c_void_p), ("steps", c_void_p), ("errors", c_void_p))


class DrawRecord(Structure):
    """qc_draw."""

    _fields_ = (
        ("logits", c_void_p),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("uniform", c_double),
        ("top_k", c_int64),
    )


_POINTER, _INT, _LONG, _FLOAT = c_void_p, c_int32, c_int64, c_float
_PARTS = POINTER(POINTER(Linear))

INTERFACE = 2
"""QC_INTERFACE of native/quickchange_kernels.h, which this is the other side of."""

_NO_MEMORY = -2

SIGNATURES: dict[str, tuple[type | None, list[object]]] = {
    "qc_interface": (_INT, []),
    "qc_isa_available": (_INT, [_INT]),
    "qc_isa_active": (_INT, []),
    "qc_isa_use": (_INT, [_INT]),
    "qc_isa_bf16": (_INT, [_INT]),
    "qc_spin_for": (None, [_LONG]),
    "qc_linear_forward": (
        _INT,
        [_PARTS, _INT, _POINTER, _LONG, _POINTER, _LONG, _INT, _POINTER, _LONG, _INT, _INT],
    ),
    "qc_lora_delta": (_INT, [_PARTS, _INT, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _INT]),
    "qc_cache_write": (
        None,
        [POINTER(CacheRecord), POINTER(Paging), _POINTER, _LONG, _POINTER, _LONG, _INT, _INT],
    ),
    "qc_attention": (
        None,
        [POINTER(CacheRecord), POINTER(Paging), POINTER(RuleRecord), *[_POINTER, _LONG] * 2, _INT, _INT],
    ),
    "qc_rms_norm": (None, [_POINTER, _LONG, _POINTER, _POINTER, _LONG, _INT, _INT, _FLOAT, _INT]),
    "qc_rotary": (None, [_POINTER, _LONG, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _INT]),
    "qc_gated": (None, [_POINTER, _LONG, _POINTER, _LONG, _INT, _INT, _INT, _INT]),
    "qc_argmax": (None, [_POINTER, _LONG, _POINTER, _INT, _LONG, _INT]),
    "qc_likeliest": (
        _INT,
        [POINTER(Linear), POINTER(ScreenRecord), _POINTER, _LONG, _INT, _POINTER, _INT],
    ),
    "qc_draw_tokens": (None, [POINTER(DrawRecord), _INT, _LONG, _POINTER, _INT]),
    "qc_layers_forward": (
        _INT,
        [POINTER(POINTER(LayerRecord)), _LONG, POINTER(StepRecord), _POINTER],
    ),
}
"""Result and arguments of every function of the C interface."""

_NEEDS_MEMORY = ("qc_linear_forward", "qc_lora_delta", "qc_likeliest", "qc_layers_forward")


def declare(library: ctypes.CDLL) -> None:
    """Gives every function of a loaded library its types.

    Raises:
        AttributeError: it was built from other sources.
    """
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if (found := library.qc_interface()) != INTERFACE:
        raise AttributeError(f"it has interface {found}, and {INTERFACE} is wanted")
    for name in _NEEDS_MEMORY:
        getattr(library, name).errcheck = _with_memory


def _with_memory(result: int, function: object, arguments: object) -> int:
    """What an operation returned, if it had the memory that it needs besides its arguments."""
    if result == _NO_MEMORY:
        raise MemoryError("no memory for a native operation beside its arguments")
    return result
