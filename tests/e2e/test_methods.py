"""What methods make, before a real server: applied, refused by name, or not even trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.base import load_base
from quickchange import AdapterDirectoryError, Client, FailedPreconditionError
from tests.e2e.process import ServerProcess
from tests.models import build_tiny_model
from tests.training.bases import write_rows
from training.errors import PublishError
from training.methods import METHODS
from training.recipe import Recipe
from training.train import train

FEATURES = {
    "dora": "use_dora",
    "qdora": "use_dora",
    "ia3": "'IA3'",
    "prefix": "'PREFIX_TUNING'",
    "prompt": "'PROMPT_TUNING'",
    "bitfit": "'BITFIT'",
}
APPLIED = [name for name, method in METHODS.items() if method.why_not_served is None]


def recipe_for(folder: Path, base: Path, method: str, **changes: Any) -> Recipe:
    values = {"base": str(base), "data": write_rows(folder / "rows.jsonl"), "out": folder / "out"}
    fixed = {"method": method, "max_steps": 2, "batch_size": 4, "products": "float32", "device": "cpu"}
    if "rank" in METHODS[method].settings:
        fixed["rank"] = 4
    return Recipe.from_mapping(values | fixed | changes, source="test")


def test_every_method_is_applied_or_refused_by_a_name_of_its_own() -> None:
    assert {*APPLIED, *FEATURES, "full"} == set(METHODS)


@pytest.mark.parametrize("method", [name for name in APPLIED if "none" in METHODS[name].quantizations])
def test_what_a_server_applies_is_published(
    method: str, tmp_path: Path, base: Path, server: ServerProcess, client: Client
) -> None:
    name = f"made-by-{method.replace('_', '-')}"
    recipe = recipe_for(tmp_path, base, method, quantization="none", publish=server.grpc, name=name)
    assert train(recipe, progress=False).published == f"{name}@1"
    assert client.adapters.get(name).rank == recipe.saved_rank


@pytest.mark.parametrize("method", FEATURES)
def test_what_no_server_applies_is_refused_by_name(
    method: str, tmp_path: Path, base: Path, client: Client, base_cache: Path
) -> None:
    source = build_tiny_model(tmp_path / "qwen2", "qwen2") if method == "bitfit" else base
    quantization = METHODS[method].quantizations[0]
    own = load_base(
        str(source), purpose="train", quantization=quantization, device="cpu", cache_dir=base_cache,
        progress=False,
    )  # fmt: skip
    train(recipe_for(tmp_path, source, method), own, progress=False)
    with pytest.raises(FailedPreconditionError, match=FEATURES[method]) as refused:
        client.adapters.push(tmp_path / "out", "refused")
    assert refused.value.metadata["feature"] == FEATURES[method]
    assert all(adapter.name != "refused" for adapter in client.adapters.list())


def test_a_whole_model_is_a_base_and_no_adapter(tmp_path: Path, base: Path, client: Client) -> None:
    train(recipe_for(tmp_path, base, "full"), progress=False)
    with pytest.raises(AdapterDirectoryError, match=r"adapter_config\.json"):
        client.adapters.push(tmp_path / "out", "refused")


# Before anything is spent: there is neither a base to load nor a row to read


@pytest.mark.parametrize("method", [*FEATURES, "full"])
def test_with_publish_such_a_method_is_not_trained(
    method: str, tmp_path: Path, server: ServerProcess
) -> None:
    recipe = recipe_for(
        tmp_path, Path("/no/such/base"), method, publish=server.grpc, name="x", data=Path("/no/such/rows")
    )
    with pytest.raises(
        PublishError, match=f"method {method} makes what no server applies .*; train with qlora"
    ):
        train(recipe, progress=False)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {"rank": 300}, "the adapter will have rank 300, the server takes 256; train with rank 256"),
        ("pissa", {"rank": 200}, r"rank 400 \(method pissa saves twice .* takes 256; train with rank 128"),
        ("qlora", {"quantization": "fp4"}, "this run trains on a base in fp4: give its base as --base"),
        ("qlora", {}, "this run trains on a base in nf4: give its base as --base, and method qlora for nf4"),
        ("lora_8bit", {}, "this run trains on a base in int8"),
        ("qlora", {"double_quantization": False}, "a base in nf4 without double quantisation"),
    ],
)
def test_what_the_server_would_refuse_is_not_trained(
    method: str, changes: dict[str, Any], message: str, tmp_path: Path, server: ServerProcess
) -> None:
    recipe = recipe_for(
        tmp_path, Path("/no/such/base"), method, publish=server.grpc, name="x", data=Path("/no/such/rows"),
        **changes,
    )  # fmt: skip
    with pytest.raises(PublishError, match=message):
        train(recipe, progress=False)


def test_an_adapter_larger_than_the_server_takes_is_not_trained(
    tmp_path: Path, base: Path, own_server: Callable[..., ServerProcess]
) -> None:
    small = own_server(grpc__max_upload_bytes="16KiB")
    recipe = recipe_for(
        tmp_path, base, "lora", rank=32, publish=small.grpc, name="x", data=Path("/no/such/rows")
    )
    with pytest.raises(PublishError, match=r"the adapter will have \d+ bytes, the server takes 16384; lower"):
        train(recipe, progress=False)
