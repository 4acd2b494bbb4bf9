"""The report of an adapter's checks: every check that can run does, and each says all that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from adapters.bundle import Bundle
from adapters.errors import AdapterError, WrongBaseError
from adapters.files import BUNDLE_FILE, CONFIG_FILE, WEIGHTS_FILE
from adapters.layout import BaseLayout, ModuleShape
from adapters.report import MAX_LISTED, Outcome
from adapters.validate import Examination, examine_adapter, validate_adapter
from tests.adapters.builders import FINGERPRINT, config_of, make_adapter

ALL = ("files", "configuration", "manifest", "base", "modules", "ranks", "header", "tensors", "values")


@pytest.fixture
def adapter(llama: PreTrainedModel, tmp_path: Path) -> Path:
    return make_adapter(llama, tmp_path / "adapter", rank_pattern={"v_proj": 8}, alpha_pattern={"q_proj": 2})


def outcomes(examination: Examination) -> dict[str, str]:
    return {check.name: check.outcome.value for check in examination.report.checks}


def problems_of(examination: Examination, name: str) -> tuple[str, ...]:
    return next(check for check in examination.report.checks if check.name == name).problems


def test_of_an_adapter_that_passes(adapter: Path, layout: BaseLayout) -> None:
    (adapter / BUNDLE_FILE).write_text(Bundle(FINGERPRINT, seed=7).to_json())
    examination = examine_adapter(adapter, layout, max_rank=64)
    report, facts = examination.report, examination.facts
    assert facts is not None
    assert facts == validate_adapter(adapter, layout, max_rank=64)
    assert outcomes(examination) == dict.fromkeys(ALL, "PASSED")
    assert (report.base_fingerprint, report.declared_base_fingerprint) == (FINGERPRINT, FINGERPRINT)
    assert (report.method, report.rank, report.dtype, report.delta_norm) == (
        "lora", 8, "F32", facts.delta_norm,
    )  # fmt: skip
    assert tuple(module.module for module in report.modules) == facts.matched_modules
    assert report.unmatched_tensors == ()

    tensors = load_file(adapter / WEIGHTS_FILE)
    by_name = {module.module.rpartition(".")[2]: module for module in report.modules}
    assert {name: (module.rank, module.scaling) for name, module in by_name.items()} == {
        "q_proj": (4, 0.5), "v_proj": (8, 1.0), "down_proj": (4, 2.0),
    }  # fmt: skip
    for module in report.modules:
        a, b = (tensors[f"base_model.model.{module.module}.lora_{x}.weight"].double() for x in "AB")
        assert module.norm == pytest.approx((module.scaling * b @ a).norm().item(), rel=1e-9)


def test_what_an_adapter_does_not_say_is_skipped(adapter: Path, layout: BaseLayout) -> None:
    examination = examine_adapter(adapter, layout, max_rank=64)
    assert outcomes(examination) == dict.fromkeys(ALL, "PASSED") | {"manifest": "SKIPPED", "base": "SKIPPED"}
    assert examination.report.declared_base_fingerprint is None


def test_of_one_that_is_wrong_in_every_way(adapter: Path, layout: BaseLayout) -> None:
    other = "sha256:" + "0" * 64
    (adapter / BUNDLE_FILE).write_text(Bundle(other).to_json())
    (adapter / "weights.bin").write_bytes(b"\x80")
    (adapter / "README.md").write_text("x")
    tensors = load_file(adapter / WEIGHTS_FILE)
    names = sorted(tensors)
    tensors[names[0]] = torch.ones(1, 2)
    tensors[names[1]] = torch.ones(3)
    del tensors[names[2]]
    tensors |= {f"stray.{index:02}": torch.ones(1) for index in range(30)}
    save_file(tensors, adapter / WEIGHTS_FILE)

    examination = examine_adapter(adapter, layout, max_rank=6)
    report = examination.report
    assert outcomes(examination) == {
        "files": "FAILED", "configuration": "PASSED", "manifest": "PASSED", "base": "FAILED",
        "modules": "PASSED", "ranks": "FAILED", "header": "PASSED", "tensors": "FAILED", "values": "SKIPPED",
    }  # fmt: skip
    assert len(problems_of(examination, "files")) == 2
    assert len(problems_of(examination, "ranks")) == 2
    assert len(problems_of(examination, "tensors")) == MAX_LISTED
    assert next(check for check in report.checks if check.name == "tensors").problem_count == 33
    assert report.unmatched_tensor_count == 30
    assert report.unmatched_tensors == tuple(f"stray.{index:02}" for index in range(MAX_LISTED))
    assert report.declared_base_fingerprint == other
    assert (report.delta_norm, report.modules[0].norm) == (None, None)

    error = examination.error
    assert error is not None
    assert error.reason == "UNEXPECTED_FILE"  # of the first check that failed
    assert error.report == report
    with pytest.raises(AdapterError) as refusal:
        validate_adapter(adapter, layout, max_rank=6)
    assert refusal.value.report == report


def test_every_field_that_is_wrong_is_named(adapter: Path, layout: BaseLayout) -> None:
    path = adapter / CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_dora": True, "modules_to_save": ["x"], "brand_new": 1}))
    examination = examine_adapter(adapter, layout, max_rank=64)
    found = {problem.split(" = ")[0] for problem in problems_of(examination, "configuration")}
    assert found == {"use_dora", "modules_to_save", "unknown field 'brand_new'"}
    assert outcomes(examination)["modules"] == outcomes(examination)["tensors"] == "SKIPPED"
    assert outcomes(examination)["header"] == "PASSED"

    path.write_text(json.dumps(config | {"r": 0, "lora_alpha": "x", "rank_pattern": [], "use_rslora": "no"}))
    examination = examine_adapter(adapter, layout, max_rank=64)
    found = {problem.split(" = ")[0] for problem in problems_of(examination, "configuration")}
    assert found == {"r", "lora_alpha", "use_rslora"}


def test_every_tensor_that_is_not_finite_is_named(adapter: Path, layout: BaseLayout) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    for name in sorted(tensors)[:3]:
        tensors[name][0, 0] = float("nan")
    save_file(tensors, adapter / WEIGHTS_FILE)
    examination = examine_adapter(adapter, layout, max_rank=64)
    assert sorted(tensors)[:3] == sorted(problem.split()[1] for problem in problems_of(examination, "values"))


def test_the_first_failure_is_the_error(adapter: Path, layout: BaseLayout) -> None:
    (adapter / BUNDLE_FILE).write_text(Bundle("sha256:" + "0" * 64).to_json())
    (adapter / WEIGHTS_FILE).write_bytes(b"")
    examination = examine_adapter(adapter, layout, max_rank=64)
    assert isinstance(examination.error, WrongBaseError)
    failed = [check.name for check in examination.report.checks if check.outcome is Outcome.FAILED]
    assert failed == ["base", "header"]


def test_names_that_do_not_print_are_shown_as_escapes(adapter: Path, layout: BaseLayout) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE) | {"\u202e\n": torch.ones(1), "x" * 5000: torch.ones(1)}
    save_file(tensors, adapter / WEIGHTS_FILE)
    report = examine_adapter(adapter, layout, max_rank=64).report
    assert report.unmatched_tensor_count == 2
    assert all(name.isprintable() and len(name) < 200 for name in report.unmatched_tensors)


def test_a_large_adapter_is_checked_in_little_memory(tmp_path: Path) -> None:
    """128 MiB of factors; the largest pair has 2."""
    modules = {f"model.layers.{i}.up": ModuleShape(2048, 2048) for i in range(64)}
    layout = BaseLayout(modules, None, FINGERPRINT)
    (tmp_path / CONFIG_FILE).write_bytes(config_of(r=128, target_modules=["up"]))
    values = torch.randn(128, 2048).numpy().tobytes()
    header: dict[str, Any] = {}
    for index, (module, factor) in enumerate((module, factor) for module in modules for factor in "AB"):
        header[f"base_model.model.{module}.lora_{factor}.weight"] = {
            "dtype": "F32",
            "shape": [128, 2048] if factor == "A" else [2048, 128],
            "data_offsets": [index * len(values), (index + 1) * len(values)],
        }
    raw = json.dumps(header).encode()
    with (tmp_path / WEIGHTS_FILE).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _ in header:
            file.write(values)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before_kib = _status("VmHWM")
    facts = validate_adapter(tmp_path, layout, max_rank=256)
    assert facts.parameter_count == 64 * 2 * 128 * 2048
    assert _status("VmHWM") - before_kib < 48 * 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
