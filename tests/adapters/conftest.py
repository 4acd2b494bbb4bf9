"""One tiny model for all tests of this folder, and a fresh store for each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from adapters.layout import BaseLayout
from adapters.store import AdapterStore
from tests.adapters.builders import layout_of, tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def layout(llama: PreTrainedModel) -> BaseLayout:
    return layout_of(llama)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[AdapterStore]:
    with AdapterStore(root) as store:
        yield store
