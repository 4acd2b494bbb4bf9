"""One server for most tests; whoever breaks a server starts one of its own."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from quickchange import Client
from tests.adapters.builders import make_adapter
from tests.e2e import witness
from tests.e2e.process import ServerProcess, running
from tests.models import build_tiny_model, rewrite_config
from tests.parity.oracle import Oracle

CONTEXT = 16384
"""Long enough that a request is still running when a test has done what it wants to do to it."""

SMALL = {
    "engine.max_running_requests": 4,
    "engine.max_waiting_requests": 4,
    "engine.kv_bytes": "64MiB",
    "grpc.upload_idle_timeout_s": 2,
    "grpc.max_upload_bytes": "8MiB",
    "grpc.max_concurrent_uploads": 2,
}

ADAPTERS = {
    "a": {"r": 4, "seed": 1},
    "b": {"r": 8, "seed": 2, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "c": {"r": 2, "seed": 3, "target_modules": "all-linear", "use_rslora": True},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_model(tmp_path_factory.mktemp("base"))
    rewrite_config(folder, max_position_embeddings=CONTEXT)
    return folder


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of real PEFT adapters by name, each unlike the others."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(model, folder / name, **options) for name, options in ADAPTERS.items()}


@pytest.fixture(scope="session")
def oracle(base: Path, adapters: Mapping[str, Path]) -> Oracle:
    return Oracle(base, dict(adapters))


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="session")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Whatever the tests do to it, the weights of its base are the same bits at the end."""
    store = tmp_path_factory.mktemp("store")
    with running(ServerProcess(base, store, SMALL, witness.COMMAND)) as process:
        before = witness.digest_in(process)
        yield process
        assert witness.digest_in(process) == before


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with server.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def pushed(server: ServerProcess, adapters: Mapping[str, Path]) -> Mapping[str, str]:
    """The adapters a, b and c on the shared server; digests by name. Nobody changes these."""
    with server.client() as client:
        return {name: client.adapters.push(path, name).adapter.digest for name, path in adapters.items()}


@pytest.fixture
def own_server(base: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of a test's own; a second one on the same store comes after the first has ended."""
    started: list[ServerProcess] = []

    def start(store: Path | None = None, **changes: object) -> ServerProcess:
        settings = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
        process = ServerProcess(base, store or tmp_path / "store", settings)
        started.append(process)
        return process.wait_ready()

    yield start
    for process in started:
        process.close()
