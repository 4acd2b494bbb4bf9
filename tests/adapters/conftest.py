"""One tiny model and its adapters for all tests of this folder; a fresh store for each, and a URL for it."""

import threading
from collections.abc import Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from adapters.layout import BaseLayout
from adapters.remote import RemotePlace
from adapters.store import AdapterStore
from tests.adapters.builders import layout_of, make_adapter, put, tiny_model


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


@pytest.fixture(scope="session")
def folders(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of four adapters by name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(llama, folder / name, seed=seed) for seed, name in enumerate("abcd")}


@pytest.fixture
def origin(store: AdapterStore, folders: Mapping[str, Path], layout: BaseLayout) -> AdapterStore:
    """Two names, one content twice, a deleted version, an alias, a pin and a label."""
    for name in "abc":
        put(store, "sql", folders[name], layout)
    put(store, "other", folders["a"], layout)
    store.update("sql", 1, set_aliases=["prod"], pinned=True, labels={"team": "x"})
    store.delete("sql@3")
    return store


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return tmp_path / "remote"


@pytest.fixture
def place(remote: Path) -> RemotePlace:
    return RemotePlace(remote.as_uri())


@pytest.fixture
def web(remote: Path) -> Iterator[str]:
    """The remote folder over HTTP; its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(remote))

        def log_request(self, *args: object) -> None:
            pass

        def log_error(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
