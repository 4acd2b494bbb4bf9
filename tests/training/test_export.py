"""Exports for others: PEFT and vLLM load the same update, transformers the same model."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import training.export_adapter
import training.export_model
from adapters.bundle import Bundle
from adapters.errors import BaseModelError, InvalidAdapterError, UnsupportedAdapterError
from adapters.fingerprint import weights_digest
from quickchange.cli import main
from tests.adapters.bases import distance, logits
from tests.adapters.builders import hollow_adapter, make_adapter
from tests.models import ARCHITECTURES, Architecture, build_tiny_model, rewrite_config
from training.export_adapter import export_adapter
from training.export_model import ModelExport, export_model
from training.merge import merge_adapter

PATTERNS: dict[str, Any] = {
    "target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5, "layers_to_transform": None,
    "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.*.v_proj": 30},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def with_adapter(model: Any, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval())


# Adapters


def test_peft_finds_the_same_adapter(folder: Path, model: Any, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", **PATTERNS)
    report = export_adapter(adapter, tmp_path / "out", base_name="org/tiny")
    assert (report.rank, report.rewritten, report.serve) == (7, False, None)
    ours, theirs = LoraConfig.from_pretrained(tmp_path / "out"), LoraConfig.from_pretrained(adapter)
    assert ours.base_model_name_or_path == "org/tiny"
    ours.base_model_name_or_path = theirs.base_model_name_or_path
    assert ours == theirs
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (adapter / weights).read_bytes()
    assert torch.equal(with_adapter(model, tmp_path / "out"), with_adapter(model, adapter))


def test_fields_that_say_nothing_are_left_out(model: Any, tmp_path: Path) -> None:
    """An older PEFT, which does not know them, would complain of them."""
    export_adapter(make_adapter(model, tmp_path / "adapter"), tmp_path / "out")
    assert set(config_of(tmp_path / "out")) == {
        *(
            "base_model_name_or_path",
            "bias",
            "inference_mode",
            "lora_alpha",
            "peft_type",
            "peft_version",
            "r",
        ),
        *("target_modules", "task_type", "use_rslora"),
    }


def test_for_vllm_there_is_one_rank_and_one_scaling(folder: Path, model: Any, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", strength=0.3, **PATTERNS)
    report = export_adapter(adapter, tmp_path / "out", reader="vllm")
    assert (report.rank, report.rewritten) == (7, True)
    assert report.serve is not None
    assert "--enable-lora --max-lora-rank 8 " in report.serve
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (7, 5, False)
    assert len(config["target_modules"]) == 14
    assert not {"rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save"} & set(config)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items()} == {7}
    base, live = logits(model), with_adapter(model, adapter)
    assert distance(base, live) > 0.05
    assert distance(with_adapter(model, tmp_path / "out"), live) < 1e-5


def test_for_vllm_a_plain_adapter_keeps_its_bytes(model: Any, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", exclude_modules=["layers.0.self_attn.q_proj"])
    report = export_adapter(adapter, tmp_path / "out", reader="vllm")
    assert not report.rewritten
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (adapter / weights).read_bytes()
    assert "exclude_modules" not in config_of(tmp_path / "out")
    assert torch.equal(with_adapter(model, tmp_path / "out"), with_adapter(model, adapter))


@pytest.mark.parametrize(("reader", "refused"), [("vllm", True), ("peft", False)])
def test_dora_is_for_peft_alone(reader: Any, refused: bool, model: Any, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", use_dora=True)
    if refused:
        with pytest.raises(
            UnsupportedAdapterError, match=r"dora, which vLLM does not load; `quickchange merge`"
        ):
            export_adapter(adapter, tmp_path / "out", reader=reader)
        assert not (tmp_path / "out").exists()
        return
    export_adapter(adapter, tmp_path / "out", reader=reader)
    assert torch.equal(with_adapter(model, tmp_path / "out"), with_adapter(model, adapter))


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_what_vllm_would_drop_is_refused(changes: dict[str, Any], model: Any, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps(config_of(adapter) | changes))
    with pytest.raises(UnsupportedAdapterError, match=next(iter(changes))):
        export_adapter(adapter, tmp_path / "out", reader="vllm")


def test_a_rank_that_vllm_does_not_take(model: Any, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", r=513)
    with pytest.raises(UnsupportedAdapterError, match="rank 513, vLLM takes 512 at most"):
        export_adapter(adapter, tmp_path / "out", reader="vllm")


def test_tensors_that_do_not_belong_are_refused(model: Any, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, path)
    with pytest.raises(InvalidAdapterError, match=r"lm_head\.weight in .* is none of LoRA's"):
        export_adapter(adapter, tmp_path / "out")
    save_file(tensors, path)
    (adapter / "adapter_config.json").write_text(json.dumps(config_of(adapter) | {"r": 5}))
    with pytest.raises(InvalidAdapterError, match="rank 4 and 4, its configuration says 5"):
        export_adapter(adapter, tmp_path / "out")


def test_what_lies_beside_an_adapter(model: Any, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter")
    (adapter / "quickchange.json").write_text(Bundle("sha256:" + "0" * 64, chat_template="{{ 1 }}").to_json())
    export_adapter(adapter, tmp_path / "out", base_name="org/tiny", licence="mit")
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 1 }}"
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["base_model"], head["library_name"], head["license"]) == ("org/tiny", "peft", "mit")
    (adapter / "README.md").write_text("mine")
    export_adapter(adapter, tmp_path / "more", with_manifest=True)
    assert {path.name for path in (tmp_path / "more").iterdir()} == {*files, "quickchange.json"}
    assert (tmp_path / "more" / "README.md").read_text() == "mine"


# Models


@pytest.fixture
def export(tmp_path: Path, base_cache: Path) -> Callable[..., ModelExport]:
    def export(folder: Path, shard_bytes: int = 10**9, **options: Any) -> ModelExport:
        out = tmp_path / "out"
        return export_model(
            str(folder), out, shard_bytes=shard_bytes, cache_dir=base_cache, progress=False, **options
        )

    return export


def test_a_model_in_several_files(folder: Path, tmp_path: Path, export: Callable[..., ModelExport]) -> None:
    report = export(folder, shard_bytes=100_000)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert report.files == len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size < 110_000 for path in files)
    assert weights_digest(files) == weights_digest([folder / "model.safetensors"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.weight_bytes
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - it is no mapping
    ours, theirs = (AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "out", folder))
    assert torch.equal(logits(ours), logits(theirs))


def test_a_merged_model_in_one_file(folder: Path, model: Any, tmp_path: Path, base_cache: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter")
    merge_adapter(str(folder), adapter, tmp_path / "merged", cache_dir=base_cache, progress=False)
    report = export_model(
        str(tmp_path / "merged"), tmp_path / "out", shard_bytes=10**9, cache_dir=base_cache, progress=False
    )
    assert (report.files, report.dtype, report.architecture) == (1, "bfloat16", "LlamaForCausalLM")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "merged").iterdir()} | {"README.md"}
    assert not any(name.endswith(".index.json") for name in names)
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "tiny"
    assert "adapter\\_digest" in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("a<|user|>b") == AutoTokenizer.from_pretrained(folder).encode("a<|user|>b")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template


def test_transformers_4_is_told_the_same(tmp_path: Path, export: Callable[..., ModelExport]) -> None:
    """Under the old names: it ignores the new ones, and would take the default rotary base in silence."""
    folder = build_tiny_model(tmp_path / "model")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    rewrite_config(folder, rope_parameters=rope)
    export(folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (5000.0, "float32")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|user|>" in settings["additional_special_tokens"]
    assert not {"extra_special_tokens", "backend", "is_local"} & set(settings)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "out", folder))
    assert torch.equal(logits(ours), logits(theirs))
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (tmp_path / "out", folder)]
    assert len({tuple(sorted(each.all_special_tokens)) for each in tokenizers}) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_old_names_change_nothing(
    architecture: Architecture, tmp_path: Path, export: Callable[..., ModelExport]
) -> None:
    folder = build_tiny_model(tmp_path / "model", architecture)
    stated = json.loads((folder / "config.json").read_text()).get("rope_parameters") or {}
    for rope in (stated, *stated.values()):
        if isinstance(rope, dict) and "rope_theta" in rope:
            rope["rope_theta"] /= 2  # no default
    rewrite_config(folder, rope_parameters=stated or None)
    export(folder)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "out", folder))
    assert torch.equal(logits(ours), logits(theirs))
    old = json.loads((tmp_path / "out" / "config.json").read_text())
    match architecture:
        case "gpt2":
            assert "rope_theta" not in old
        case "gemma3_text":
            assert (old["rope_theta"], old["rope_local_base_freq"]) == (500_000.0, 5_000.0)
        case "gpt_neox":
            assert (old["rotary_emb_base"], old["rotary_pct"]) == (5_000.0, 0.5)
        case _:
            assert old["rope_theta"] == stated["rope_theta"] != 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": None}, "architectures None in its config.json"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantised"),
    ],
)
def test_models_that_others_do_not_load_are_refused(
    changes: dict[str, Any], said: str, folder: Path, tmp_path: Path, export: Callable[..., ModelExport]
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    rewrite_config(other, **changes)
    with pytest.raises(BaseModelError, match=said):
        export(other)
    assert not (tmp_path / "out").exists()


def test_weights_of_several_types_are_refused(
    folder: Path, tmp_path: Path, export: Callable[..., ModelExport]
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="weights of BF16, F32"):
        export(other)


def test_a_full_disk_is_said_in_one_line(
    folder: Path, model: Any, tmp_path: Path, base_cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As safetensors says it, which is no OSError; of merges, too."""
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(base_cache))
    adapter = make_adapter(model, tmp_path / "adapter", alpha_pattern={"q_proj": 3})

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(training.export_model, "save_file", full)
    monkeypatch.setattr(training.export_adapter, "save_file", full)
    monkeypatch.setattr(type(model), "save_pretrained", full)
    of_adapter = ["--adapter", str(adapter)]
    for command, what in (
        (["export", "--format", "hf", "--model", str(folder)], "model.safetensors"),
        (["export", "--format", "peft", "--for", "vllm", *of_adapter], "adapter_model.safetensors"),
        (["merge", "--base", str(folder), "--quantization", "none", *of_adapter], "the model"),
    ):
        assert main([*command, "--out", str(tmp_path / "results" / "out")]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"error: {what} cannot be written: ")
        assert said.endswith("No space left on device (os error 28)")
        assert list((tmp_path / "results").iterdir()) == []


# The command


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--format", "peft"], "--format peft is made of --adapter"),
        (["--format", "gguf", "--model", "m", "--base", "b"], "--format gguf has no use for --base"),
        (["--format", "gguf-lora", "--adapter", "a"], "--format gguf-lora is made of --base"),
        (["--format", "hf", "--model", "m", "--type", "f16"], "--type is for --format gguf and gguf-lora"),
        (["--format", "gguf", "--model", "m", "--for", "vllm"], "--for is for --format peft"),
    ],
)
def test_options_of_another_format(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    hollow_adapter(tmp_path / "a")
    assert main(["export", "--out", "nowhere", *argv]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize("size", ["much", "0", "5XB", "-1GB"])
def test_sizes_that_are_none(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "--format", "hf", "--model", "m", "--out", "o", f"--shard-size={size}"])
    assert caught.value.code == 2
    assert "is no size such as 5GB" in capsys.readouterr().err


def test_the_command_writes_each_format(
    folder: Path, model: Any, tmp_path: Path, base_cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from tests.training.exportable import build_exportable

    monkeypatch.setenv("QUICKCHANGE_CACHE", str(base_cache))
    adapter, base = make_adapter(model, tmp_path / "adapter"), build_exportable(tmp_path / "model")
    of_model, of_adapter = ["--model", str(base)], ["--adapter", str(adapter)]

    def run(form: str, *options: str) -> str:
        assert main(["export", "--format", form, "--out", str(tmp_path / form), *options]) == 0
        return capsys.readouterr().out.removeprefix(str(tmp_path))

    assert run("peft", "--for", "vllm", *of_adapter).splitlines() == [
        "/peft: for vllm, rank 4",
        f"vllm serve {folder} --enable-lora --max-lora-rank 8 --lora-modules peft={tmp_path}/peft",
    ]
    assert run("hf", *of_model, "--shard-size", "200KB").startswith("/hf: LlamaForCausalLM, float32, ")
    assert run("gguf", *of_model).startswith("/gguf: llama, 21 tensors, bf16, ")
    assert run("gguf-lora", *of_adapter, "--base", str(base)).startswith("/gguf-lora: llama, 6 layers, f32, ")
    assert main(["export", "--format", "gguf", "--out", str(tmp_path / "gguf"), *of_model]) == 1
    assert capsys.readouterr().err.endswith("exists already; remove it or choose another --out\n")
    assert main(["export", "--format", "hf", "--out", str(tmp_path / "x"), "--model", str(adapter)]) == 1
    assert "is an adapter, not a base" in capsys.readouterr().err
    assert main(["export", "--format", "gguf", "--out", str(tmp_path / "j"), *of_model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "llama"
