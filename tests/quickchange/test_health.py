"""`quickchange health` and `is_serving`: true while requests are taken, false while a server drains."""

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from quickchange import AsyncClient, Client
from quickchange.cli import main


@pytest.fixture
def servicer() -> health.HealthServicer:
    return health.HealthServicer()


@pytest.fixture
def address(servicer: health.HealthServicer) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


async def test_a_server_that_serves(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--server", address]) == 0
    assert capsys.readouterr().out == "serving\n"
    with Client(address) as client:
        assert client.is_serving()
    async with AsyncClient(address) as client:
        assert await client.is_serving()


async def test_a_server_that_drains(
    address: str, servicer: health.HealthServicer, capsys: pytest.CaptureFixture[str]
) -> None:
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert main(["health", "--server", address]) == 1
    assert "takes no requests" in capsys.readouterr().err
    async with AsyncClient(address) as client:
        assert not await client.is_serving()


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--server", "127.0.0.1:1", "--wait", "0.2"]) == 1
    assert "no server answers" in capsys.readouterr().err
