"""Limits of tokens before a real server: what is refused, for how long, and what is given back."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from quickchange import Client, ResourceExhaustedError
from quickchange.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, running
from tests.e2e.tokens import create

PROMPT = "hello"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("limits") / "tokens.json"
    create(path, "first", "--scope", "infer")
    return path


@pytest.fixture(scope="module")
def server(base: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    with running(ServerProcess(base, store, SMALL, flags=("--tokens", str(file)))) as process:
        yield process


def limited(server: ServerProcess, file: Path, name: str, *limits: str) -> Client:
    return server.client(token=create(file, name, "--scope", "infer", *limits))


def refusal_of(call: Callable[[], object]) -> ResourceExhaustedError:
    """Of the first call that is refused, of many."""
    for _ in range(60):
        try:
            call()
        except ResourceExhaustedError as error:
            return error
    raise AssertionError("none was refused")


def test_requests_are_refused_until_the_time_that_is_told(server: ServerProcess, file: Path) -> None:
    with (
        limited(server, file, "asks-much", "--requests-per-minute", "30") as client,
        server.client(token=create(file, "asks-little", "--scope", "infer")) as other,
    ):
        refused = refusal_of(client.server_info)
        assert refused.reason == "REQUESTS_PER_MINUTE"
        assert refused.retry_after_s is not None
        assert 0 < refused.retry_after_s <= 2
        assert other.server_info()  # another token's are another token's
        with pytest.raises(ResourceExhaustedError):
            client.generate(PROMPT, max_new_tokens=1)
        time.sleep(refused.retry_after_s)
        assert client.server_info()


def test_the_status_says_what_is_used_up_and_when_to_come_back(server: ServerProcess, file: Path) -> None:
    token = create(file, "raw", "--scope", "infer", "--requests-per-minute", "1")
    metadata = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(server.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=20)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=20)
    status = rpc_status.from_call(refused.value)
    info, retry, quota = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.QuotaFailure(),
    )
    for detail in status.details:
        for kind in (info, retry, quota):
            detail.Unpack(kind)
    assert (info.reason, info.domain) == ("REQUESTS_PER_MINUTE", "quickchange")
    assert 50 < retry.retry_delay.ToTimedelta().total_seconds() <= 60
    assert quota.violations[0].subject == "REQUESTS_PER_MINUTE"


def test_tokens_are_refused_until_the_time_that_is_told(server: ServerProcess, file: Path) -> None:
    with limited(server, file, "writes-much", "--tokens-per-minute", "1200") as client:
        prompt = client.tokenize(PROMPT).token_ids
        used = client.generate(PROMPT, max_new_tokens=1150, ignore_eos=True).usage
        assert used.completion_tokens == 1150
        refused = refusal_of(lambda: client.generate(PROMPT, max_new_tokens=100, ignore_eos=True))
        assert refused.reason == "TOKENS_PER_MINUTE"
        assert refused.retry_after_s is not None
        assert 0 < refused.retry_after_s <= (100 + len(prompt)) / 20
        time.sleep(refused.retry_after_s)
        assert client.generate(PROMPT, max_new_tokens=100, ignore_eos=True).usage.completion_tokens == 100


def test_what_was_not_used_is_given_back(server: ServerProcess, file: Path) -> None:
    with limited(server, file, "stops-early", "--tokens-per-minute", "600") as client:
        first = client.generate(PROMPT, max_new_tokens=1).token_ids[0]
        for _ in range(5):  # each could have come to most of what there is
            answer = client.generate(PROMPT, max_new_tokens=500, stop_token_ids=[first])
            assert answer.usage.completion_tokens <= 1
        for _ in range(3):  # one that is given up gives back too
            with client.stream(PROMPT, max_new_tokens=500, ignore_eos=True) as stream:
                next(stream)
            time.sleep(0.2)
        assert client.generate(PROMPT, max_new_tokens=100, ignore_eos=True)


def test_more_than_there_ever_is_says_so(server: ServerProcess, file: Path) -> None:
    with limited(server, file, "wants-too-much", "--tokens-per-minute", "100") as client:
        with pytest.raises(ResourceExhaustedError, match="100 per minute; ask for fewer") as refused:
            client.generate(PROMPT, max_new_tokens=200)
        assert refused.value.retry_after_s is None
        assert client.generate(PROMPT, max_new_tokens=20).token_ids
