"""Exact mode: greedy tokens equal transformers + PEFT, alone and mixed, in any order, chunks and slots."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.base import load_base
from kernels.varlen import varlen_reference
from server.request import FinishReason, SamplingParams
from tests.adapters.builders import make_adapter, tiny_model
from tests.kernels.conditions import KERNELS
from tests.models import (
    ARCHITECTURES,
    FAMILIES,
    Architecture,
    Family,
    Projections,
    build_tiny_model,
    rewrite_config,
)
from tests.parity.harness import Ask, Harness
from tests.parity.oracle import Oracle

VOCABULARY = 256

ADAPTERS = ("all", "rs", "patterns", "partial")


def adapter_configs(of: Projections) -> dict[str, dict[str, object]]:
    """A configuration for each of ADAPTERS, on the modules that a family has."""
    return {
        "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "rs": {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": [of.query, of.value, of.down]},
        "patterns": {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": rf".*\.({of.key}|{of.up}|{of.output})",
            "rank_pattern": {of.up: 7, rf"\w+\.1\.\w+\.{of.key}": 3},
            "alpha_pattern": {of.output: 16},
        },
        "partial": {"r": 1, "target_modules": [of.query, of.gate], "layers_to_transform": [1]},
    }


@dataclass
class Setup:
    family: Family
    folder: Path
    adapters: dict[str, Path]
    oracle: Oracle


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "harness" in metafunc.fixturenames:
        metafunc.parametrize(("setup", "harness"), CASES, indirect=True, scope="module")
    elif "setup" in metafunc.fixturenames:
        metafunc.parametrize("setup", ARCHITECTURES, indirect=True, scope="module")


@pytest.fixture(scope="module")
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    family = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    model = tiny_model(root / "base", request.param)
    adapters = {
        name: make_adapter(model, root / name, seed=seed, **config)
        for seed, (name, config) in enumerate(adapter_configs(family.projections).items())
    }
    return Setup(family, root / "base", adapters, Oracle(root / "base", adapters))


@dataclass(frozen=True)
class Form:
    """What computes: native code layer by layer or module by module, or torch.

    Attributes:
        varlen: attention as on CUDA, all sequences at once and decode steps padded; its reference stands in.
    """

    kernels: str
    fused_layers: str
    varlen: bool = False


FORMS = {
    "fused": Form("native", "auto"),
    "modules": Form("native", "off"),
    "torch": Form("torch", "off"),
    "varlen": Form("torch", "off", varlen=True),
}
FORMS_HERE = [name for name, form in FORMS.items() if form.kernels in KERNELS]


def forms_of(family: Family) -> list[str]:
    """Where layers are not fused, "fused" runs module by module."""
    return [name for name in FORMS_HERE if family.fused or name != "modules"]


def marks_of(architecture: Architecture, form: str) -> list[pytest.MarkDecorator]:
    """In torch the families differ in what their attention does, and these few do all of it."""
    if form == "varlen":
        often = architecture in ALWAYS_VARLEN
    else:
        often = form != "torch" or "native" not in KERNELS or architecture in ALWAYS_IN_TORCH
    return [] if often else [pytest.mark.slow]


ALWAYS_IN_TORCH = {"llama", "mistral", "gemma2", "gpt_neox"}
ALWAYS_VARLEN = {"mistral"}
CASES = [
    pytest.param(architecture, form, marks=marks_of(architecture, form))
    for architecture, family in FAMILIES.items()
    for form in forms_of(family)
]


def harness_of(setup: Setup, folder: Path, form: Form = FORMS[FORMS_HERE[0]], **settings: int) -> Harness:
    base = load_base(
        str(setup.folder),
        quantization="none",
        dtype="float32",
        device="cpu",
        kernels=form.kernels,  # type: ignore[arg-type]
        progress=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        if form.varlen:
            patch.setattr("server.runner.varlen_for", lambda *_: varlen_reference)
        return Harness(base, folder, setup.adapters, fused_layers=form.fused_layers, **settings)


@pytest.fixture(scope="module")
def harness(
    request: pytest.FixtureRequest, setup: Setup, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Harness]:
    harness = harness_of(
        setup,
        tmp_path_factory.mktemp("store"),
        FORMS[request.param],
        prefill_chunk_tokens=5,
        max_batch_tokens=40,
        max_running_requests=32,
        block_tokens=4,
    )
    fused = request.param == "fused" and setup.family.fused
    assert harness.core.runner.fused_layers == (setup.family.layers if fused else 0)
    yield harness
    harness.close()


def random_asks(count: int, seed: int) -> list[Ask]:
    generator = random.Random(seed)
    names = ["", *ADAPTERS]
    return [
        Ask(
            prompt=tuple(
                generator.randrange(VOCABULARY) for _ in range(generator.choice([1, 2, 5, 6, 17, 33]))
            ),
            adapter=names[index % len(names)],
            max_new_tokens=generator.choice([1, 4, 12]),
            arrival=generator.choice([0, 0, 1, 4]),
        )
        for index in range(count)
    ]


def expected(setup: Setup, ask: Ask) -> tuple[int, ...]:
    return tuple(setup.oracle.greedy(ask.prompt, ask.adapter, ask.max_new_tokens))


def test_base_and_adapters_differ(setup: Setup) -> None:
    prompt = tuple(range(10, 20))
    answers = {tuple(setup.oracle.greedy(prompt, name, 12)) for name in ["", *ADAPTERS]}
    assert len(answers) == len(ADAPTERS) + 1


@pytest.mark.parametrize(
    ("architecture", "key"), [(name, key) for name, family in FAMILIES.items() for key in family.plain]
)
def test_what_sets_a_family_apart_is_on(architecture: Architecture, key: str, tmp_path: Path) -> None:
    folder, ids = build_tiny_model(tmp_path, architecture), torch.arange(10, 40)[None]
    found = []
    for changes in ({}, {key: FAMILIES[architecture].plain[key]}):
        rewrite_config(folder, **changes)
        with torch.inference_mode():
            found.append(AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits)
    assert float((found[0] - found[1]).norm() / found[0].norm()) > 0.02


def test_each_request_alone(setup: Setup, harness: Harness) -> None:
    for ask in random_asks(10, seed=1):
        alone = replace(ask, arrival=0)
        assert harness.run([alone])[0].token_ids == expected(setup, ask)


@pytest.mark.parametrize("seed", [2, 3])
def test_all_mixed_in_one_batch_in_any_order(setup: Setup, harness: Harness, seed: int) -> None:
    asks = random_asks(20, seed)
    random.Random(seed).shuffle(asks)
    before = harness.core.counters.max_adapters_in_step
    answers = harness.run(asks)
    assert harness.core.counters.max_adapters_in_step >= max(before, 3)
    for ask, answer in zip(asks, answers, strict=True):
        assert answer.token_ids == expected(setup, ask), ask


def test_answers_that_are_given_have_the_oracles_log_probabilities(setup: Setup, harness: Harness) -> None:
    """Beside others that are still being answered; any tokens will do as an answer."""
    asks = [
        replace(
            ask,
            given=tuple(range(40, 40 + count)),
            sampling=SamplingParams(max_new_tokens=count, logprobs=1, ignore_eos=True),
        )
        for ask, count in zip(random_asks(8, seed=5), (1, 2, 5, 9) * 2, strict=True)
    ]
    for ask, answer in zip(asks, harness.run([*asks, *random_asks(8, seed=6)])[: len(asks)], strict=True):
        tokens = (*ask.prompt, *ask.given)
        found = setup.oracle.logits(tokens, ask.adapter).log_softmax(-1)[len(ask.prompt) - 1 : -1]
        assert answer.token_ids == ask.given
        for position, judged in enumerate(answer.logprobs):
            assert judged.logprob == pytest.approx(float(found[position, judged.token_id]), abs=1e-3)
            assert judged.alternatives[0][1] == pytest.approx(float(found[position].max()), abs=1e-3)


def test_room_for_one_adapter_at_a_time_changes_no_token(setup: Setup, tmp_path: Path) -> None:
    probe = harness_of(setup, tmp_path / "probe")
    sizes = [probe.store.resolve(name).facts.parameter_count * 4 for name in ADAPTERS]
    probe.close()
    harness = harness_of(setup, tmp_path / "store", adapter_device_bytes=max(sizes), prefill_chunk_tokens=3)
    asks = random_asks(10, seed=4)
    for ask, answer in zip(asks, harness.run(asks), strict=True):
        assert answer.token_ids == expected(setup, ask), ask
    assert harness.core.residency.used_bytes <= max(sizes)
    harness.close()


def test_everything_forced_on_at_once_changes_no_token(setup: Setup, tmp_path: Path) -> None:
    """Preemption, prefix hits, chunks, fairness between adapters, eviction: all within one run."""
    probe = harness_of(setup, tmp_path / "probe")
    adapter_bytes = max(probe.store.resolve(name).facts.parameter_count * 4 for name in ADAPTERS)
    block_bytes = probe.core.runner.kv_bytes_per_token * 4
    probe.close()
    harness = harness_of(
        setup,
        tmp_path / "store",
        adapter_device_bytes=adapter_bytes,
        kv_bytes=20 * block_bytes,
        block_tokens=4,
        prefill_chunk_tokens=5,
        max_batch_tokens=12,
        max_running_requests=6,
    )
    asks = [replace(ask, max_new_tokens=20) for ask in random_asks(12, seed=6)]
    asks += [replace(asks[index // 3], arrival=30 + 3 * index) for index in range(12)]
    answers = harness.run(asks)
    longest = max(asks, key=lambda ask: len(ask.prompt))
    for _ in range(2):  # at once after its like: the second finds what the first left
        asks.append(replace(longest, arrival=0))
        answers += harness.run(asks[-1:])
    for ask, answer in zip(asks, answers, strict=True):
        assert answer.token_ids == expected(setup, ask), ask
    assert harness.core.scheduler.preemptions > 0
    assert harness.evictions > 0
    assert any(answer.finished.cached_tokens for answer in answers)
    harness.close()


def test_a_stop_token_ends_the_answer(setup: Setup, harness: Harness) -> None:
    prompt = tuple(range(30, 40))
    tokens = setup.oracle.greedy(prompt, "all", 12)
    sampling = SamplingParams(max_new_tokens=12, stop_token_ids=frozenset({tokens[3]}))
    answer = harness.run([Ask(prompt, "all", sampling=sampling)])[0]
    assert list(answer.token_ids) == tokens[: tokens.index(tokens[3]) + 1]
    assert answer.finished.reason is FinishReason.STOP


def test_a_seeded_request_is_the_same_alone_and_among_others(harness: Harness) -> None:
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=7)
    mine = Ask(tuple(range(40, 50)), "rs", sampling=sampling)
    alone = harness.run([mine])[0].token_ids
    among = harness.run([*random_asks(10, seed=5), mine])[-1].token_ids
    other_seed = harness.run([replace(mine, sampling=replace(sampling, seed=8))])[0].token_ids
    assert alone == among
    assert alone != other_seed


def test_a_sliding_window_forgets_what_the_oracle_forgets(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "base", "mistral")
    adapter = make_adapter(model, tmp_path / "a", r=4)
    long = Ask(tuple(range(10, 50)), "a", 12)
    answers = {}
    for window in (None, 6):
        rewrite_config(tmp_path / "base", sliding_window=window)
        adapters = {"a": adapter}
        setup = Setup(FAMILIES["mistral"], tmp_path / "base", adapters, Oracle(tmp_path / "base", adapters))
        harness = harness_of(setup, tmp_path / f"store{window}", prefill_chunk_tokens=5, block_tokens=4)
        answers[window] = harness.run([long, replace(long, adapter="")])[0].token_ids
        assert answers[window] == expected(setup, long)
        harness.close()
    assert answers[None] != answers[6]
