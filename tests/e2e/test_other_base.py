"""A store that holds adapters for another base: they are refused by name of both bases, the others served."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from quickchange import AdapterState, FailedPreconditionError
from quickchange.types import Residency
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, running
from tests.models import build_tiny_model, rewrite_config

PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shapes as the usual one, with other weights."""
    folder = build_tiny_model(tmp_path_factory.mktemp("other"), seed=7)
    rewrite_config(folder, max_position_embeddings=512)
    return folder


def test_an_adapter_of_another_base_is_refused_and_others_are_served(
    base: Path, other_base: Path, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with running(ServerProcess(base, store, SMALL)) as server, server.client() as client:
        made_for = client.server_info().base_fingerprint
        bundled = Path(shutil.copytree(adapters["b"], tmp_path / "bundled"))
        bundle = {"format": 1, "base_fingerprint": made_for}
        (bundled / "quickchange.json").write_text(json.dumps(bundle))
        client.adapters.push(bundled, "bundled")
        client.adapters.pin("bundled")
        client.adapters.push(adapters["a"], "plain")
        client.generate(PROMPT, adapter="bundled", max_new_tokens=2)
    with running(ServerProcess(other_base, store, SMALL)) as server, server.client() as client:
        resident = client.server_info().base_fingerprint
        assert resident != made_for
        assert "pinned adapter not loaded adapter=bundled" in server.log
        for call in (
            lambda: client.generate(PROMPT, adapter="bundled", max_new_tokens=2),
            lambda: client.adapters.load("bundled"),
        ):
            with pytest.raises(FailedPreconditionError) as refusal:
                call()
            assert made_for in str(refusal.value)
            assert resident in str(refusal.value)
            assert "WRONG_BASE" in (refusal.value.reason, refusal.value.metadata.get("cause"))
        # Nothing is wrong with it: a server of its base would serve it, and it says which that is.
        seen = client.adapters.get("bundled")
        assert (seen.state, seen.base_fingerprint) == (AdapterState.READY, made_for)
        assert seen.residency is Residency.DISK
        assert [a.base_fingerprint for a in client.adapters.list(name="bundled")] == [made_for]
        # One that does not say what it was made for is judged by its shapes, and these fit.
        assert client.generate(PROMPT, adapter="plain", max_new_tokens=2).token_ids
        assert client.generate(PROMPT, max_new_tokens=2).token_ids
