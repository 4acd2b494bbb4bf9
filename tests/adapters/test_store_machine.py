"""Any sequence of operations against a dictionary that says what should be there."""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.errors import AdapterCorruptError, AdapterExistsError, AdapterNotFoundError, InvalidAdapterError
from adapters.facts import AdapterState
from adapters.store import AdapterStore
from tests.adapters.staging import IN_MEMORY, digest_of, facts_of, stage

NAMES = st.sampled_from(["sql", "chat"])
CONTENTS = st.sampled_from(["a", "bb", "ccc", "dddd"])
VERSIONS = st.integers(1, 6)
ALIASES = st.sampled_from(["prod", "next"])


@dataclass
class Model:
    versions: dict[tuple[str, int], str] = field(default_factory=dict)  # → content
    last: dict[str, int] = field(default_factory=dict)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    pinned: set[tuple[str, int]] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)  # contents that are listed, deleted ones included
    quarantined: list[str] = field(default_factory=list)

    def of(self, name: str) -> dict[int, str]:
        return {version: content for (other, version), content in self.versions.items() if other == name}

    def newest_ready(self, name: str) -> int | None:
        ready = [version for version, content in self.of(name).items() if content not in self.failed]
        return max(ready, default=None)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=IN_MEMORY))
        self.store = AdapterStore(self.folder / "store")
        self.model = Model()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(name=NAMES, content=CONTENTS)
    def publish(self, name: str, content: str) -> None:
        record, created = self.store.publish(name, stage(self.store, content), facts_of(content))
        same = [version for version, other in self.model.of(name).items() if other == content]
        assert created == (not same)
        assert record.version == (max(same) if same else self.model.last.get(name, 0) + 1)
        self._published(name, record.version, content)

    @rule(name=NAMES, content=CONTENTS, version=VERSIONS)
    def publish_fixed(self, name: str, content: str, version: int) -> None:
        staged = stage(self.store, content)
        existing = self.model.of(name).get(version)
        is_taken = version <= self.model.last.get(name, 0)
        if existing == content or not is_taken:
            _, created = self.store.publish(name, staged, facts_of(content), version=version)
            assert created == (existing is None)
            self._published(name, version, content)
        else:
            with pytest.raises(AdapterExistsError):
                self.store.publish(name, staged, facts_of(content), version=version)
            self.store.discard(staged)

    def _published(self, name: str, version: int, content: str) -> None:
        self.model.versions[name, version] = content
        self.model.last[name] = max(version, self.model.last.get(name, 0))
        self.model.failed.discard(content)
        self.model.stored.add(content)

    @rule(name=NAMES, version=VERSIONS, alias=ALIASES)
    def point(self, name: str, version: int, alias: str) -> None:
        if (name, version) in self.model.versions:
            assert alias in self.store.update(name, version, set_aliases=[alias]).aliases
            self.model.aliases[name, alias] = version
        else:
            with pytest.raises(AdapterNotFoundError):
                self.store.update(name, version, set_aliases=[alias])

    @rule(name=NAMES, alias=ALIASES)
    def unpoint(self, name: str, alias: str) -> None:
        version = self.model.aliases.pop((name, alias), None)
        if version is not None:
            assert alias not in self.store.update(name, version, remove_aliases=[alias]).aliases

    @precondition(lambda self: self.model.versions)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        name, version = data.draw(st.sampled_from(sorted(self.model.versions)))
        before = self.store.get(f"{name}@{version}").etag
        assert self.store.update(name, version, pinned=pinned, etag=before).etag != before
        (self.model.pinned.add if pinned else self.model.pinned.discard)((name, version))

    @rule(content=CONTENTS)
    def fail(self, content: str) -> None:
        if content in self.model.stored:
            self.store.mark_failed(digest_of(content), "broken")
            self.model.quarantined += [content] * (content not in self.model.failed)
            self.model.failed.add(content)
        else:
            with pytest.raises(AdapterNotFoundError):
                self.store.mark_failed(digest_of(content), "broken")

    @rule(name=NAMES, version=VERSIONS, removes=st.booleans())
    def delete(self, name: str, version: int, removes: bool) -> None:
        if (name, version) not in self.model.versions:
            with pytest.raises(AdapterNotFoundError):
                self.store.delete(f"{name}@{version}")
            return
        self._deleted(self.store.delete(f"{name}@{version}"), {(name, version)}, removes)

    @rule(name=NAMES, removes=st.booleans())
    def delete_all(self, name: str, removes: bool) -> None:
        if not self.model.of(name):
            with pytest.raises(AdapterNotFoundError):
                self.store.delete(name, all_versions=True)
            return
        doomed = {(name, version) for version in self.model.of(name)}
        self._deleted(self.store.delete(name, all_versions=True), doomed, removes)

    def _deleted(self, digests: list[str], doomed: set[tuple[str, int]], removes: bool) -> None:
        contents = {self.model.versions.pop(key) for key in doomed}
        self.model.pinned -= doomed
        self.model.aliases = {k: v for k, v in self.model.aliases.items() if (k[0], v) not in doomed}
        unreferenced = contents - set(self.model.versions.values())
        assert digests == sorted(digest_of(content) for content in unreferenced)
        if removes:
            for content in unreferenced:
                self.store.remove_blob(digest_of(content))
                self.model.stored.discard(content)
                self.model.failed.discard(content)

    @rule(content=CONTENTS)
    def remove_late(self, content: str) -> None:
        """A clean-up that comes after the content was published again must not take it away."""
        self.store.remove_blob(digest_of(content))
        if content not in self.model.versions.values():
            self.model.stored.discard(content)
            self.model.failed.discard(content)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = AdapterStore(self.folder / "store")
        self.model.stored &= set(self.model.versions.values())
        self.model.failed &= self.model.stored

    @rule()
    def open_beside(self) -> None:
        """A second process starts and ends; it may remove what was deleted, nothing else."""
        AdapterStore(self.folder / "store").close()
        self.model.stored &= set(self.model.versions.values())
        self.model.failed &= self.model.stored

    @invariant()
    def lists_what_there_is(self) -> None:
        listed = {}
        token = ""
        while True:
            page, token = self.store.list(page_size=3, page_token=token)
            listed |= {(record.name, record.version): record for record in page}
            if not token:
                break
        assert list(listed) == sorted(self.model.versions)
        for (name, version), record in listed.items():
            content = self.model.versions[name, version]
            assert record.facts.digest == digest_of(content)
            assert record.state == (
                AdapterState.FAILED if content in self.model.failed else AdapterState.READY
            )
            assert record.pinned == ((name, version) in self.model.pinned)
            assert record.aliases == tuple(
                sorted(a for (n, a), v in self.model.aliases.items() if (n, v) == (name, version))
            )

    @invariant()
    def resolves_what_there_is(self) -> None:
        for name in ("sql", "chat"):
            newest = self.model.newest_ready(name)
            if newest is not None:
                assert self.store.resolve(name).version == newest
            else:
                with pytest.raises((AdapterNotFoundError, AdapterCorruptError)):
                    self.store.resolve(name)
            if len(self.model.of(name)) > 1:
                with pytest.raises(InvalidAdapterError):
                    self.store.delete(name)
        for (name, alias), version in self.model.aliases.items():
            assert self.store.get(f"{name}:{alias}").version == version

    @invariant()
    def stores_what_there_is(self) -> None:
        blobs = {path.name for path in (self.folder / "store/blobs/sha256").iterdir()}
        in_place = self.model.stored - self.model.failed
        assert blobs == {digest_of(content).removeprefix("sha256:") for content in in_place}
        in_quarantine = [entry.digest for entry in self.store.quarantined()]
        assert sorted(in_quarantine) == sorted(digest_of(content) for content in self.model.quarantined)
        sizes = [2 + len(content) for content in (*in_place, *self.model.quarantined)]
        assert self.store.total_bytes() == sum(sizes)
        for content in in_place:
            self.store.verify(digest_of(content))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
