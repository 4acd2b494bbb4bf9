"""Adapters that want more than to be applied: nothing of theirs runs, and nothing of ours changes.

Rows of the fault table: 13 (what does not fit), 14 (fuzzed headers and JSON), 15 (names), 16 (code).
That the base in the server's memory stays the same bits is seen by the `server` fixture, after all tests.
"""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base import load_base
from quickchange import CheckOutcome, Client, InvalidArgumentError, QuickchangeError
from tests.e2e import witness
from tests.e2e.process import ServerProcess, eventually
from tests.e2e.spoiling import (
    CONFIG,
    MANIFEST,
    PAYLOAD,
    WEIGHTS,
    trace_of,
    with_config,
    with_header,
    with_tensors,
)
from tests.e2e.test_uploads import contents

LAYER_0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LAYER_1_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def copy(adapters: Mapping[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters["a"], tmp_path / "copy"))


@pytest.fixture
def untouched(server: ServerProcess, pushed: Mapping[str, str], tmp_path: Path) -> Iterator[Path]:
    """A file that nothing may create; afterwards store and answers are what they were."""
    trace = tmp_path / "trace"
    with server.client() as client:
        before = [a.etag for a in client.adapters.list()], contents(server.store)
        answer = client.generate("untouched", adapter="a", max_new_tokens=6).token_ids
        yield trace
        assert not trace.exists()
        eventually(lambda: contents(server.store) == before[1])
        assert [a.etag for a in client.adapters.list()] == before[0]
        assert client.generate("untouched", adapter="a", max_new_tokens=6).token_ids == answer


def refusal_of(client: Client, folder: Path) -> QuickchangeError:
    with pytest.raises(QuickchangeError) as caught:
        client.adapters.push(folder, "hostile")
    assert "/" not in caught.value.message  # no path of the server
    return caught.value


# Row 16: the payload never runs


class Payload:
    """Creates a file if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_the_payloads_would_run_if_anybody_let_them(tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()
    assert not trace_of(os.getpid()).exists()
    subprocess.run([sys.executable, "-c", f"import {PAYLOAD}"], check=True)
    trace_of(os.getpid()).unlink()


@pytest.mark.parametrize("form", ["pickle", "torch", "torch legacy", "pickle behind a length"])
def test_a_pickle_called_safetensors_never_runs(
    form: str, client: Client, copy: Path, untouched: Path
) -> None:
    payload, path = Payload(untouched), copy / WEIGHTS
    raw = pickle.dumps(payload)
    match form:
        case "pickle":
            path.write_bytes(raw)
        case "torch":
            torch.save(payload, path)
        case "torch legacy":
            torch.save(payload, path, _use_new_zipfile_serialization=False)
        case _:
            path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    error = refusal_of(client, copy)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "BAD_HEADER")


def test_a_pickle_beside_or_instead_of_the_weights_is_not_even_sent(
    client: Client, copy: Path, untouched: Path
) -> None:
    (copy / "adapter_model.bin").write_bytes(pickle.dumps(Payload(untouched)))
    assert client.adapters.push(copy, "hostile", validate_only=True).report.matched_module_count == 6
    (copy / WEIGHTS).unlink()
    with pytest.raises(InvalidArgumentError, match="a pickle that can run code"):
        client.adapters.push(copy, "hostile")


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_mapping": {"base_model_class": "Model", "parent_library": PAYLOAD}},
        {"parent_library": PAYLOAD},
        {"base_model_class": PAYLOAD},
        {"megatron_core": PAYLOAD},
        {"megatron_config": {"module": PAYLOAD}, "megatron_core": PAYLOAD},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_module_that_a_configuration_names_is_never_imported(
    fields: dict[str, Any], client: Client, server: ServerProcess, copy: Path, untouched: Path
) -> None:
    with_config(copy, **fields)
    error = refusal_of(client, copy)
    assert error.code == "FAILED_PRECONDITION"
    assert error.metadata["feature"] in fields
    # The server is a child of this process, and its workers are children of the server.
    assert not trace_of(os.getpid()).exists()
    assert not trace_of(server.process.pid).exists()


# What this server cannot apply is refused by its name, with what to do instead

UNSUPPORTED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "target_parameters": {"target_parameters": ["experts.weight"]},
    "use_qalora": {"use_qalora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "arrow_config": {"arrow_config": {"top_k": 2}},
    **{
        f"init_lora_weights {init}": {"init_lora_weights": init}
        for init in ("olora", "OLoRA", "pissa", "pissa_niter_4", "corda", "lora_ga", "loftq")
    },
    **{
        kind: {"peft_type": kind, "r": None, "lora_alpha": None}
        for kind in (
            "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "LOHA", "LOKR", "ADALORA", "VERA", "OFT",
            "BOFT", "TRAINABLE_TOKENS", "XLORA", "FUTURE_TUNING",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("fields", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_a_feature_that_is_not_applied_is_named(
    fields: dict[str, Any], client: Client, copy: Path, untouched: Path
) -> None:
    with_config(copy, **fields)
    error = refusal_of(client, copy)
    name, value = next(iter(fields.items()))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "UNSUPPORTED_ADAPTER")
    assert error.metadata["feature"] == (repr(value) if name == "peft_type" else name)
    assert name in error.message
    assert "; " in error.message  # the remedy
    assert error.report is not None
    check = error.report.check("configuration")
    assert check is not None
    assert (check.outcome, check.reason) == (CheckOutcome.FAILED, "UNSUPPORTED_ADAPTER")


@pytest.mark.parametrize(
    ("tensor", "feature"),
    [
        (LAYER_0_A.replace("lora_A.weight", "lora_magnitude_vector"), "lora_magnitude_vector"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "lora_embedding_A"),
        (LAYER_1_B.replace(".weight", ".bias"), "lora_B.bias"),
        ("base_model.model.lm_head.base_layer.weight", "base_layer"),
    ],
)
def test_tensors_of_what_is_not_applied_are_named(
    tensor: str, feature: str, client: Client, copy: Path, untouched: Path
) -> None:
    with_tensors(copy, lambda tensors: tensors.update({tensor: torch.ones(4, 64)}))
    error = refusal_of(client, copy)
    assert (error.code, error.metadata["feature"]) == ("FAILED_PRECONDITION", feature)
    assert tensor in error.message


# Row 13: what does not fit names the tensor, and all of it at once


def test_all_that_is_wrong_is_said_at_once(client: Client, copy: Path, untouched: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAYER_0_A] = torch.ones(4, 65)
        del tensors[LAYER_1_B]
        for index in range(30):
            tensors[f"base_model.model.model.layers.9.q_proj_{index:02}.lora_A.weight"] = torch.ones(1)

    with_tensors(copy, spoil)
    (copy / MANIFEST).write_text(json.dumps({"format": 1, "base_fingerprint": "sha256:" + "0" * 64}))
    error = refusal_of(client, copy)
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "WRONG_BASE")  # the first of them
    report = error.report
    assert report is not None
    assert report.declared_base_fingerprint == "sha256:" + "0" * 64
    assert report.base_fingerprint == client.server_info().base_fingerprint
    assert {check.name: check.outcome.value for check in report.checks} == {
        "files": "passed", "configuration": "passed", "manifest": "passed", "base": "failed",
        "modules": "passed", "ranks": "passed", "header": "passed", "tensors": "failed", "values": "skipped",
    }  # fmt: skip
    tensors = report.check("tensors")
    assert tensors is not None
    assert tensors.problem_count == 32
    assert "layers.9.q_proj_00" in tensors.problems[0]
    assert (report.unmatched_tensor_count, report.matched_module_count, report.rank) == (30, 6, 4)
    assert report.unmatched_tensors[0].endswith("layers.9.q_proj_00.lora_A.weight")


@pytest.mark.parametrize(
    ("spoil", "reason", "words"),
    [
        (lambda t: t.update({LAYER_0_A: t[LAYER_0_A].double()}), "BAD_DTYPE", LAYER_0_A),
        (lambda t: t.update({LAYER_0_A: torch.ones(5, 64)}), "SHAPE_MISMATCH", LAYER_0_A),
        (lambda t: t.update({LAYER_1_B: torch.ones(64, 4, 1)}), "SHAPE_MISMATCH", LAYER_1_B),
        (lambda t: t.pop(LAYER_1_B), "MISSING_TENSOR", LAYER_1_B),
        (lambda t: t.update({f"{LAYER_0_A}.x": torch.ones(1)}), "UNKNOWN_TENSOR", f"{LAYER_0_A}.x"),
        (lambda t: t[LAYER_0_A].fill_(float("inf")), "NOT_FINITE", LAYER_0_A),
        (lambda t: t[LAYER_1_B].fill_(1e30), "TOO_LARGE", "layers.1.self_attn.q_proj"),
    ],
    ids=["dtype", "rank", "shape", "missing", "unknown", "infinite", "absurd"],
)
def test_a_tensor_that_does_not_fit_is_named(
    spoil: Callable[[dict[str, torch.Tensor]], Any],
    reason: str,
    words: str,
    client: Client,
    copy: Path,
    untouched: Path,
) -> None:
    with_tensors(copy, spoil)
    error = refusal_of(client, copy)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", reason)
    assert words in error.message


def test_a_tensor_that_is_there_twice_is_named(client: Client, copy: Path, untouched: Path) -> None:
    with_header(copy, lambda text: text.replace(LAYER_1_B, LAYER_0_A))
    error = refusal_of(client, copy)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "BAD_JSON")
    assert LAYER_0_A in error.message


def test_a_target_that_the_base_does_not_have_is_named(client: Client, copy: Path, untouched: Path) -> None:
    with_config(copy, target_modules=["query_key_value"])
    error = refusal_of(client, copy)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "NO_TARGET")
    assert "query_key_value" in error.message


# Row 14: whatever the bytes, a quick answer and no memory

MEMORY_KIB = 64 * 1024


def mutated(raw: bytes, random_: random.Random) -> bytes:
    """The file with some bytes of its header overwritten, cut out, doubled, or its length changed."""
    length = int.from_bytes(raw[:8], "little")
    header = bytearray(raw[8 : 8 + length])
    for _ in range(random_.randint(1, 8)):
        at = random_.randrange(len(header))
        match random_.randrange(4):
            case 0:
                header[at] = random_.randrange(256)
            case 1:
                del header[at : at + random_.randint(1, 40)]
            case 2:
                header[at:at] = header[at : at + random_.randint(1, 40)]
            case _:
                header[at:at] = random_.choice([b"9" * 30, b"[" * 5000, b"-1", b'"', b"\\u0000", b"1e400"])
    claimed = random_.choice([len(header), length, random_.getrandbits(63), 2**64 - 1, 0])
    return claimed.to_bytes(8, "little") + bytes(header) + raw[8 + length :]


def test_fuzzed_headers_are_refused_and_cost_nothing(
    server: ServerProcess, client: Client, copy: Path, untouched: Path
) -> None:
    raw, random_ = (copy / WEIGHTS).read_bytes(), random.Random(5)
    before_kib = server.memory_kib
    codes: Counter[str] = Counter()
    for _ in range(60):
        (copy / WEIGHTS).write_bytes(mutated(raw, random_))
        try:
            client.adapters.push(copy, "fuzz", validate_only=True, timeout_s=30)
        except QuickchangeError as error:
            codes[error.code] += 1
        else:
            codes["taken"] += 1  # the changes hit nothing that counts
    assert codes.keys() <= {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "taken"}
    assert codes["taken"] < 10
    assert server.memory_kib - before_kib < MEMORY_KIB


HOSTILE_JSON = {
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 40_000,
    "deep and closed": b'{"target_modules":' + b"[" * 60_000 + b"]" * 60_000 + b"}",
    "huge number": b'{"r": ' + b"9" * 200_000 + b"}",
    "huge float": b'{"r": 1e999999}',
    "twice": b'{"r": 1, "r": 2}',
    "not utf-8": b'{"r": "\xff"}',
    "lone surrogate": b'{"peft_type": "\\ud800"}',
    "many keys": b"{" + b",".join(b'"k%d":1' % i for i in range(20_000)) + b"}",
    "nan": b'{"lora_alpha": NaN}',
    "empty": b" ",
}


@pytest.mark.parametrize("file", [CONFIG, MANIFEST])
@pytest.mark.parametrize("raw", HOSTILE_JSON.values(), ids=HOSTILE_JSON.keys())
def test_hostile_json_is_refused_and_costs_nothing(
    file: str, raw: bytes, server: ServerProcess, client: Client, copy: Path, untouched: Path
) -> None:
    before_kib = server.memory_kib
    (copy / file).write_bytes(raw)
    error = refusal_of(client, copy)
    assert error.code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    assert server.memory_kib - before_kib < MEMORY_KIB


def test_a_header_of_hostile_json_is_refused(client: Client, copy: Path, untouched: Path) -> None:
    for raw in HOSTILE_JSON.values():
        with_header(copy, lambda _, raw=raw: raw.decode("latin-1"))  # type: ignore[misc]  # bound at once
        assert refusal_of(client, copy).code == "INVALID_ARGUMENT"


def test_a_pattern_that_would_match_for_ever_is_refused(client: Client, copy: Path, untouched: Path) -> None:
    with_config(copy, target_modules="(.*.*.*.*.*.*.*.*.*.*.*.*)*x")
    assert refusal_of(client, copy).code == "INVALID_ARGUMENT"


# Row 15: names


@pytest.mark.parametrize(
    "name",
    [
        "../trace", "..", ".", "/trace", "a/../../trace", "a\\b", "trace\0", "\u202etrace", "ѕql", "ｓql",
        "sq\u200bl", "SQL", "sql ", "sql\n", "sha256", "_canary", "con:", "a" * 129,
    ],
)  # fmt: skip
def test_a_name_that_is_a_path_or_looks_like_another_is_refused(
    name: str, client: Client, copy: Path, untouched: Path
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.adapters.push(copy, name)
    assert caught.value.reason == "BAD_NAME"
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("elsewhere", ["file", "folder", "nothing"])
def test_a_link_to_a_file_is_sent_as_the_file_that_it_is(
    elsewhere: str, client: Client, copy: Path, untouched: Path, tmp_path: Path
) -> None:
    """Links are the sender's own business; a server never sees one, and never follows one of its own."""
    target = tmp_path / "elsewhere"
    if elsewhere == "file":
        (copy / WEIGHTS).rename(target)
    elif elsewhere == "folder":
        target.mkdir()
    (copy / WEIGHTS).unlink(missing_ok=True)
    (copy / WEIGHTS).symlink_to(target)
    if elsewhere == "file":
        client.adapters.push(copy, "linked", validate_only=True)
    else:
        with pytest.raises(InvalidArgumentError, match="has no adapter_model"):
            client.adapters.push(copy, "linked")


# The witness itself


def test_a_single_bit_of_the_base_is_noticed(base: Path) -> None:
    """What the `server` fixture compares can tell one bit, in packed weights and in plain ones."""
    loaded = load_base(str(base), quantization="none", dtype="float32", device="cpu", progress=False)
    digest = witness.weights_digest(loaded.model)
    assert digest == witness.weights_digest(loaded.model)
    names = [name for name, _ in witness._tensors(loaded.model)]
    assert len(names) > len(loaded.layout.modules)  # norms and embeddings too
    for name, tensor in witness._tensors(loaded.model):
        flat = tensor.detach().view(-1).view(torch.uint8)
        flat[0] ^= 1
        assert witness.weights_digest(loaded.model) != digest, name
        flat[0] ^= 1
    assert witness.weights_digest(loaded.model) == digest
