"""What most tests of training need: a tiny base that they share, and a file of rows."""

from pathlib import Path

import pytest

from adapters.base import Base, load_base
from tests.models import build_tiny_model
from tests.training.bases import write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(folder: Path, base_cache: Path) -> Base:
    return load_base(str(folder), purpose="train", device="cpu", cache_dir=base_cache, progress=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")
