"""The blocking client against a real socket: what it sends, what it makes of the answers, how it fails."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2

import quickchange
from quickchange import (
    Client,
    Completion,
    Delta,
    Finished,
    FinishReason,
    InvalidArgumentError,
    QuickchangeError,
    Residency,
    Started,
)
from quickchange.v1 import inference_pb2
from tests.quickchange.scripted import DIGEST, Script, queue_full, rich, serving


def test_import_stays_light() -> None:
    heavy = ("torch", "transformers", "numpy", "tqdm", "server", "adapters", "training")
    code = f"import quickchange, sys; print([m for m in {heavy!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert [name for name in quickchange.__all__ if not hasattr(quickchange, name)] == []


def test_generate_sends_every_option_and_decodes_the_answer(client: Client, script: Script) -> None:
    answer = client.generate(
        "Hello",
        adapter="sql:prod",
        max_new_tokens=7,
        temperature=0.5,
        top_p=0.75,
        top_k=40,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        seed=2**63,
        stop="\n",
        stop_token_ids=[3],
        ignore_eos=True,
        logprobs=1,
        echo=True,
        cache_salt="tenant",
        request_id="mine",
    )
    expected = inference_pb2.GenerateRequest(
        text="Hello",
        adapter="sql:prod",
        request_id="mine",
        cache_salt="tenant",
        sampling=inference_pb2.SamplingParams(
            max_new_tokens=7,
            temperature=0.5,
            top_p=0.75,
            top_k=40,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=0.25,
            seed=2**63,
        ),
        stopping=inference_pb2.Stopping(stop=["\n"], stop_token_ids=[3], ignore_eos=True),
        output=inference_pb2.OutputOptions(logprobs=1, echo=True),
    )
    assert script.requests == [expected]
    assert isinstance(answer, Completion)
    assert (answer.text, answer.token_ids, answer.request_id) == ("SELECT 1", (5, 6), "mine")
    assert (answer.adapter.name, answer.adapter.version, answer.adapter.digest) == ("sql", 3, DIGEST)
    assert answer.finish_reason is FinishReason.LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (4, 1)
    assert answer.timings.queue_s == pytest.approx(0.001)
    assert answer.timings.total_s == 1.0
    assert answer.logprobs[1].token_id == 6
    assert answer.logprobs[1].alternatives == ((9, -1.5),)


def test_what_is_left_out_is_left_to_the_server(client: Client, script: Script) -> None:
    answer = client.generate("Hello")
    assert script.requests == [inference_pb2.GenerateRequest(text="Hello")]
    assert answer.adapter.is_base
    assert str(answer.adapter) == "base"
    assert answer.logprobs == ()


def test_prompts_as_token_ids_and_as_chat(client: Client, script: Script) -> None:
    client.generate([1, 2, 3])
    client.generate([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    ids, chat = script.requests
    assert list(ids.token_ids.ids) == [1, 2, 3]
    assert [(m.role, m.content) for m in chat.chat.messages] == [("system", "Be brief."), ("user", "Hi")]


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("x", {"max_new_tokens": -1}, "max_new_tokens"),
        ("x", {"seed": 2**64}, "seed"),
        ("x", {"temperature": "hot"}, "temperature"),
        ([-1], {}, "ids"),
        ("lone surrogate \ud800", {}, "prompt"),
        ([], {}, "prompt"),
        ([{"role": "user"}], {}, "prompt"),
        ([{"role": "user", "content": "x"}, "y"], {}, "prompt"),
    ],
)
def test_what_the_wire_cannot_carry_is_named(client: Client, script: Script, prompt, options, field) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate(prompt, **options)
    assert caught.value.field_violations[0].field == field
    assert field in str(caught.value)
    assert script.requests == []


def test_unknown_option_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match="tempratur"):
        client.generate("x", tempratur=1.0)  # type: ignore[call-arg]  # the typo is the test


def test_stream_gives_events_then_the_whole_answer(client: Client) -> None:
    with client.stream("Hello", adapter="sql") as stream:
        events = list(stream)
        whole = stream.result()
    assert [type(event) for event in events] == [Started, Delta, Delta, Delta, Finished]
    assert events[0].adapter.name == "sql"
    assert whole.text == "t0 t1 t2 "
    assert whole.token_ids == (0, 1, 2)
    assert [entry.token_id for entry in whole.logprobs] == [0, 1, 2]
    assert whole.finish_reason is FinishReason.STOP
    assert whole.request_id == "r-2"


def test_stream_text_alone(client: Client) -> None:
    with client.stream("Hello") as stream:
        assert list(stream.text()) == ["t0 ", "t1 ", "t2 "]


def test_leaving_a_stream_cancels_it(client: Client, script: Script) -> None:
    script.endless = True
    with client.stream("Hello") as stream:
        next(stream)
        assert not script.ended.wait(0.1)
    assert script.ended.wait(5)
    with pytest.raises(quickchange.CancelledError):
        stream.result()


def test_closing_from_another_thread_ends_the_reader(client: Client, script: Script) -> None:
    script.endless = True
    stream = client.stream("Hello")
    next(stream)
    threading.Timer(0.1, stream.close).start()
    with pytest.raises(quickchange.CancelledError):
        stream.result()
    assert script.ended.wait(5)


def test_timeout_becomes_deadline_exceeded_and_reaches_the_server(client: Client, script: Script) -> None:
    script.endless = True
    with pytest.raises(quickchange.DeadlineExceededError, match="time-out"):
        client.generate("Hello", timeout_s=0.2)
    assert script.ended.wait(5)


def test_tokenize_models_info_drain(client: Client) -> None:
    assert client.tokenize("Hi").token_ids == (1, 2, 3)
    assert client.tokenize("Hi").text == "<user>Hi"
    base, sql = client.models()
    assert base.is_base
    assert (sql.reference, sql.adapter.version) == ("sql", 3)
    info = client.server_info()
    assert (info.base_model, info.limits.max_context_tokens, info.steps.mixed_steps) == ("tiny", 512, 4)
    assert client.drain() == 2
    with pytest.raises(InvalidArgumentError, match="token ids already"):
        client.tokenize([1, 2])


CODES = [
    ("NOT_FOUND", quickchange.NotFoundError),
    ("INVALID_ARGUMENT", quickchange.InvalidArgumentError),
    ("FAILED_PRECONDITION", quickchange.FailedPreconditionError),
    ("ALREADY_EXISTS", quickchange.AlreadyExistsError),
    ("DATA_LOSS", quickchange.DataLossError),
    ("RESOURCE_EXHAUSTED", quickchange.ResourceExhaustedError),
    ("DEADLINE_EXCEEDED", quickchange.DeadlineExceededError),
    ("UNAVAILABLE", quickchange.UnavailableError),
    ("UNAUTHENTICATED", quickchange.UnauthenticatedError),
    ("PERMISSION_DENIED", quickchange.PermissionDeniedError),
    ("CANCELLED", quickchange.CancelledError),
    ("ABORTED", quickchange.AbortedError),
    ("OUT_OF_RANGE", quickchange.OutOfRangeError),
    ("UNIMPLEMENTED", quickchange.UnimplementedError),
    ("INTERNAL", quickchange.InternalError),
    ("UNKNOWN", QuickchangeError),
]


@pytest.mark.parametrize(("code", "expected"), CODES)
@pytest.mark.parametrize("method", ["unary", "stream"])
def test_each_status_has_its_error(client: Client, script: Script, code, expected, method) -> None:
    script.failures = [rich(grpc.StatusCode[code], f"said {code}", "SOME_REASON")]
    with pytest.raises(expected) as caught:
        client.generate("x") if method == "unary" else client.stream("x").result()
    assert type(caught.value) is expected
    assert caught.value.code == code
    assert caught.value.reason == "SOME_REASON"
    assert caught.value.metadata == {"k": "v"}
    assert str(caught.value) == f"said {code}"


def test_details_are_decoded(client: Client, script: Script) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="is 2")
    script.failures = [
        rich(
            grpc.StatusCode.INVALID_ARGUMENT,
            "bad",
            "INVALID_REQUEST",
            error_details_pb2.BadRequest(field_violations=[violation]),
        ),
        queue_full(1.25),
        rich(grpc.StatusCode.NOT_FOUND, "not ours", "ELSEWHERE", domain="other.example"),
    ]
    with pytest.raises(QuickchangeError) as bad:
        client.generate("x")
    assert bad.value.field_violations == (quickchange.FieldViolation("sampling.top_p", "is 2"),)
    with pytest.raises(QuickchangeError) as full:
        client.generate("x")
    assert full.value.retry_after_s == 1.25
    with pytest.raises(QuickchangeError) as foreign:
        client.generate("x")
    assert foreign.value.reason == ""


def test_token_and_address_come_from_the_environment(
    target: str, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICKCHANGE_SERVER", target)
    monkeypatch.setenv("QUICKCHANGE_TOKEN", "from-environment")
    with Client() as client:
        assert client.target == target
        client.models()
    with Client(token="given") as client:
        client.models()
    monkeypatch.delenv("QUICKCHANGE_TOKEN")
    with Client() as client:
        client.models()
    sent = [entry.get("authorization") for entry in script.metadata]
    assert sent == ["Bearer from-environment", "Bearer given", None]


def test_generate_waits_out_a_full_queue_only_if_asked(client: Client, script: Script) -> None:
    script.failures = [queue_full(0.3)]
    with pytest.raises(quickchange.ResourceExhaustedError):
        client.generate("x")
    for ask in (client.generate, lambda *a, **k: client.stream(*a, **k).result()):
        script.failures = [queue_full(0.3), queue_full(0.01)]
        begun_s = time.monotonic()
        assert ask("x", retries=2).text
        assert time.monotonic() - begun_s > 0.3
    script.failures = [queue_full(0.01), queue_full(0.01)]
    with pytest.raises(quickchange.ResourceExhaustedError):
        client.generate("x", retries=1)


def test_retries_never_outlive_the_timeout(client: Client, script: Script) -> None:
    script.failures = [queue_full(30)]
    begun_s = time.monotonic()
    with pytest.raises(quickchange.ResourceExhaustedError):
        client.generate("x", retries=5, timeout_s=1)
    assert time.monotonic() - begun_s < 1


def test_a_quota_that_no_wait_helps_is_not_retried(client: Client, script: Script) -> None:
    script.failures = [rich(grpc.StatusCode.RESOURCE_EXHAUSTED, "disk full", "NO_CAPACITY")]
    with pytest.raises(quickchange.ResourceExhaustedError):
        client.generate("x", retries=3)
    assert len(script.requests) == 1


def test_reads_are_repeated_while_unavailable_generations_are_not(client: Client, script: Script) -> None:
    gone = rich(grpc.StatusCode.UNAVAILABLE, "engine down", "ENGINE_DOWN")
    script.failures = [gone, gone]
    assert len(client.models()) == 2
    script.requests.clear()
    script.failures = [gone]
    with pytest.raises(quickchange.UnavailableError):
        client.generate("x")
    script.failures = [gone]
    with pytest.raises(quickchange.UnavailableError):
        client.stream("x").result()
    assert len(script.requests) == 2


def test_a_call_that_a_server_did_not_take_as_it_shut_down(client: Client, script: Script) -> None:
    """gRPC itself cancels it; that is no cancellation of the caller's."""
    untaken = rich(grpc.StatusCode.CANCELLED, "CANCELLED")
    script.failures = [untaken]
    assert len(client.models()) == 2
    script.failures = [untaken]
    with pytest.raises(quickchange.UnavailableError) as caught:
        client.generate("x")
    assert caught.value.reason == "DRAINING"
    script.failures = [untaken]
    assert client.generate("x", retries=1).text


def test_nobody_there(free_port: int) -> None:
    with Client(f"127.0.0.1:{free_port}", retry_window_s=0.3) as client:
        begun_s = time.monotonic()
        with pytest.raises(quickchange.UnavailableError, match="no server answers") as caught:
            client.generate("x")
        assert caught.value.reason == "NO_CONNECTION"
        assert 0.05 < time.monotonic() - begun_s < 2
        with pytest.raises(quickchange.DeadlineExceededError, match=r"within 0\.2 s"):
            client.wait_ready(0.2)


@pytest.mark.parametrize("call", ["generate", "stream", "models", "wait_ready"])
def test_server_that_starts_late_is_found(script: Script, free_port: int, call: str) -> None:
    calls = {
        "generate": lambda c: c.generate("x"),
        "stream": lambda c: c.stream("x").result(),
        "models": lambda c: c.models(),
        "wait_ready": lambda c: c.wait_ready(10),
    }
    with Client(f"127.0.0.1:{free_port}", retry_window_s=10) as client:
        answers: list[object] = []
        thread = threading.Thread(target=lambda: answers.append(calls[call](client)))
        thread.start()
        time.sleep(0.4)
        assert answers == []
        with serving(script, free_port):
            thread.join(10)
    assert len(answers) == 1
    assert len(script.requests) == 1


def test_client_survives_a_restart_of_the_server(script: Script, free_port: int) -> None:
    with Client(f"127.0.0.1:{free_port}", retry_window_s=10) as client:
        with serving(script, free_port):
            assert client.generate("x").text
        _wait_for_disconnection(client.target)
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(client.generate, "x")
            time.sleep(0.3)
            with serving(script, free_port):
                assert answer.result(10).text


def _wait_for_disconnection(target: str) -> None:
    """gRPC shares connections between clients of one process, so what this one sees the others know."""
    with Client(target, retry_window_s=0.001) as other:
        for _ in range(100):
            with pytest.raises(quickchange.UnavailableError) as caught:
                other.models()
            if caught.value.reason == "NO_CONNECTION":
                return
            time.sleep(0.05)
    raise AssertionError("the old connection is still there")


def test_wait_ready_reports_a_bad_token_at_once(client: Client, script: Script) -> None:
    script.failures = [rich(grpc.StatusCode.UNAUTHENTICATED, "no token", "NO_TOKEN")]
    with pytest.raises(quickchange.UnauthenticatedError):
        client.wait_ready(20)


def test_values_of_a_newer_server_do_not_break_this_client(
    client: Client, script: Script, monkeypatch
) -> None:
    from tests.quickchange import scripted

    newer = scripted.adapter("sql", 3)
    newer.residency = 77
    monkeypatch.setattr(scripted, "adapter", lambda *_: newer)
    assert client.adapters.get("sql").residency is Residency.UNKNOWN


def test_one_client_serves_many_threads(client: Client) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(client.generate("x").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["SELECT 1"] * 8
