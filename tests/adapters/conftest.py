"""One tiny model for all tests of this folder."""

import pytest
from transformers import PreTrainedModel

from adapters.layout import BaseLayout
from tests.adapters.builders import layout_of, tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def layout(llama: PreTrainedModel) -> BaseLayout:
    return layout_of(llama)
