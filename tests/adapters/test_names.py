"""References: what is read, what is refused, and that nothing is touched by the refused."""

from pathlib import Path

import pytest

from adapters.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
)
from adapters.names import AliasOf, ContentOf, NewestOf, VersionOf, parse_reference
from adapters.store import AdapterStore
from tests.adapters.staging import digest_of, facts_of, publish, snapshot, stage


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("sql", NewestOf("sql")),
        ("a", NewestOf("a")),
        ("0.9_b-c", NewestOf("0.9_b-c")),
        ("a" * 128, NewestOf("a" * 128)),
        ("sql@3", VersionOf("sql", 3)),
        ("sql@2147483648", VersionOf("sql", 2**31)),
        ("sql:prod", AliasOf("sql", "prod")),
        ("sql:v1.2-rc", AliasOf("sql", "v1.2-rc")),
        ("sha256:" + "0f" * 32, ContentOf("sha256:" + "0f" * 32)),
    ],
)
def test_references_are_read(text: str, parsed: object) -> None:
    assert parse_reference(text) == parsed


HOSTILE = [
    "", " ", "..", "a..b", "../a", "a/b", "/etc/passwd", "a\\b", "a\x00b", "a\n", "\na", "a b", ".a", "a.",
    "-a", "a-", "_a", "Sql", "SQL", "ä", "аdapter", "ａ", "a\u200bb", "ﬁ", "①", "٣", "a" * 129, "%2e%2e",
    "~", "*", "con:", "sha256", "sql@", "sql@0", "sql@-1", "sql@03", "sql@x", "sql@1.0", "sql@2147483649",
    "sql@" + "9" * 99, "sql@٣", "sql:", "sql:3", "sql:33", "sql:Prod", "sql:a..b", "sql:a/b", "sql:prod@3",
    "sql@3:prod", "sql@3@4", "sql:a:b", "@3", ":prod", "sha256:", "sha256:" + "0" * 63, "sha256:" + "0" * 65,
    "sha256:" + "A" * 64, "sha256:../../../../etc", "sha256:" + "0" * 63 + "\n",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_anything_else_is_refused_everywhere_and_touches_nothing(
    text: str, store: AdapterStore, root: Path, tmp_path: Path
) -> None:
    publish(store, "sql", "a")
    before = snapshot(tmp_path)
    for use in (store.resolve, store.get, store.delete):
        with pytest.raises(InvalidAdapterError) as refusal:
            use(text)
        assert refusal.value.reason in ("BAD_NAME", "BAD_REFERENCE", "BAD_ALIAS")
        assert str(refusal.value).isprintable()
    for by_digest in (store.path_of, store.verify, store.remove_blob, store.facts_of):
        with pytest.raises(InvalidAdapterError):
            by_digest(text)
    staged = stage(store, "b")
    with pytest.raises(InvalidAdapterError):
        store.publish(text, staged, facts_of("b"))
    if text != "sha256":  # a name kept for digests, but no bad alias
        with pytest.raises(InvalidAdapterError):
            store.update("sql", 1, set_aliases=[text])
    store.discard(staged)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nosql", "no adapter 'nosql'"),
        ("sql@9", "has no version 9; newest version: 2, aliases: prod"),
        ("sql:dev", "has no alias 'dev'; newest version: 2, aliases: prod"),
        (digest_of("x"), "no adapter has the digest"),
    ],
)
def test_what_is_not_there_is_said_precisely(reference: str, message: str, store: AdapterStore) -> None:
    publish(store, "sql", "a")
    publish(store, "sql", "b")
    store.update("sql", 1, set_aliases=["prod"])
    for use in (store.resolve, store.get):
        with pytest.raises(AdapterNotFoundError, match=message):
            use(reference)
