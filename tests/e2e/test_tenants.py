"""Tenants before a real server: what one has is not there for another, in no way that it can ask."""

import base64
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from quickchange import (
    Client,
    NotFoundError,
    PermissionDeniedError,
    Residency,
    ResourceExhaustedError,
)
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, eventually, running
from tests.e2e.tokens import create

ALL = ("--scope", "infer", "--scope", "upload", "--scope", "admin")
PROMPT = "a prompt that fills more than one block of keys and values, and then some more of them " * 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants") / "tokens.json"


@pytest.fixture(scope="module")
def tenants(
    base: Path, adapters: Mapping[str, Path], file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Client]]:
    """Clients of two tenants and of the operator, before a server where each has something.

    acme.a and globex.a are one content; globex.c and the operator's b, which everybody sees, are others.
    """
    tokens = {
        "acme": create(file, "acme", *ALL, "--tenant", "acme"),
        "globex": create(file, "globex", *ALL, "--tenant", "globex"),
        "operator": create(file, "operator", *ALL),
    }
    process = ServerProcess(base, tmp_path_factory.mktemp("store"), SMALL, flags=("--tokens", str(file)))
    with running(process) as server:
        clients = {name: server.client(token=token) for name, token in tokens.items()}
        clients["acme"].adapters.push(adapters["a"], "acme.a")
        clients["globex"].adapters.push(adapters["a"], "globex.a")
        clients["globex"].adapters.push(adapters["c"], "globex.c")
        clients["globex"].adapters.alias("globex.c", "prod", 1)
        clients["operator"].adapters.push(adapters["b"], "b")
        yield clients
        for client in clients.values():
            client.close()


@pytest.fixture
def acme(tenants: Mapping[str, Client]) -> Client:
    return tenants["acme"]


@pytest.fixture
def globex(tenants: Mapping[str, Client]) -> Client:
    return tenants["globex"]


@pytest.fixture
def operator(tenants: Mapping[str, Client]) -> Client:
    return tenants["operator"]


def ask(client: Client, adapter: str = "", **options: Any) -> Any:
    return client.generate(PROMPT, adapter=adapter, max_new_tokens=2, **options)


# What there is


def test_lists_have_ones_own_and_what_is_everybodys(tenants: Mapping[str, Client]) -> None:
    own = {"acme": ["acme.a", "b"], "globex": ["b", "globex.a", "globex.c"]}
    for tenant, names in own.items():
        assert [adapter.name for adapter in tenants[tenant].adapters.list()] == names
        assert [model.adapter.name for model in tenants[tenant].models()] == ["", *names]
    everything = ["acme.a", "b", "globex.a", "globex.c"]
    assert [adapter.name for adapter in tenants["operator"].adapters.list()] == everything
    assert list(tenants["acme"].adapters.list(name="globex.c")) == []


def test_no_page_token_tells_another_tenants_names(acme: Client) -> None:
    from quickchange.v1 import adapters_pb2, adapters_pb2_grpc

    calls = acme.adapters._calls
    stub = adapters_pb2_grpc.AdapterServiceStub(calls.channel)
    token, seen = "", []
    while True:
        page = stub.ListAdapters(
            adapters_pb2.ListAdaptersRequest(page_size=1, page_token=token), metadata=calls.endpoint.metadata
        )
        seen += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
        assert json.loads(base64.urlsafe_b64decode(token))[0] in ("acme.a", "b")
    assert seen == ["acme.a", "b"]


WAYS: Mapping[str, Callable[[Client, str], object]] = {
    "get": lambda client, name: client.adapters.get(name),
    "generate": lambda client, name: ask(client, name),
    "stream": lambda client, name: list(client.stream(PROMPT, adapter=name, max_new_tokens=1)),
    "tokenize": lambda client, name: client.tokenize("hello", adapter=name),
    "load": lambda client, name: client.adapters.load(name),
    "unload": lambda client, name: client.adapters.unload(name),
    "update": lambda client, name: client.adapters.pin(name),
}


@pytest.mark.parametrize("way", WAYS)
def test_another_tenants_adapter_is_not_there(
    acme: Client, globex: Client, operator: Client, way: str, tmp_path: Path
) -> None:
    digest = globex.adapters.get("globex.c").digest
    for name in ("globex.c", "globex.c@1", "globex.c:prod"):
        with pytest.raises(NotFoundError) as hidden:
            WAYS[way](acme, name)
        missing = name.replace("globex.c", "globex.x")
        with pytest.raises(NotFoundError) as absent:
            WAYS[way](acme, missing)
        # Word for word what is said of an adapter that nobody has.
        assert hidden.value.message.replace("globex.c", "globex.x") == absent.value.message
        assert hidden.value.reason == absent.value.reason
    with pytest.raises(NotFoundError) as hidden:
        WAYS[way](acme, digest)
    other = "sha256:" + "0" * 64
    with pytest.raises(NotFoundError) as absent:
        WAYS[way](acme, other)
    assert hidden.value.message.replace(digest, other) == absent.value.message


def test_nor_can_it_be_downloaded_or_deleted(acme: Client, globex: Client, tmp_path: Path) -> None:
    for name in ("globex.c", globex.adapters.get("globex.c").digest):
        with pytest.raises(NotFoundError):
            acme.adapters.pull(name, tmp_path / "stolen")
    for all_versions in (False, True):
        with pytest.raises(NotFoundError):
            acme.adapters.delete("globex.c", all_versions=all_versions)
    assert globex.adapters.get("globex.c")


def test_a_content_that_two_tenants_have_is_each_ones_own(acme: Client, globex: Client) -> None:
    digest = acme.adapters.get("acme.a").digest
    assert digest == globex.adapters.get("globex.a").digest
    assert acme.adapters.get(digest).name == ask(acme, digest).adapter.name == "acme.a"
    assert globex.adapters.get(digest).name == ask(globex, digest).adapter.name == "globex.a"


def test_what_is_everybodys_can_be_used_and_not_changed(
    acme: Client, operator: Client, tmp_path: Path
) -> None:
    assert ask(acme, "b").adapter.name == "b"
    assert acme.adapters.pull("b", tmp_path / "b")
    for change in (
        lambda: acme.adapters.delete("b"),
        lambda: acme.adapters.alias("b", "prod", 1),
        lambda: acme.adapters.pin("b"),
        lambda: acme.adapters.load("b"),
        lambda: acme.adapters.unload("b"),
    ):
        with pytest.raises(PermissionDeniedError) as refused:
            change()
        assert refused.value.reason == "TENANT_NOT_ALLOWED"
    assert operator.adapters.get("b").aliases == ()


@pytest.mark.parametrize("name", ["globex.new", "globex.c", "new", "b", "acme"])
def test_nothing_is_published_under_a_name_that_is_not_ones_own(
    acme: Client, operator: Client, adapters: Mapping[str, Path], name: str
) -> None:
    before = [adapter.reference for adapter in operator.adapters.list()]
    with pytest.raises(PermissionDeniedError, match=r"only adapters named 'acme\.…'") as refused:
        acme.adapters.push(adapters["c"], name)
    assert refused.value.reason == "TENANT_NOT_ALLOWED"
    assert [adapter.reference for adapter in operator.adapters.list()] == before


def test_a_watch_tells_of_ones_own_alone(acme: Client, globex: Client) -> None:
    seen: list[str] = []

    def follow() -> None:
        with acme.adapters.watch(send_initial=True) as events:
            for event in events:
                seen.append(event.adapter.name)
                if event.adapter.name == "acme.a" and "watched" in event.adapter.aliases:
                    return

    follower = threading.Thread(target=follow)
    follower.start()
    eventually(lambda: {"acme.a", "b"} <= set(seen))
    globex.adapters.alias("globex.c", "watched", 1)
    globex.adapters.load("globex.c")
    eventually(lambda: globex.adapters.get("globex.c").residency is Residency.DEVICE)
    acme.adapters.alias("acme.a", "watched", 1)
    follower.join(20)
    assert not follower.is_alive()
    assert set(seen) == {"acme.a", "b"}


def test_upload_ids_are_a_tenants_own(
    acme: Client, globex: Client, adapters: Mapping[str, Path], tenants: Mapping[str, Client]
) -> None:
    globex.adapters.push(adapters["a"], "globex.a", upload_id="monday")
    from quickchange.v1 import adapters_pb2, adapters_pb2_grpc

    def query(client: Client) -> Any:
        calls = client.adapters._calls
        stub = adapters_pb2_grpc.AdapterServiceStub(calls.channel)
        return calls.unary(stub.QueryUpload, adapters_pb2.QueryUploadRequest(upload_id="monday"))

    assert query(globex).committed_offsets
    with pytest.raises(NotFoundError):
        query(acme)
    assert acme.adapters.push(adapters["a"], "acme.a", upload_id="monday").adapter.name == "acme.a"


# Keys and values of prompts


@pytest.mark.parametrize("adapter", ["", "b", "own"])
def test_a_tenant_finds_its_own_prompts_and_no_others(tenants: Mapping[str, Client], adapter: str) -> None:
    """Also where the content of the adapter is the same, and whatever salt it guesses."""
    names = {tenant: adapter.replace("own", f"{tenant}.a") for tenant in tenants}
    names["operator"] = names["operator"].replace("operator", "acme")
    salt = f"of {adapter}"
    assert ask(tenants["acme"], names["acme"], cache_salt=salt).usage.cached_tokens == 0
    assert ask(tenants["acme"], names["acme"], cache_salt=salt).usage.cached_tokens > 0
    for other in ("globex", "operator"):
        assert ask(tenants[other], names[other], cache_salt=salt).usage.cached_tokens == 0
        assert ask(tenants[other], names[other], cache_salt=salt).usage.cached_tokens > 0
    for guess in ("acme", "acme.a", f"acme{salt}", f"4:acme:{salt}", f"acme\0{salt}", "a", "b", salt * 2):
        for other in ("globex", "operator"):
            assert ask(tenants[other], names[other], cache_salt=guess).usage.cached_tokens == 0


def test_a_salt_that_is_an_adapters_name_is_a_salt_like_any_other(acme: Client) -> None:
    text = "another prompt that fills more than one block of keys and values, and more of them besides " * 2

    def cached(adapter: str, salt: str) -> int:
        answer = acme.generate(text, adapter=adapter, max_new_tokens=1, cache_salt=salt)
        return answer.usage.cached_tokens

    digest = acme.adapters.get("acme.a").digest
    assert cached("acme.a", "") == 0
    for salt in ("acme.a", "a", "b", digest, digest.removeprefix("sha256:")):
        assert cached("", salt) == 0
        assert cached("b", salt) == 0
    assert cached("acme.a", "") > 0


# Rights within a tenant


def test_pinning_needs_admin(tenants: Mapping[str, Client], file: Path, operator: Client) -> None:
    token = create(file, "publisher", "--scope", "upload", "--tenant", "acme")
    with Client(operator.target, token=token) as publisher:
        publisher.adapters.alias("acme.a", "mine", 1)
        with pytest.raises(PermissionDeniedError, match="pinning needs a token with scope admin"):
            publisher.adapters.pin("acme.a")
        assert not publisher.adapters.get("acme.a").pinned


def test_a_tenants_bytes_have_a_limit(
    tenants: Mapping[str, Client], file: Path, operator: Client, adapters: Mapping[str, Path]
) -> None:
    size = sum(
        path.stat().st_size for path in adapters["a"].iterdir() if path.suffix in (".json", ".safetensors")
    )
    token = create(
        file, "small", "--scope", "upload", "--tenant", "small", "--adapter-bytes", str(size * 2 + 100)
    )
    with Client(operator.target, token=token) as small:
        small.adapters.push(adapters["a"], "small.one")
        small.adapters.push(adapters["a"], "small.two")
        with pytest.raises(ResourceExhaustedError, match="tenant 'small' has") as refused:
            small.adapters.push(adapters["a"], "small.three")
        assert refused.value.reason == "TENANT_QUOTA"
        assert not small.adapters.push(
            adapters["a"], "small.two"
        ).created  # what is there already takes nothing
        small.adapters.delete("small.one")
        small.adapters.push(adapters["a"], "small.three")
