"""Owns the formula for a run's peak memory: named parts from the shape and one step. Knows no torch.

P parameters, R rank, D in-features, O out-features, L layers, V vocabulary, H hidden, T tokens of a batch,
padding included, N rows of logits (rows × kept columns); a bytes of an activation, p of a dequantised weight.

process        what the interpreter and the libraries take before a base is there
base           linear layers: P·a, under NF4, FP4 P·(1/2 + s), s = 4/64 bytes of a float32 scale a block
               of 64, with double quantisation 1/64 + 4/(64·256) (QLoRA, Dettmers et al. 2023: 0.5 → 0.127 bit
               per parameter); int8 P + 4 bytes a row. Embedding, head and norms: P·a
trained        what is added to the base, in float32: LoRA R·(D + O) a module, DoRA O more (the magnitudes),
               IA³ K + K + I a layer, prefix 2·K a virtual token and layer, prompt H a virtual token, BitFit O
               a module; full training adds nothing
gradients      one value per trained value
optimizer      AdamW: two values per trained value, of its type; 8-bit: 2 bytes, and 2·4 bytes a block of 256
activations    what autograd keeps, training/activations.py; with checkpointing each layer's input H·a, and
               all of one layer while it is computed again
logits         3·N·V·4: the log-probabilities, their gradient, and the gradient of the logits
workspace      gradients of activations inside one MLP: 3·T·I·a and 3·T·H·a, and T·I·p where products are of
               another type
dequantising   the largest layer's weight: D·O·p, and D·O·a besides where the type changes on the way; DoRA
               builds B·A in full as well

The parts are never all there at once. Three moments are compared, and the largest is the prediction:

loss           all activations and the logits
last layer     all activations, the workspace of the layer whose backward is the first
step           all gradients, the activations of one layer
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from training.activations import layer_bytes
from training.shape import ModelShape
from training.workload import Place, Workload

MIB: Final = 1024**2
_FLOAT32: Final = 4
_PROCESS_BYTES: Final[Mapping[Place, int]] = {"cpu": 410 * MIB, "cuda": 500 * MIB}
"""CPU: resident size after the imports, measured (Linux, torch 2.13 for CPUs). CUDA: context and kernels
on the device, which no allocator counts; between 300 and 600 MiB by card and driver, not measured."""
_BLOCK_BYTES: Final[Mapping[str, float]] = {
    "nf4": 1 / 64 + 4 / (64 * 256),
    "fp4": 1 / 64 + 4 / (64 * 256),
    "nf4-single": 4 / 64,
    "fp4-single": 4 / 64,
}
"""Bytes of the scales per parameter."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A predicted peak.

    Attributes:
        moment: when it is reached: "loss", "last layer" or "step".
        parts: bytes by name, those of that moment.
    """

    moment: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def added_bytes(self) -> int:
        """What the run adds to a process that holds the base."""
        return self.total_bytes - self.parts["process"] - self.parts["base"]


def predict_memory(shape: ModelShape, work: Workload) -> Memory:
    """The peak of a run of such steps, after the base is loaded."""
    moments = (Memory(name, parts) for name, parts in _moments(shape, work).items())
    return max(moments, key=lambda memory: memory.total_bytes)


def trained_values(shape: ModelShape, work: Workload) -> int:
    """Values that the optimizer changes."""
    h, i, k, layers = shape.hidden, shape.inner, shape.key_width, shape.layers
    if work.trains == "all":
        return shape.parameters
    if work.trains == "ia3":
        return layers * (2 * k + i * shape.experts)
    if work.trains == "prefix":
        return layers * work.virtual_tokens * 2 * k
    if work.trains == "prompt":
        return work.virtual_tokens * h
    if work.trains == "bitfit":
        return layers * sum(module.copies * module.out_features for module in shape.modules)
    magnitudes = 1 if work.trains == "dora" else 0
    return layers * sum(
        module.copies
        * (work.rank * (module.in_features + module.out_features) + magnitudes * module.out_features)
        for module in shape.targeted(work.targets)
    )


def base_bytes(shape: ModelShape, work: Workload) -> int:
    """Of the weights as they are kept."""
    whole = shape.table_parameters + shape.norm_parameters
    return int(whole * work.activation_bytes + shape.linear_parameters * _linear_value_bytes(shape, work))


def _linear_value_bytes(shape: ModelShape, work: Workload) -> float:
    if work.storage == "none":
        return work.activation_bytes
    if work.storage == "int8":
        rows = sum(module.copies * module.out_features for module in shape.modules) * shape.layers
        return 1 + 4 * rows / shape.linear_parameters
    return 0.5 + _BLOCK_BYTES[work.storage]


def _moments(shape: ModelShape, work: Workload) -> dict[str, dict[str, int]]:
    layer = layer_bytes(shape, work)
    kept = shape.layers * _kept_per_layer(shape, work, layer.total)
    gradients = trained_values(shape, work) * work.trained_value_bytes
    already = gradients if work.accumulates else 0
    head = shape.vocabulary * shape.hidden * work.trained_value_bytes if work.trains == "all" else 0
    constant = _constant_parts(shape, work)
    recomputed = layer.total if work.checkpointing else 0
    space = {"workspace": _workspace(shape, work), "dequantising": _dequantising(shape, work)}
    return {
        "loss": constant | {"gradients": already, "activations": kept, "logits": _logits(shape, work)},
        "last layer": constant | {"gradients": max(already, head), "activations": kept + recomputed} | space,
        "step": constant | {"gradients": gradients, "activations": layer.total} | space,
    }


def _constant_parts(shape: ModelShape, work: Workload) -> dict[str, int]:
    values = trained_values(shape, work)
    added = 0 if work.trains == "all" else values * work.trained_value_bytes
    return {
        "process": _PROCESS_BYTES[work.place],
        "base": base_bytes(shape, work),
        "trained": added,
        "optimizer": int(values * _state_bytes(work)),
    }


def _state_bytes(work: Workload) -> float:
    return 2 * work.trained_value_bytes if work.optimizer == "adamw" else 2 * (1 + 4 / 256)


def _kept_per_layer(shape: ModelShape, work: Workload, layer_total: int) -> int:
    if work.checkpointing:
        return work.tokens * shape.hidden * work.activation_bytes
    return layer_total


def _logits(shape: ModelShape, work: Workload) -> int:
    return 3 * work.kept_rows * shape.vocabulary * _FLOAT32


def _workspace(shape: ModelShape, work: Workload) -> int:
    a, inner = work.activation_bytes, shape.inner * shape.active_experts
    cast = inner * work.product_bytes if work.product_bytes != a else 0
    return work.tokens * (3 * inner * a + 3 * shape.hidden * a + cast)


def _dequantising(shape: ModelShape, work: Workload) -> int:
    largest = max(module.in_features * module.out_features for module in shape.modules)
    built = 3 * largest * _FLOAT32 if work.trains == "dora" else 0
    if work.storage == "none":
        return built
    changed = work.activation_bytes if work.product_bytes != work.activation_bytes else 0
    return built + largest * (work.product_bytes + changed)
