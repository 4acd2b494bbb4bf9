"""What every test shares: one thread, no network, and bases that are prepared once."""

import os
import signal
from pathlib import Path

import pytest

# Before torch and the hub client are imported: pools of spinning threads on two cores block each other, and
# no test may depend on what a hub happens to answer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native-library",
        type=Path,
        metavar="FILE",
        help="native kernels to test instead of those installed",
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start must hear Ctrl-C
    library = config.getoption("--native-library")
    if library is not None:
        import kernels.library

        kernels.library._built_library = lambda: library


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache_dir for tiny models: quantised once per test run, gone afterwards."""
    return tmp_path_factory.mktemp("base-cache")


@pytest.fixture(scope="session")
def smollm2_cache() -> Path:
    """A cache_dir that holds SmolLM2, made at most once per machine; skips where it cannot be fetched."""
    from adapters.cache import default_cache_dir
    from adapters.errors import BaseNotFoundError
    from adapters.smollm2 import smollm2_folder

    cache = default_cache_dir()
    try:
        smollm2_folder(cache, progress=False)
    except BaseNotFoundError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
    return cache
