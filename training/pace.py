"""Owns how long a training step takes, from its operations and a device's rates. Knows no torch.

T tokens with their padding, N rows of logits, W columns, A width of all queries, P linear parameters that a
token meets, H hidden, V vocabulary. Multiply and add count as two operations:

forward      2·P·T + 2·V·H·N + 4·W·A·T       linear layers, output head, scores and weighted values
backward     the same for a frozen base (gradients of activations alone), twice that for full training,
             and 4·values·T for what is added (Kaplan et al. 2020: 2 P forward, 4 P backward)
recomputing  one forward more with checkpointing

A device's rate of products, times _UTILISATION on a card that is not here, gives the seconds. On a CPU two
short measurements replace both: a product of the model's own widths, and a pass over activations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from training.activations import layer_bytes
from training.memory import trained_values
from training.shape import ModelShape
from training.workload import Place, Workload

GB: Final = 1000**3
_UTILISATION: Final = 0.4
"""Of a card's peak that training reaches: 0.3 to 0.6 are reported, torchtune's Llama-3.1-8B on a 4090
(1650 tokens/s full, 3083 LoRA) is 0.48 and 0.60 of its peak in these operations."""
_PASSES: Final = 4
"""Over each byte that is kept: written and read in the forward pass, both again in the backward pass."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a run would be.

    Attributes:
        memory_bytes: that a run may take: what is free here, all of it on a card that is not here.
        operations_per_s: of matrix products, as training reaches them.
        activation_bytes_per_s: of elementwise passes; None where the utilisation accounts for them.
        estimated: whether the rates are a data sheet's and not measured.
    """

    name: str
    place: Place
    memory_bytes: int
    operations_per_s: float
    activation_bytes_per_s: float | None
    estimated: bool


def _card(name: str, memory_gb: float, peak_tflops: float) -> Device:
    return Device(name, "cuda", int(memory_gb * GB), peak_tflops * 1e12 * _UTILISATION, None, True)


CARDS: Final[Mapping[str, Device]] = {
    card.name: card
    for card in (
        _card("h200", 141, 989),
        _card("h100", 80, 989),
        _card("a100", 80, 312),
        _card("a100-40gb", 40, 312),
        _card("l40s", 48, 362),
        _card("l4", 24, 121),
        _card("rtx4090", 24, 165),
        _card("rtx3090", 24, 71),
        _card("t4", 16, 65),
    )
}
"""Memory in GB, and dense bfloat16 products with float32 sums in TFLOP/s, from NVIDIA's data sheets (SXM for
H200, H100 and A100; sparse figures halved); a T4 has no bfloat16, its figure is float16's."""


def operations(shape: ModelShape, work: Workload) -> float:
    """Of one batch, forward and backward."""
    tokens = work.tokens
    forward = (
        2.0 * shape.active_linear_parameters * tokens
        + 2.0 * shape.vocabulary * shape.hidden * work.kept_rows
        + 4.0 * work.key_columns * shape.query_width * tokens * shape.layers
    )
    backward = forward * (2 if work.trains == "all" else 1)
    added = 0.0 if work.trains == "all" else 6.0 * trained_values(shape, work) * tokens
    return forward * (2 if work.checkpointing else 1) + backward + added


def seconds_per_batch(shape: ModelShape, work: Workload, device: Device) -> float:
    products = operations(shape, work) / device.operations_per_s
    if device.activation_bytes_per_s is None:
        return products
    kept = layer_bytes(shape, work).total * shape.layers * (2 if work.checkpointing else 1)
    return products + _PASSES * kept / device.activation_bytes_per_s
