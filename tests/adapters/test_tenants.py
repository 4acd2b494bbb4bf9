"""Whose a name is, and that the catalogue's SQL says the same as the rule itself."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import AdapterNotFoundError
from adapters.names import is_visible, owner_of
from adapters.rows import _VISIBLE
from adapters.store import AdapterStore
from tests.adapters.staging import publish

PARTS = st.text("ab-.", max_size=6)


@pytest.mark.parametrize(
    ("name", "owner"),
    [("sql", None), ("acme.sql", "acme"), ("acme.sql.v2", "acme"), ("acme-2.sql", "acme-2"), ("acme", None)],
)
def test_a_name_with_a_dot_is_the_tenants_before_it(name: str, owner: str | None) -> None:
    assert owner_of(name) == owner


@given(PARTS, st.none() | PARTS)
def test_the_catalogue_has_the_same_rule(name: str, tenant: str | None) -> None:
    connection = sqlite3.connect(":memory:")
    (seen,) = connection.execute(f"SELECT {_VISIBLE} FROM (SELECT ?2 AS name)", (tenant, name)).fetchone()
    connection.close()
    assert bool(seen) == is_visible(name, tenant)


def test_a_tenant_gets_its_own_of_a_content_and_bytes_are_counted_by_name(tmp_path: Path) -> None:
    with AdapterStore(tmp_path / "store") as store:
        for name, content in (
            ("acme.a", "x"),
            ("acme.b", "x"),
            ("globex.a", "x"),
            ("acmes.a", "y"),
            ("all", "z"),
        ):
            publish(store, name, content)
        digest = store.get("globex.a").facts.digest
        assert store.get(digest, "globex").name == store.resolve(digest, "globex").name == "globex.a"
        assert store.get(digest, "acme").name == "acme.a"
        for hidden in (digest, "globex.a"):
            with pytest.raises(AdapterNotFoundError):
                store.get(hidden, "other")
        each = sum(file.size_bytes for file in store.get("acme.a").files)
        assert store.bytes_of_tenant("acme") == 2 * each
        assert store.bytes_of_tenant("globex") == each
        assert store.bytes_of_tenant("acm") == 0
        found, _ = store.list(tenant="acme")
        assert [record.name for record in found] == ["acme.a", "acme.b", "all"]
