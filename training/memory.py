"""Owns the formula for a run's peak memory: named parts from the shape and one step. Knows no torch.

P parameters, R rank, D in-features, O out-features, L layers, V vocabulary, H hidden, T tokens of a batch,
padding included, N rows of logits (rows × kept columns); a bytes of an activation, p of a dequantised weight.

process        what the interpreter and the libraries take, and what loading leaves
base           linear layers: P·w; under NF4 and FP4 P·(1/2 + s), s = 4/64 bytes of a float32 scale a block
               of 64, with double quantisation 1/64 + 4/(64·256) (Dettmers et al. 2023: 0.5 → 0.127 bit a
               parameter); int8 P + 4 bytes a row. Embedding, head and norms: P·w. w is a, but 4 where the
               base's own weights are trained
trained        in float32: LoRA R·(D + O) a module, DoRA O more (the magnitudes), IA³ K + K + I a layer,
               prefix 2·K a virtual token and layer, prompt H a virtual token; full training and BitFit a
               copy of what they train, since the base stays as it is, and under autocast another P·p
gradients      4 bytes a trained value
optimizer      AdamW: 8 bytes a trained value; 8-bit: 2 bytes, and 2·4 bytes a block of 256
activations    what autograd keeps, training/activations.py; with checkpointing each layer's input H·a, and
               all of one layer while it is computed again
logits         3·N·V·4: the log-probabilities, their gradient, and the gradient of the logits
workspace      gradients of activations inside one MLP: 3·T·I·a and 3·T·H·a, and T·I·p where products are of
               another type
dequantising   the largest layer's weight: D·O·p, and D·O·a besides where the type changes on the way; DoRA
               builds B·A in full as well
heap           on a CPU with glibc: the activations once more, less gradients and states; half of them where
               outputs are scaled (DoRA, IA³); as much as the gradients at most where those are of the base's
               own weights. torch asks for blocks aligned to 64 bytes, and where the last step freed some
               glibc finds few again; what the first step of the optimizer makes goes there. So it is with
               layers that are computed again: seven tenths of the activations that checkpointing saves. The
               shares are measured (docs/guides/plan.md). With MALLOC_MMAP_THRESHOLD_ in the environment
               blocks are mapped one by one, and this part is 0

The parts are never all there at once. Three moments are compared, and the largest is the prediction:

loss           all activations and the logits
last layer     all activations, the workspace of the layer whose backward is the first
step           all gradients, the activations of one layer
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from training.activations import layer_bytes
from training.shape import LinearModule, ModelShape
from training.workload import Place, Trains, Workload

MIB: Final = 1024**2
_FLOAT32: Final = 4
_PROCESS_BYTES: Final[Mapping[Place, int]] = {"cpu": 460 * MIB, "cuda": 500 * MIB}
"""CPU: measured on Linux with torch 2.13 for CPUs, 411 MiB after the imports, 40 to 80 more after loading
a base. CUDA: context and kernels on the device, which no allocator counts; between 300 and 600 MiB by card,
not measured."""
_BLOCK_BYTES: Final[Mapping[str, float]] = {
    "nf4": 1 / 64 + 4 / (64 * 256),
    "fp4": 1 / 64 + 4 / (64 * 256),
    "nf4-single": 4 / 64,
    "fp4-single": 4 / 64,
}
"""Bytes of the scales per parameter."""

_FOUND_AGAIN: Final[Mapping[Trains, float]] = {"dora": 0.5, "ia3": 0.5}
"""What the heap finds again of the blocks that a step freed; of other methods' it finds nothing."""
_FOUND_AGAIN_RECOMPUTED: Final = 0.3


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
    match work.trains:
        case "all":
            return shape.parameters
        case "bitfit":
            return shape.bias_values
        case "prefix":
            return shape.layers * work.virtual_tokens * 2 * shape.key_width
        case "prompt":
            return work.virtual_tokens * shape.hidden
        case _:
            targets = shape.targeted(work.targets)
            return shape.layers * sum(module.copies * _values_added(module, work) for module in targets)


def _values_added(module: LinearModule, work: Workload) -> int:
    if work.trains == "ia3":
        return module.in_features if module.reads == "mlp product" else module.out_features
    magnitudes = module.out_features if work.trains == "dora" else 0
    return work.rank * (module.in_features + module.out_features) + magnitudes


def base_bytes(shape: ModelShape, work: Workload) -> int:
    """Of the weights as they are kept."""
    whole = shape.table_parameters + shape.norm_parameters
    return int(whole * work.weight_bytes + shape.linear_parameters * _linear_value_bytes(shape, work))


def _linear_value_bytes(shape: ModelShape, work: Workload) -> float:
    if work.storage == "none":
        return work.weight_bytes
    if work.storage == "int8":
        rows = sum(module.copies * module.out_features for module in shape.modules) * shape.layers
        return 1 + 4 * rows / shape.linear_parameters
    return 0.5 + _BLOCK_BYTES[work.storage]


def _moments(shape: ModelShape, work: Workload) -> dict[str, dict[str, int]]:
    layer = layer_bytes(shape, work)
    kept = shape.layers * _kept_per_layer(shape, work, layer.total)
    gradients = trained_values(shape, work) * _FLOAT32
    already = gradients if work.accumulates else 0
    head = shape.vocabulary * shape.hidden * _FLOAT32 if work.trains == "all" else 0
    recomputed = layer.total if work.checkpointing else 0
    constant = _constant_parts(shape, work)
    constant["heap"] = _heap(shape, work, layer.total, gradients) if work.heap_keeps else 0
    space = {"workspace": _workspace(shape, work), "dequantising": _dequantising(shape, work)}
    return {
        "loss": constant | {"gradients": already, "activations": kept, "logits": _logits(shape, work)},
        "last layer": constant | {"gradients": max(already, head), "activations": kept + recomputed} | space,
        "step": constant | {"gradients": gradients, "activations": layer.total} | space,
    }


def _heap(shape: ModelShape, work: Workload, layer_total: int, gradients: int) -> int:
    """What the C heap takes for a step's activations besides those that it has freed."""
    found = _FOUND_AGAIN_RECOMPUTED if work.checkpointing else _FOUND_AGAIN.get(work.trains, 0.0)
    anew = int((1 - found) * shape.layers * layer_total)
    if work.trains == "all":
        return min(anew, gradients)
    return max(0, anew - gradients - int(trained_values(shape, work) * _state_bytes(work)))


def _constant_parts(shape: ModelShape, work: Workload) -> dict[str, int]:
    values = trained_values(shape, work)
    casts = shape.linear_parameters * work.product_bytes if _casts_weights(work) else 0
    return {
        "process": _PROCESS_BYTES[work.place],
        "base": base_bytes(shape, work),
        "trained": values * _FLOAT32 + casts,
        "optimizer": int(values * _state_bytes(work)),
    }


def _casts_weights(work: Workload) -> bool:
    """Autocast keeps a copy of each float32 weight in the products' type until the backward pass."""
    return work.trains_own_weights and work.product_bytes != _FLOAT32


def _state_bytes(work: Workload) -> float:
    return 2 * (1 + 4 / 256) if work.optimizer.endswith("8bit") else 2 * _FLOAT32


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
