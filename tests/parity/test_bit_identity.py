"""Native code on NF4: a request's logits are the same bits, whatever runs beside it and however it is cut up.

A thousand random schedules: which sequences, which adapters, in what order, in chunks of what size, in which
blocks, with how many threads, and thrown out and computed again in the middle.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.base import load_base
from adapters.layers import MultiLoraLinear
from kernels.linear import unpacked_weight
from server.batch import Batch, Row
from server.request import Request, SamplingParams
from server.runner import ModelRunner
from server.sequence import Sequence
from tests.bench.steps import random_factors
from tests.kernels.conditions import PRECISIONS, needs_native
from tests.models import build_tiny_model

pytestmark = needs_native

BLOCK_TOKENS = 4
BLOCKS = 64
ANSWER = 4
RANKS = {1: 3, 2: 8, 3: 17}


@dataclass
class Track:
    """One sequence on its way through a schedule; its answer is given: only logits are in question."""

    tokens: tuple[int, ...]
    prompt: int
    slot: int
    sequence: Sequence = field(init=False)
    logits: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        request = Request("track", self.tokens[: self.prompt], SamplingParams())
        self.sequence = Sequence(request, len(self.tokens) + 1, 0.0)
        self.sequence.slot = self.slot

    @property
    def done(self) -> bool:
        return self.sequence.computed == len(self.tokens)

    def take(self, logits_V: Tensor) -> None:
        """Keeps the newest position's logits, and goes on with the given token."""
        position = self.sequence.computed - 1
        if position in self.logits:  # computed again: the same bits again
            assert torch.equal(self.logits[position], logits_V)
        self.logits[position] = logits_V
        if len(self.sequence.token_ids) < len(self.tokens):
            self.sequence.take(self.tokens[len(self.sequence.token_ids)])


def runner_of(folder: Path, cache: Path, *, fused: bool, precision: Any = "highest") -> ModelRunner:
    options: Any = {"device": "cpu", "kernels": "native", "cache_dir": cache, "progress": False}
    base = load_base(str(folder), matmul_precision=precision, **options)
    runner = ModelRunner(base, fuse_layers=fused)
    runner.allocate_cache(BLOCKS, BLOCK_TOKENS)
    assert bool(runner.fused_layers) == fused
    for slot, rank in RANKS.items():
        runner.slots.fill(slot, random_factors(base.layout, rank, slot, base.storage_dtype, scale=0.3))
    return runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base") / "tiny", "qwen3")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_tracks(dice: random.Random, count: int) -> list[Track]:
    tracks = []
    for _ in range(count):
        prompt = dice.choice([1, 2, 3, 5, 9, 14, 30])
        tokens = tuple(dice.randrange(256) for _ in range(prompt + ANSWER - 1))
        tracks.append(Track(tokens, prompt, dice.choice([0, 1, 1, 2, 3])))
    return tracks


def run_alone(runner: ModelRunner, track: Track) -> dict[int, Tensor]:
    """The whole prompt at once, then token by token, in the first blocks, with one thread."""
    torch.set_num_threads(1)
    alone = Track(track.tokens, track.prompt, track.slot)
    alone.sequence.blocks = list(range(-(-len(track.tokens) // BLOCK_TOKENS)))
    while not alone.done:
        step(runner, [(alone, alone.sequence.pending)])
    return alone.logits


def step(runner: ModelRunner, work: list[tuple[Track, int]]) -> None:
    rows = [Row(track.sequence, track.sequence.computed, count) for track, count in work]
    logits_SV = iter(runner.run(Batch(tuple(rows))))
    for row, (track, count) in zip(rows, work, strict=True):
        track.sequence.computed += count
        if row.start + count == len(track.sequence.token_ids):
            track.take(next(logits_SV).clone())


def run_schedule(runner: ModelRunner, dice: random.Random, tracks: list[Track]) -> None:
    free = list(range(BLOCKS))
    dice.shuffle(free)
    while running := [track for track in tracks if not track.done]:
        torch.set_num_threads(dice.choice([1, 2]))
        work = []
        for track in dice.sample(running, dice.randint(1, len(running))):
            sequence = track.sequence
            if sequence.computed and dice.random() < 0.08:  # preempted: its blocks go to others
                free += sequence.blocks
                dice.shuffle(free)
                sequence.blocks, sequence.computed = [], 0
            count = dice.randint(1, sequence.pending)
            while len(sequence.blocks) * BLOCK_TOKENS < sequence.computed + count:
                sequence.blocks.append(free.pop())
            work.append((track, count))
        step(runner, work)


def differing_schedules(runner: ModelRunner, schedules: int, seed: int) -> int:
    """How many schedules gave some logits other bits than the sequence alone."""
    dice, differing = random.Random(seed), 0
    for _ in range(schedules):
        tracks = random_tracks(dice, dice.randint(1, 5))
        alone = [run_alone(runner, track) for track in tracks]
        try:
            run_schedule(runner, dice, tracks)
            same = all(
                track.logits.keys() == expected.keys()
                and all(torch.equal(track.logits[at], logits) for at, logits in expected.items())
                for track, expected in zip(tracks, alone, strict=True)
            )
        except AssertionError:
            same = False
        differing += not same
    return differing


def test_adapters_and_base_differ(folder: Path, base_cache: Path) -> None:
    runner = runner_of(folder, base_cache, fused=True)
    tokens = tuple(range(40, 52))
    answers = [run_alone(runner, Track(tokens, 8, slot))[11] for slot in (0, *RANKS)]
    distances = [float((a - b).norm() / a.norm()) for i, a in enumerate(answers) for b in answers[:i]]
    assert min(distances) > 0.05


SCHEDULES = [("highest", True, 1000), ("highest", False, 150), ("medium", True, 300), ("medium", False, 50)]


@pytest.mark.parametrize(
    ("precision", "fused", "schedules"), [case for case in SCHEDULES if case[0] in PRECISIONS]
)
def test_random_schedules_give_the_same_bits(
    folder: Path, base_cache: Path, precision: str, fused: bool, schedules: int
) -> None:
    runner = runner_of(folder, base_cache, fused=fused, precision=precision)
    assert differing_schedules(runner, schedules, seed=1) == 0


def test_one_disturbed_order_of_summation_is_found(folder: Path, base_cache: Path) -> None:
    """One layer's product by torch's GEMM, whose order of summation depends on the number of rows."""
    runner = runner_of(folder, base_cache, fused=False)
    model = runner._model
    name = "model.layers.0.mlp.down_proj"
    disturbed = model.get_submodule(name)
    assert isinstance(disturbed, MultiLoraLinear)
    assert disturbed.packed is not None
    weights, scales = disturbed.packed.weights, disturbed.packed.scales
    plain = nn.Linear(disturbed.packed.in_features, disturbed.packed.out_features, bias=False)
    plain.weight.data = unpacked_weight(weights, scales, (plain.out_features, plain.in_features))
    model.set_submodule(name, plain)
    assert differing_schedules(runner, 50, seed=1) > 0
