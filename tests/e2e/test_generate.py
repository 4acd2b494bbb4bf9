"""Asking: every answer over the wire is what transformers and PEFT give for the same adapter."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from quickchange import (
    Client,
    Delta,
    Finished,
    FinishReason,
    InvalidArgumentError,
    NotFoundError,
    Started,
)
from quickchange.errors import from_rpc
from quickchange.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.process import ServerProcess, eventually
from tests.parity.oracle import Oracle

PROMPT = "The quick brown fox"
NEW_TOKENS = 16
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def expected(oracle: Oracle, tokenizer: Any, adapter: str, prompt: str = PROMPT) -> tuple[int, ...]:
    return tuple(oracle.greedy(tokenizer(prompt)["input_ids"], adapter, NEW_TOKENS))


def test_base_and_adapters_all_differ(oracle: Oracle, tokenizer: Any) -> None:
    """Without this, no other test here could tell whether an adapter was applied."""
    assert len({expected(oracle, tokenizer, adapter) for adapter in ("", "a", "b", "c")}) == 4


@pytest.mark.parametrize("adapter", ["", "a", "b", "c"])
def test_generate_is_the_oracles_answer(
    client: Client, pushed: Mapping[str, str], oracle: Oracle, tokenizer: Any, adapter: str
) -> None:
    answer = client.generate(PROMPT, adapter=adapter, max_new_tokens=NEW_TOKENS)
    assert answer.token_ids == expected(oracle, tokenizer, adapter)
    assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    ended = answer.token_ids[-1] == tokenizer.eos_token_id
    assert answer.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
    assert answer.adapter.digest == pushed.get(adapter, "")
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == len(answer.token_ids)
    assert 0 < answer.timings.time_to_first_token_s <= answer.timings.total_s


@pytest.mark.parametrize("adapter", ["", "b"])
def test_a_stream_is_the_same_answer_in_order(
    client: Client, pushed: Mapping[str, str], oracle: Oracle, tokenizer: Any, adapter: str
) -> None:
    events = list(client.stream(PROMPT, adapter=adapter, max_new_tokens=NEW_TOKENS, request_id="mine"))
    first, *middle, last = events
    assert isinstance(first, Started)
    assert isinstance(last, Finished)
    assert all(isinstance(event, Delta) for event in middle)
    assert (first.request_id, first.prompt_tokens) == ("mine", len(PROMPT))
    assert first.adapter.digest == pushed.get(adapter, "")
    tokens = tuple(token for event in middle for token in event.token_ids)
    assert tokens == expected(oracle, tokenizer, adapter)
    assert "".join(event.text for event in middle) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert last.usage.completion_tokens == NEW_TOKENS


def test_mixed_requests_at_once_keep_their_adapters(
    server: ServerProcess, pushed: Mapping[str, str], oracle: Oracle, tokenizer: Any
) -> None:
    asks = [(adapter, f"{PROMPT} {turn}") for turn in range(4) for adapter in ("", "a", "b", "c")]
    want = [expected(oracle, tokenizer, adapter, prompt) for adapter, prompt in asks]
    with server.client() as client, ThreadPoolExecutor(8) as pool:
        before = client.server_info().steps
        got = pool.map(
            lambda ask: (
                client.generate(ask[1], adapter=ask[0], max_new_tokens=NEW_TOKENS, retries=50).token_ids
            ),
            asks,
        )
        assert list(got) == want
        after = client.server_info().steps
    assert after.mixed_steps > before.mixed_steps
    assert after.max_adapters_in_step >= 2


def test_a_prompt_of_ids_is_taken_as_it_is(client: Client, tokenizer: Any) -> None:
    by_ids = client.generate(tokenizer(PROMPT)["input_ids"], max_new_tokens=4, echo=True)
    by_text = client.generate(PROMPT, max_new_tokens=4, echo=True)
    assert by_ids.token_ids == by_text.token_ids
    assert by_ids.text == by_text.text
    assert by_text.text.startswith(PROMPT)


def test_an_echo_comes_first_in_a_stream(client: Client) -> None:
    plain = client.generate(PROMPT, max_new_tokens=4)
    result = client.stream(PROMPT, max_new_tokens=4, echo=True).result()
    assert result.text == PROMPT + plain.text
    assert result.token_ids == plain.token_ids


def test_a_chat_goes_through_the_template(client: Client, pushed: Mapping[str, str], tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    tokenized = client.tokenize(CHAT)
    assert (tokenized.text, list(tokenized.token_ids)) == (rendered, ids)
    chat = client.generate(CHAT, adapter="a", max_new_tokens=8)
    assert chat.token_ids == client.generate(ids, adapter="a", max_new_tokens=8).token_ids
    assert chat.usage.prompt_tokens == len(ids)


def test_an_adapters_own_template_is_used_for_its_chats(
    server: ServerProcess, client: Client, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["a"], tmp_path / "own"))
    fingerprint = client.server_info().base_fingerprint
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}assistant:"
    manifest = {"format": 1, "base_fingerprint": fingerprint, "chat_template": template}
    (folder / "quickchange.json").write_text(json.dumps(manifest))
    client.adapters.push(folder, "templated")
    assert client.tokenize(CHAT, adapter="templated").text == "system: Be brief.|user: Hi|assistant:"
    assert client.tokenize(CHAT).text.startswith("<|system|>")
    chat = client.generate(CHAT, adapter="templated", max_new_tokens=4)
    text = client.generate("system: Be brief.|user: Hi|assistant:", adapter="templated", max_new_tokens=4)
    assert chat.token_ids == text.token_ids
    client.adapters.delete("templated@1")


def test_logprobs_are_of_the_chosen_tokens(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=5, logprobs=3)
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    for entry in answer.logprobs:
        assert len(entry.alternatives) == 3
        assert entry.alternatives[0] == (entry.token_id, entry.logprob)  # greedy
        assert entry.logprob <= 0
    assert client.generate(PROMPT, max_new_tokens=5).logprobs == ()


def test_a_stop_string_ends_the_answer_before_it(client: Client, tokenizer: Any) -> None:
    free = client.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    stop = next(char for char in free.text[2:] if char.isprintable() and char != "�")
    answer = client.generate(PROMPT, max_new_tokens=NEW_TOKENS, stop=stop)
    assert answer.finish_reason is FinishReason.STOP
    assert answer.text == free.text[: free.text.index(stop)]


def test_a_stop_token_ends_the_answer(client: Client) -> None:
    free = client.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    answer = client.generate(PROMPT, max_new_tokens=NEW_TOKENS, stop_token_ids=[free.token_ids[3]])
    assert answer.finish_reason is FinishReason.STOP
    assert answer.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3]) + 1]


def test_a_seed_makes_sampling_repeatable(client: Client) -> None:
    answers = [
        client.generate(PROMPT, max_new_tokens=12, temperature=1.5, seed=s).token_ids for s in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_models_are_the_base_and_every_adapter(client: Client, pushed: Mapping[str, str]) -> None:
    models = {model.reference: model for model in client.models()}
    assert models[""].is_base
    assert models["a@1"].adapter.digest == pushed["a"]
    assert client.generate(PROMPT, adapter="a@1", max_new_tokens=1).adapter.digest == pushed["a"]


@pytest.mark.parametrize("form", ["a", "a@1", "digest"])
def test_every_form_of_a_reference_means_the_same(
    client: Client, pushed: Mapping[str, str], form: str
) -> None:
    reference = pushed["a"] if form == "digest" else form
    answer = client.generate(PROMPT, adapter=reference, max_new_tokens=1)
    assert (answer.adapter.digest, answer.adapter.version) == (pushed["a"], 1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1}, "sampling.temperature"),
        ({"top_p": 1.5}, "sampling.top_p"),
        ({"max_new_tokens": 0}, "sampling.max_new_tokens"),
        ({"stop": [""]}, "stopping.stop"),
        ({"logprobs": 99}, "output.logprobs"),
        ({"request_id": "two\nlines"}, "request_id"),
    ],
)
def test_a_bad_parameter_is_named(client: Client, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate(PROMPT, **options)
    assert [violation.field for violation in caught.value.field_violations] == [field]
    assert caught.value.reason == "INVALID_REQUEST"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "has no tokens"),
        ([288], "288 is not a token; ids are 0 to 287"),
        ([1] * 16384, "has 16384 tokens"),
        ("x" * (1 << 20) + "x", "has 1048577 bytes, at most 1048576"),
        ([{"role": "wizard", "content": "x"}], "is 'wizard', must be one of system, user, assistant"),
    ],
)
def test_a_bad_prompt_is_refused_precisely(client: Client, prompt: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        client.generate(prompt, max_new_tokens=1)


def test_no_prompt_at_all_is_refused(server: ServerProcess, client: Client) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(inference_pb2.GenerateRequest())
        assert from_rpc(caught.value).message == "prompt: is missing; send text, token_ids or chat"


def test_several_answers_to_one_prompt(client: Client, pushed: Mapping[str, str]) -> None:
    options: dict[str, Any] = {"adapter": "a", "temperature": 1.0, "seed": 3, "max_new_tokens": NEW_TOKENS}
    answers = client.generate_many(PROMPT * 3, 3, echo=True, ignore_eos=True, **options)
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert len({answer.token_ids for answer in answers}) == 3
    assert all(answer.text.startswith(PROMPT * 3) for answer in answers)
    assert answers[1].usage.cached_tokens == answers[2].usage.cached_tokens > 0
    assert answers[0].token_ids == client.generate(PROMPT * 3, ignore_eos=True, **options).token_ids
    with client.stream(PROMPT * 3, n=3, ignore_eos=True, **options) as stream:
        streamed = stream.results()
    assert [each.token_ids for each in streamed] == [each.token_ids for each in answers]
    with pytest.raises(InvalidArgumentError, match=r"sampling.n: is 33, must be at most 4"):
        client.generate_many(PROMPT, 33)


def test_a_prompt_asked_twice_is_computed_once(server: ServerProcess, client: Client) -> None:
    prompt = "Nobody has asked this of the server before, so the first time is the first."
    before = server.scrape()
    first, second, salted = (
        client.generate(prompt, max_new_tokens=4, cache_salt=salt) for salt in ("", "", "tenant")
    )
    assert first.token_ids == second.token_ids == salted.token_ids
    cached = [answer.usage.cached_tokens for answer in (first, second, salted)]
    assert cached == [0, len(prompt) // 16 * 16, 0]
    after = server.scrape()
    hits, queries = "quickchange_prefix_cache_hits_total", "quickchange_prefix_cache_queries_total"
    assert after[hits] - before[hits] == cached[1]
    assert after[queries] - before[queries] == 3 * len(prompt)


def test_the_scale_of_an_adapter(client: Client, pushed: Mapping[str, str]) -> None:
    answers = {
        scale: client.generate(
            PROMPT, adapter="a", adapter_scale=scale, max_new_tokens=NEW_TOKENS, ignore_eos=True
        ).token_ids
        for scale in (1.0, 0.0, 3.0)
    }
    base = client.generate(PROMPT, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    plain = client.generate(PROMPT, adapter="a", max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert answers[0.0] == base.token_ids
    assert answers[1.0] == plain.token_ids
    assert len(set(answers.values())) == 3


def test_an_answer_stops_where_the_context_ends(client: Client) -> None:
    answer = client.generate([65] * 16380, max_new_tokens=100, ignore_eos=True)
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 16384


@pytest.mark.parametrize("reference", ["nobody", "a@99", "a:nowhere", "sha256:" + "0" * 64])
def test_an_unknown_adapter_is_not_found(client: Client, pushed: Mapping[str, str], reference: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.generate(PROMPT, adapter=reference)
    assert caught.value.reason == "ADAPTER_NOT_FOUND"
    with pytest.raises(NotFoundError):
        client.stream(PROMPT, adapter=reference).result()


@pytest.mark.parametrize("reference", ["../a", "a@", "a@x", "a@-1", "sha256:zz", "a b", "ａ"])
def test_a_reference_that_is_none_is_refused(client: Client, reference: str) -> None:
    with pytest.raises(InvalidArgumentError):
        client.generate(PROMPT, adapter=reference)


def test_what_was_asked_is_counted(server: ServerProcess, client: Client, pushed: Mapping[str, str]) -> None:
    before = server.scrape()
    client.generate(PROMPT, adapter="a", max_new_tokens=NEW_TOKENS, ignore_eos=True)
    with pytest.raises(InvalidArgumentError):
        client.generate(PROMPT, top_p=7)
    after = server.scrape()

    def grew(name: str) -> float:
        return after[f"quickchange_{name}"] - before.get(f"quickchange_{name}", 0.0)

    assert grew('requests_finished_total{code="OK",reason="length"}') == 1
    assert grew("prompt_tokens_total") == len(PROMPT)
    assert grew("generated_tokens_total") == NEW_TOKENS
    assert grew('adapter_requests_total{adapter="a"}') == 1
    assert grew('rejected_total{reason="INVALID_REQUEST"}') == 1
    assert grew("time_to_first_token_seconds_count") == 1
    assert grew("inter_token_latency_seconds_count") == NEW_TOKENS - 1
    assert after["quickchange_engine_up"] == 1
    assert after["quickchange_adapters_resident" + '{tier="device"}'] >= 1


def test_prompts_are_not_in_the_log(server: ServerProcess, client: Client) -> None:
    client.generate("a very private sentence", max_new_tokens=1, request_id="private-1")
    with pytest.raises(InvalidArgumentError):
        client.generate([{"role": "very private", "content": "x"}])
    eventually(lambda: "request_id=private-1" in server.log)
    eventually(lambda: "reason=INVALID_REQUEST about=chat.messages[0].role" in server.log)
    assert "very private" not in server.log
