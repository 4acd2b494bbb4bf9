"""A `push` that breaks or is interrupted, `--resume` and `cancel-upload`: the commands, at a real server."""

import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quickchange import Client
from quickchange.cli import main
from quickchange.upload import CHUNK_BYTES, UploadPlan
from tests.adapters.builders import make_adapter
from tests.e2e.process import ServerProcess, environment, eventually, killed_after
from tests.e2e.proxy import CuttingProxy, cutting
from tests.e2e.uploading import shelf

HINT = re.compile(
    r"what was sent stays at the server for a while; to go on, repeat the command with --resume ([\w-]+)"
)
RECEIVED = "quickchange_adapter_upload_bytes_total"
UPLOAD_ID = "broken-1"


@pytest.fixture(scope="module")
def large(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of two chunks."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("large") / "a"
    return make_adapter(model, folder, r=250, seed=5, target_modules="all-linear")


@pytest.fixture
def broken(server: ServerProcess) -> Iterator[CuttingProxy]:
    """A network that breaks once the server has the first chunk of weights, and never gets well again."""
    weights = shelf(server, UPLOAD_ID) / "files" / "adapter_model.safetensors"

    def has_a_chunk() -> bool:
        return weights.exists() and weights.stat().st_size >= CHUNK_BYTES

    budgets = itertools.chain([CHUNK_BYTES * 3 // 2], itertools.repeat(1))
    with cutting(server.grpc, budgets, before_cut=lambda: eventually(has_a_chunk)) as proxy:
        yield proxy


def push(address: str, folder: Path) -> list[str]:
    return ["adapters", "push", str(folder), "--name", "by-command", "--server", address]


def resume(address: str, folder: Path) -> list[str]:
    return [*push(address, folder), "--resume", UPLOAD_ID]


def push_in_part(proxy: CuttingProxy, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command gives up, and names the ID."""
    assert main([*resume(proxy.address, folder), "--wait", "0.5"]) == 1
    hint, error = capsys.readouterr().err.splitlines()
    assert HINT.fullmatch(hint)[1] == UPLOAD_ID  # type: ignore[index]  # or the test fails
    assert error.startswith("error: ")


def test_resume_sends_only_what_is_missing(
    server: ServerProcess,
    client: Client,
    large: Path,
    broken: CuttingProxy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = server.scrape().get(RECEIVED, 0.0)
    push_in_part(broken, large, capsys)
    assert main(resume(server.grpc, large)) == 0
    assert capsys.readouterr().out.startswith("by-command@")
    size_bytes = UploadPlan.of(large).size_bytes
    assert size_bytes > CHUNK_BYTES * 3 // 2
    eventually(lambda: server.scrape()[RECEIVED] - before == size_bytes)  # nothing came twice
    client.adapters.delete("by-command", all_versions=True)


def test_cancel_upload_gives_the_room_back_at_once(
    server: ServerProcess, large: Path, broken: CuttingProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    push_in_part(broken, large, capsys)
    command = ["adapters", "cancel-upload", UPLOAD_ID, "--server", server.grpc]
    assert main(command) == 0
    assert capsys.readouterr().out == f"upload {UPLOAD_ID} cancelled\n"
    assert not shelf(server, UPLOAD_ID).exists()
    assert main(command) == 1
    assert capsys.readouterr().err.startswith(f"error: there is no upload {UPLOAD_ID}")


@pytest.mark.slow  # waits for a second cut, which a busy machine may keep it from for minutes
def test_an_interrupt_says_how_to_go_on(
    server: ServerProcess, client: Client, large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cutting(server.grpc, itertools.repeat(CHUNK_BYTES // 2)) as never_enough:
        command = [*push(never_enough.address, large), "--wait", "300"]
        process = subprocess.Popen(
            [sys.executable, "-m", "quickchange", *command],
            stderr=subprocess.PIPE,
            text=True,
            env=environment({}),
        )
        with process, killed_after(process):
            eventually(lambda: never_enough.cuts > 1, 60)  # it goes on, and on
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    hint = HINT.fullmatch(said.strip())
    assert hint is not None, said
    assert main([*push(server.grpc, large), "--resume", hint[1]]) == 0
    assert capsys.readouterr().out.startswith("by-command@")
    client.adapters.delete("by-command", all_versions=True)
