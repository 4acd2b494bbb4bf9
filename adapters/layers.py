"""Linear layers that add each token's own adapter to the base's output. Knows factors by slot, not the store.

T tokens, D in-features, O out-features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from adapters.layout import BaseLayout
from adapters.native import NativeLinear
from kernels.linear import PackedLinear
from kernels.lora import LoraFactors, Segments, add_lora_delta


@dataclass(slots=True)
class Routing:
    """Which tokens of the current step use which slot; shared by every layer, set before each step."""

    segments: Segments = field(default_factory=Segments)


class MultiLoraLinear(nn.Module):
    """A base linear layer plus the low-rank update of whichever adapter each token uses.

    Slot 0 is the base: no factors, no cost. The base layer itself is never changed.

    Attributes:
        packed: the base in its native form, which applies the adapters itself; None if it has none.
    """

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.packed: PackedLinear | None = base.packed if isinstance(base, NativeLinear) else None
        self._factors: dict[int, LoraFactors] = {}

    def forward(self, x: Tensor) -> Tensor:
        """[…, T, D] → […, T, O]; all leading dimensions must be 1 while any segment is set."""
        segments = self.routing.segments
        if isinstance(self.base, NativeLinear):
            adapted: Tensor = self.base(x, segments)
            return adapted
        y: Tensor = self.base(x)
        if segments:
            add_lora_delta(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), segments, self._factors)
        return y

    def set_slot(self, slot: int, factors: LoraFactors | None) -> None:
        """Puts factors into a slot, or empties it with None."""
        if slot == 0:
            raise ValueError("slot 0 is the base and takes no factors")
        if self.packed is not None:
            self.packed.set_slot(slot, factors)
        elif factors is None:
            self._factors.pop(slot, None)
        else:
            self._factors[slot] = factors


class AdapterSlots:
    """The multi-adapter layers of one model, filled and emptied an adapter at a time.

    Attributes:
        routing: segments of the flattened batch.
        head_routing: segments of the rows that the output head sees, which are only those that need logits.
    """

    def __init__(
        self, routing: Routing, head_routing: Routing, layers: Mapping[str, MultiLoraLinear]
    ) -> None:
        self.routing = routing
        self.head_routing = head_routing
        self._layers = layers

    def fill(self, slot: int, factors: Mapping[str, LoraFactors]) -> None:
        """Puts an adapter into a slot; `factors` is by module name, modules it leaves out stay the base's."""
        for name, pair in factors.items():
            self._layers[name].set_slot(slot, pair)

    def clear(self, slot: int) -> None:
        """Empties a slot in every layer; its tensors are freed with the last reference."""
        for layer in self._layers.values():
            layer.set_slot(slot, None)


def attach_slots(model: nn.Module, layout: BaseLayout) -> AdapterSlots:
    """Wraps every linear module of a model in place."""
    routing, head_routing = Routing(), Routing()
    layers: dict[str, MultiLoraLinear] = {}
    for name in layout.modules:
        shared = head_routing if name == layout.head else routing
        layers[name] = MultiLoraLinear(model.get_submodule(name), shared)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    return AdapterSlots(routing, head_routing, layers)
