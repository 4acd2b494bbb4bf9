"""Turns a Batch into tensors and logits. Knows neither queues nor grpc.

T tokens of the batch, S rows that need logits, V vocabulary.
"""

import logging
from collections.abc import Iterable
from collections.abc import Sequence as Items
from itertools import groupby

import torch
from torch import Tensor

from adapters.base import Base
from adapters.layers import AdapterSlots, MultiLoraLinear, attach_slots
from kernels.lora import Segment, Segments
from kernels.paged_attention import AttentionPlan, PrefillSegment
from kernels.paging import MAX_WIDTH, PagedRows
from kernels.screen import ScreenedHead, can_be_screened
from kernels.varlen import VarlenAttention, varlen_for
from server.batch import Batch
from server.direct import DirectForward, direct_forward, head_is_last, model_forward
from server.fusion import NativeCaches, fuse_layers
from server.kv_cache import (
    KVCache,
    NativeStep,
    PagedStep,
    Step,
    VarlenStep,
    bytes_per_token,
    use_paged_attention,
)
from server.probe import probe_layers
from server.sampler import Scores
from server.step_tensors import StepBuffers

log = logging.getLogger(__name__)

_SCREENED_ROWS = 4
"""With more the products take longer than reading: 4 rows 1.4 ms against 2.1, 8 rows 2.5 against 2.2."""


class ModelRunner:
    """The base with paged attention and adapter slots; one forward pass per call, in one thread.

    Attributes:
        fused_layers: decoder layers that native code computes.
        direct: what surrounds them, part by part; None if the model's own code is needed for it.
    """

    def __init__(self, base: Base, *, fuse_layers: bool = True, screen_head: bool = False) -> None:
        """
        Args:
            fuse_layers: whether native code may compute whole decoder layers, where that is the same.
            screen_head: whether a shorter copy of the output head may be made, to find likeliest tokens with.

        Raises:
            UnsupportedBaseError: the architecture keeps state that paged attention cannot hold.
        """
        self._model = base.model
        self._device, self._storage = base.device, base.storage_dtype
        self._probe = probe_layers(base.model, base.device)
        use_paged_attention(base.model)
        narrow = all(shape.value_width <= MAX_WIDTH for shape in self._probe.shapes.values())
        self._native = base.kernels == "native" and narrow
        self._varlen = self._varlen_of_device(base)
        self._fuse = fuse_layers and self._native and base.dtype == torch.float32
        self.slots: AdapterSlots = attach_slots(base.model, base.layout)
        self._forward = model_forward(base.model)
        self.fused_layers = 0
        self.direct: DirectForward | None = None
        self._head = base.model.get_output_embeddings()
        self._screen = self._screen_of(base) if screen_head and self._fuse else None

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one cached position over all layers."""
        return bytes_per_token(self._probe.shapes, self._storage)

    def allocate_cache(self, block_count: int, block_tokens: int) -> None:
        """Makes room for so many blocks of keys and values; once, before the first step."""
        self._block_tokens = block_tokens
        spare = 0 if self._varlen is None else 1
        self.cache = KVCache(
            self._probe.shapes, block_count + spare, block_tokens, dtype=self._storage, device=self._device
        )
        self._buffers = StepBuffers(self._device, block_tokens, block_count)
        if self._native:
            self._records = self.cache.native_records()
        if self._fuse:
            caches = NativeCaches(self._records, block_count, block_tokens)
            fused = fuse_layers(self._model, self._probe, caches, self.slots.routing)
            self.fused_layers = sum(len(layers) for layers in fused)
            self.direct = direct_forward(self._model, fused[0], caches) if len(fused) == 1 else None
            self._forward = self.direct or self._forward
        if self.direct is None:
            self._screen = None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Computes a batch and returns float32 logits [S, V] of its sampling rows, in order."""
        self._route(batch)
        return self._forward(*self._inputs(batch))[: sum(row.samples for row in batch.rows)].float()

    @torch.inference_mode()
    def scores(self, batch: Batch) -> Scores:
        """Computes a batch; what its sampling rows need to know of their next tokens, in order."""
        if self._screen is None or self.direct is None or not self._can_screen(batch):
            return Scores.of(self.run(batch))
        self._route(batch)
        return Scores(self._screen.likeliest(self.direct.hidden(*self._inputs(batch)).contiguous()))

    def free_spare_memory(self) -> None:
        """Gives back what the device's allocator keeps for later, after an allocation failed."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks that may hold values that are not finite: masking alone does not keep those out."""
        if blocks:
            index = self._tensor(blocks)
            for layer in self.cache.layers.values():
                layer.k_NSKE.index_fill_(0, index, 0.0)
                layer.v_NSKE.index_fill_(0, index, 0.0)

    def _route(self, batch: Batch) -> None:
        rows, sampling = batch.rows, [row for row in batch.rows if row.samples]
        self.slots.routing.segments = _segments((*row.route, row.count) for row in rows)
        self.slots.head_routing.segments = _segments((*row.route, row.samples) for row in sampling)

    def _can_screen(self, batch: Batch) -> bool:
        """Whether all rows want their likeliest token alone, few enough that reading the head is the work."""
        sampling = [row.sequence for row in batch.rows if row.samples]
        return 0 < len(sampling) <= _SCREENED_ROWS and not any(
            sequence.request.sampling.needs_logits or self._head.packed.has_slot(sequence.slot)
            for sequence in sampling
        )

    def _screen_of(self, base: Base) -> ScreenedHead | None:
        packed = self._head.packed if isinstance(self._head, MultiLoraLinear) else None
        if packed is None or not (can_be_screened(packed) and head_is_last(base.model.config)):
            return None
        screen = ScreenedHead(packed)
        log.info("output head screened with a copy of %d bytes", screen.nbytes)
        return screen

    def _varlen_of_device(self, base: Base) -> VarlenAttention | None:
        widths = [(shape.key_width, shape.value_width) for shape in self._probe.shapes.values()]
        return varlen_for(base.device, base.dtype, base.storage_dtype, self._probe.rules.values(), widths)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Step]:
        """What `_forward` takes."""
        if self._varlen is not None:
            tensors = self._buffers.fill(batch)
            step = VarlenStep(tensors.plan, self.cache.layers, self._varlen)
            return tensors.ids_T, tensors.positions_T, tensors.rows_S, step
        ids_T, positions_T, rows_S = map(self._tensor, _flatten(batch))
        if self._native:
            return ids_T, positions_T, rows_S, NativeStep(self._rows(batch), self._records)
        return ids_T, positions_T, rows_S, PagedStep(self._plan(batch), self.cache.layers)

    def _rows(self, batch: Batch) -> PagedRows:
        positions: list[int] = []
        sequences: list[int] = []
        for index, row in enumerate(batch.rows):
            positions += row.positions
            sequences += [index] * row.count
        tables = [row.blocks(self._block_tokens) for row in batch.rows]
        return PagedRows(positions, sequences, tables, self._block_tokens)

    def _plan(self, batch: Batch) -> AttentionPlan:
        decodes = [row for row in batch.rows if row.is_decode]
        prefills, start = [], len(decodes)
        for row in batch.rows[start:]:
            blocks = self._tensor(row.blocks(self._block_tokens))
            prefills.append(PrefillSegment(start, start + row.count, row.start, blocks))
            start += row.count
        tables = _padded([row.blocks(self._block_tokens) for row in decodes])
        return AttentionPlan(
            write_T=self._tensor([slot for row in batch.rows for slot in row.slots(self._block_tokens)]),
            decode_rows=len(decodes),
            decode_blocks_BM=self._tensor(tables) if decodes else None,
            decode_lengths_B=self._tensor([row.start + 1 for row in decodes]) if decodes else None,
            prefills=tuple(prefills),
        )

    def _tensor(self, values: Items[int] | Items[Items[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self._device, non_blocking=True)


def _flatten(batch: Batch) -> tuple[list[int], list[int], list[int]]:
    """Token ids and positions of T tokens, and the indices in T that need logits."""
    token_ids: list[int] = []
    positions: list[int] = []
    sample_rows: list[int] = []
    for row in batch.rows:
        end = row.start + row.count
        token_ids.extend(row.sequence.token_ids[row.start : end])
        positions.extend(range(row.start, end))
        sample_rows.extend(range(len(token_ids) - row.samples, len(token_ids)))
    return token_ids, positions, sample_rows


def _segments(routes: Iterable[tuple[int, float, int]]) -> Segments:
    """Slot, scale and number of tokens to segments: neighbours of one route are one; the base needs none."""
    segments: list[Segment] = []
    position = 0
    for (slot, scale), group in groupby(routes, key=lambda route: route[:2]):
        end = position + sum(count for _, _, count in group)
        if slot:
            segments.append(Segment(position, end, slot, scale))
        position = end
    return Segments(segments)


def _padded(rows: list[list[int]]) -> list[list[int]]:
    width = max(map(len, rows), default=0)
    return [row + row[-1:] * (width - len(row)) for row in rows]
