"""The process: starting, telling its health, ending in order, and starting again after a crash."""

import signal
import socket
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from quickchange import (
    AdapterState,
    DataLossError,
    Delta,
    FailedPreconditionError,
    Finished,
    QuickchangeError,
    Residency,
    Started,
    UnavailableError,
)
from server.app import serve
from server.setting_sources import settings_from
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, eventually, running

SERVICES = ("InferenceService", "AdapterService", "ServerService")
NAMES = tuple(f"quickchange.v1.{service}" for service in SERVICES)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PROMPT = "process"

StartServer = Callable[..., ServerProcess]


def health_of(address: str, service: str = "") -> Any:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status


def test_it_prints_one_line_and_nothing_else(server: ServerProcess) -> None:
    assert server.stdout == [f"ready grpc={server.grpc} metrics={server.metrics}\n"]


def test_the_info_is_what_it_was_started_with(server: ServerProcess, base: Path) -> None:
    with server.client() as client:
        info = client.server_info()
    assert (info.quantization, info.device, info.dtype) == ("none", "cpu", "float32")
    assert info.base_fingerprint.startswith("sha256:")
    assert info.limits.max_running_requests == SMALL["engine.max_running_requests"]
    assert info.limits.max_upload_bytes == 8 << 20
    assert info.limits.max_context_tokens == 16384
    assert info.capacity.kv_tokens_total >= 16384


@pytest.mark.parametrize("service", ["", *NAMES])
def test_health_by_name(server: ServerProcess, service: str) -> None:
    assert health_of(server.grpc, service) == SERVING


def test_the_health_of_an_unknown_service_is_not_found(server: ServerProcess) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        health_of(server.grpc, "quickchange.v1.Nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]  # it is a Call too


def test_reflection_tells_every_method(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest
        listing, *files = stub.ServerReflectionInfo(
            iter([ask(list_services=""), *(ask(file_containing_symbol=name) for name in NAMES)])
        )
    listed = {service.name for service in listing.list_services_response.service}
    assert listed >= {*NAMES, "grpc.health.v1.Health"}
    for name, answer in zip(SERVICES, files, strict=True):
        protos = [
            FileDescriptorProto.FromString(raw)
            for raw in answer.file_descriptor_response.file_descriptor_proto
        ]
        services = {service.name: service for proto in protos for service in proto.service}
        assert services[name].method


def test_sigterm_finishes_what_runs_and_admits_nothing(own_server: StartServer) -> None:
    server = own_server(grpc__drain_grace_s=60)
    with server.client() as client, grpc.insecure_channel(server.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAMES[0]))
        assert next(watch).status == SERVING
        stream = client.stream(PROMPT, max_new_tokens=1000, ignore_eos=True)
        assert isinstance(next(stream), Started)
        server.signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        with pytest.raises(UnavailableError) as caught:
            client.generate(PROMPT, max_new_tokens=1)
        assert caught.value.reason == "DRAINING"
        events = list(stream)
        assert isinstance(events[-1], Finished)
        assert sum(len(event.token_ids) for event in events if isinstance(event, Delta)) == 1000
        assert server.wait() == 0
        assert list(watch) == []  # ended, not cut
    assert len(server.stdout) == 1


@pytest.mark.slow
def test_the_grace_has_an_end(own_server: StartServer) -> None:
    server = own_server(grpc__drain_grace_s=0.5)
    with server.client() as client:
        stream = client.stream(PROMPT, max_new_tokens=16000, ignore_eos=True)
        next(stream)
        server.signal(signal.SIGTERM)
        with pytest.raises(UnavailableError):
            list(stream)
    assert server.wait(20) == 0


def test_a_second_signal_forces(own_server: StartServer) -> None:
    server = own_server(grpc__drain_grace_s=600)
    with server.client() as client:
        stream = client.stream(PROMPT, max_new_tokens=16000, ignore_eos=True)
        next(stream)
        server.signal(signal.SIGTERM)
        eventually(lambda: health_of(server.grpc) == NOT_SERVING)
        server.signal(signal.SIGTERM)
        assert server.wait(10) == 1
        with pytest.raises(QuickchangeError):
            list(stream)


def test_kill_and_restart_serve_every_adapter_again(
    own_server: StartServer, adapters: Mapping[str, Path]
) -> None:
    server = own_server()
    with server.client() as client:
        for name, folder in adapters.items():
            client.adapters.push(folder, name)
        client.adapters.push(adapters["b"], "a")
        client.adapters.alias("a", "prod", 1)
        client.adapters.pin("c")
        references = ("a@1", "a@2", "a:prod", "b", "c")
        before = {
            reference: client.generate(PROMPT, adapter=reference, max_new_tokens=8).token_ids
            for reference in references
        }
        assert len(set(before.values())) == 3
        stream = client.stream(PROMPT, max_new_tokens=16000, ignore_eos=True)
        next(stream)
        server.process.kill()
        with pytest.raises(UnavailableError):
            list(stream)
    server.wait()
    # Bit rot while it is down: one adapter is lost, the others are not.
    digest = _rot(server.store, adapters["b"])
    again = own_server(store=server.store)
    with again.client() as client:
        assert client.adapters.get("c").residency is Residency.DEVICE  # pinned: there before "ready" was said
        for reference in ("a@1", "a:prod", "c"):
            assert client.generate(PROMPT, adapter=reference, max_new_tokens=8).token_ids == before[reference]
        assert client.adapters.get("c").pinned
        with pytest.raises(FailedPreconditionError) as found_out:
            client.generate(PROMPT, adapter=digest, max_new_tokens=8)
        assert found_out.value.metadata == {"cause": "CHECKSUM_MISMATCH"}
        failed = client.adapters.get("b@1")
        assert failed.state is AdapterState.FAILED
        assert "SHA-256" in failed.error
        # Once the request that found out has ended, the damaged files leave their place.
        eventually(lambda: "were moved to quarantine/" in client.adapters.get("b@1").error)
        place = client.adapters.get("b@1").error.rpartition(" ")[2]
        assert (server.store / place / "files/adapter_model.safetensors").is_file()
        collected = client.adapters.collect_garbage(min_age_s=0, keep_versions=5, dry_run=True)
        assert [(entry.place, entry.digest) for entry in collected.quarantined] == [(place, digest)]
        with pytest.raises(DataLossError) as known:
            client.generate(PROMPT, adapter="b@1", max_new_tokens=8)
        assert known.value.reason == "ADAPTER_FAILED"
        client.drain()
        assert again.wait() == 0


def _rot(store: Path, uploaded: Path) -> str:
    """Flips a bit of the weights in the store that equal the uploaded ones; the digest they are under."""
    original = (uploaded / "adapter_model.safetensors").read_bytes()
    for path in store.rglob("adapter_model.safetensors"):
        if path.read_bytes() == original:
            path.chmod(0o600)
            path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
            return "sha256:" + next(part for part in reversed(path.parts) if len(part) == 64)
    raise AssertionError("those weights are not in the store")


FAULTY_ENGINE = """
    # A server whose device breaks for good once a canary prompt is computed.
    import sys
    import server.runner
    from quickchange.cli import main

    run = server.runner.ModelRunner.run

    def breaking(self, batch):
        if any(row.sequence.request.request_id == "canary" for row in batch.rows):
            raise SystemExit("the device is gone")
        return run(self, batch)

    server.runner.ModelRunner.run = breaking
    sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_a_dead_engine_ends_streams_and_the_process(base: Path, tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(textwrap.dedent(FAULTY_ENGINE))
    process = ServerProcess(base, tmp_path / "store", SMALL, command=(str(script),))
    with running(process) as server, server.client() as client, grpc.insecure_channel(server.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        stream = client.stream(PROMPT, max_new_tokens=16000, ignore_eos=True)
        next(stream)
        with pytest.raises(UnavailableError) as caught:
            client.generate(PROMPT, request_id="canary")
        died_s = time.monotonic()
        assert caught.value.reason == "ENGINE_DOWN"
        assert next(watch).status == NOT_SERVING
        assert time.monotonic() - died_s < 1.0
        with pytest.raises(UnavailableError):
            list(stream)
        assert server.wait(20) == 1


def failing(capsys: pytest.CaptureFixture[str], base: Path, store: Path, **flags: object) -> str:
    """The one line of a server that cannot start."""
    given = {"base": str(base), "store": str(store), "port": 0, "metrics_port": 0, "quantization": "none"}
    assert serve(settings_from(given | flags, {})) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    return line


def test_a_base_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(capsys, tmp_path / "nothing", tmp_path / "store")
    assert str(tmp_path / "nothing") in line


def test_a_store_that_cannot_be_used(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").write_text("a file")
    line = failing(capsys, base, tmp_path / "store")
    assert f"--store {tmp_path / 'store'}: " in line


@pytest.mark.parametrize("flag", ["port", "metrics_port"])
def test_a_taken_port(base: Path, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = failing(capsys, base, tmp_path / "store", **{flag: port})
    name = f"--{flag.replace('_', '-')}"
    assert line == (
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; give another {name}, "
        "0 picks a free one"
    )
    assert not (tmp_path / "store").exists()  # found out before anything else was done


def test_too_little_memory(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: " in failing(capsys, base, tmp_path / "store", kv_bytes=1)


def test_an_address_of_somebody_else(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(capsys, base, tmp_path / "store", host="192.0.2.1", port=50051)
    assert line.startswith("error: cannot listen on 192.0.2.1:50051: ")
