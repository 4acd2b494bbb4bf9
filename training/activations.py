"""Owns how many bytes a layer keeps between its forward and its backward pass. Knows no torch, no optimizer.

T tokens of a batch with their padding (rows × columns), W columns, B rows, H hidden, A width of all queries,
I inner width of the MLP, R rank; a bytes of an activation, 2 for bfloat16 or 4 for float32.

What autograd keeps of a layer of the Llama kind, per token; tests/training/test_memory.py counts the same
with torch.autograd.graph.saved_tensors_hooks:

residual      2·H·4          each RMSNorm squares its input in float32, whatever the activations' type
norms         2·H·4          what a norm's weight multiplies, if that weight is trained
attention     4·A·a + 4·heads  queries, keys and values widened to the queries' heads, the result, log-sum-exp
MLP           3·I·a          both projections and the activation between them; I·a in an MLP without gate
inputs        see below      what the trained weights multiply: their gradients need it
outputs       see below      DoRA, IA³: what the trained scales multiply
masks         W·a            SDPA turns the mask of each layer into a bias of B × W × W values, and keeps it;
                             T·a where rows that begin alike are one sequence of T tokens

Inputs: a weight gradient needs the module's input. Trained weights of the activations' type read it where it
is; modules that read the same input share it, and the attention's result is kept already. PEFT's factors are
float32: with activations in bfloat16 each targeted module keeps a float32 copy of its own, and so does each
with dropout, besides the noise. Every targeted module keeps R values of float32 between its two factors.
"""

from dataclasses import dataclass
from typing import Final

from training.shape import LinearModule, ModelShape
from training.workload import Workload

_FLOAT32: Final = 4


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What one layer keeps, in bytes."""

    residual: int
    attention: int
    mlp: int
    inputs: int
    outputs: int
    masks: int

    @property
    def total(self) -> int:
        return self.residual + self.attention + self.mlp + self.inputs + self.outputs + self.masks


def layer_bytes(shape: ModelShape, work: Workload) -> LayerBytes:
    """What a decoder layer keeps for its backward pass."""
    tokens, a = work.tokens, work.activation_bytes
    norms = 2 * shape.hidden * _FLOAT32 if work.trains == "all" else 0
    return LayerBytes(
        residual=tokens * (2 * shape.hidden * _FLOAT32 + norms),
        attention=_attention_bytes(shape, work),
        mlp=tokens * shape.active_experts * (3 if shape.gated else 1) * shape.inner * a,
        inputs=tokens * _input_bytes(shape, work),
        outputs=tokens * _output_bytes(shape, work),
        masks=work.mask_values * a,
    )


def _attention_bytes(shape: ModelShape, work: Workload) -> int:
    """Prefix tuning attends to more keys than there are tokens."""
    keys = work.batch_rows * work.key_columns
    wide = (2 * work.tokens + 2 * keys) * shape.query_width * work.activation_bytes
    return wide + work.tokens * shape.heads * _FLOAT32


def _input_bytes(shape: ModelShape, work: Workload) -> int:
    """Per token: inputs that weight gradients need, and what lies between two factors."""
    if work.trains == "all":
        return _shared_input_bytes(shape, shape.modules, work.activation_bytes)
    if work.trains == "ia3":
        scaled = [m for m in shape.targeted(work.targets) if m.reads == "mlp product"]
        return _shared_input_bytes(shape, tuple(scaled), _FLOAT32)
    if work.trains not in ("lora", "dora"):
        return 0
    targets = shape.targeted(work.targets)
    between = sum(work.rank * _FLOAT32 * _uses(module, shape) for module in targets)
    doubled = between if work.trains == "dora" else 0
    return between + doubled + _factor_input_bytes(shape, work, targets)


def _factor_input_bytes(shape: ModelShape, work: Workload, targets: tuple[LinearModule, ...]) -> int:
    if work.dropout:  # its noise and its result
        return sum(2 * module.in_features * _FLOAT32 * _uses(module, shape) for module in targets)
    if work.activation_bytes == _FLOAT32:
        return _shared_input_bytes(shape, targets, _FLOAT32)
    return sum(module.in_features * _FLOAT32 * _uses(module, shape) for module in targets)


def _shared_input_bytes(shape: ModelShape, modules: tuple[LinearModule, ...], value_bytes: int) -> int:
    read = {module.reads: module.in_features * _uses(module, shape) for module in modules}
    read.pop("attention output", None)  # attention itself keeps it
    return sum(read.values()) * value_bytes


def _output_bytes(shape: ModelShape, work: Workload) -> int:
    """DoRA scales what the frozen weight and the update give; IA³ what attention is given."""
    if work.trains == "dora":
        outs = sum(module.out_features * _uses(module, shape) for module in shape.targeted(work.targets))
        return outs * (work.activation_bytes + _FLOAT32)
    if work.trains == "ia3":
        scaled = [m for m in shape.targeted(work.targets) if m.reads != "mlp product"]
        return sum(module.out_features for module in scaled) * work.activation_bytes
    return 0


def _uses(module: LinearModule, shape: ModelShape) -> int:
    """How often a token goes through such a module: once, or through each active expert's."""
    return shape.active_experts if module.copies > 1 else 1
