"""A store as a file and back: the same store, or nothing; whatever else the file holds is refused."""

import io
import json
import sqlite3
import tarfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import (
    AdapterCorruptError,
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    InvalidAdapterError,
)
from adapters.export_archive import export_store
from adapters.facts import AdapterFacts
from adapters.files import WEIGHTS_FILE
from adapters.import_archive import import_store
from adapters.layout import BaseLayout
from adapters.store import AdapterStore
from quickchange.cli import main
from tests.adapters.builders import put
from tests.adapters.published import listed
from tests.adapters.staging import references, staged_by_anyone

Publish = Callable[..., AdapterFacts]


@pytest.fixture
def archive(origin: AdapterStore, tmp_path: Path) -> Path:
    export_store(origin, tmp_path / "store.tar")
    return tmp_path / "store.tar"


def test_there_and_back(
    origin: AdapterStore, archive: Path, tmp_path: Path, folders: Mapping[str, Path], layout: BaseLayout
) -> None:
    steps: list[tuple[int, int]] = []
    with AdapterStore(tmp_path / "new") as new:
        adopted = import_store(new, archive, report=lambda *step: steps.append(step))
        assert [(each.version, each.created) for each in adopted] == [(1, True), (1, True), (2, True)]
        assert listed(new) == listed(origin)
        for record in new.list()[0]:
            new.verify(record.facts.digest)
        assert staged_by_anyone(tmp_path / "new") == []
        assert not any(each.created for each in import_store(new, archive))
        put(new, "sql", folders["c"], layout)
        assert references(new, name="sql") == ["sql@1", "sql@2", "sql@4"]  # 3 was used where it came from
    assert steps[-1][0] == steps[-1][1] > 0
    with tarfile.open(archive) as plain:  # any tar reads it
        assert plain.getnames()[0] == "manifest.json"


def test_chosen_names(archive: Path, tmp_path: Path, origin: AdapterStore) -> None:
    with AdapterStore(tmp_path / "new") as new:
        import_store(new, archive, names=["other"])
        assert references(new) == ["other@1"]
        assert len(list((tmp_path / "new/blobs/sha256").iterdir())) == 1
        with pytest.raises(AdapterNotFoundError):
            import_store(new, archive, names=["nobody"])
    done = export_store(origin, tmp_path / "one.tar", names=["other"])
    assert (done.versions, done.contents) == (1, 1)
    with pytest.raises(AdapterNotFoundError):
        export_store(origin, tmp_path / "none.tar", names=["nobody"])
    with pytest.raises(InvalidAdapterError, match="is there already"):
        export_store(origin, archive)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "one.tar", "store", "store.tar"]


def test_other_content_under_a_number_is_refused_or_renumbered(
    archive: Path, tmp_path: Path, folders: Mapping[str, Path], layout: BaseLayout
) -> None:
    with AdapterStore(tmp_path / "new") as new:
        put(new, "sql", folders["c"], layout)
        new.update("sql", 1, set_aliases=["prod"])
        before = listed(new)
        with pytest.raises(AdapterExistsError, match="--renumber"):
            import_store(new, archive)
        assert listed(new) == before
        assert len(list((tmp_path / "new/blobs/sha256").iterdir())) == 1
        adopted = import_store(new, archive, renumber=True)
        assert [(each.listed.reference, each.version) for each in adopted] == [
            ("other@1", 1),
            ("sql@1", 2),
            ("sql@2", 2 + 1),
        ]
        assert adopted[1].aliases_left == ("prod",)
        assert new.resolve("sql:prod").version == 1
        assert not any(each.created for each in import_store(new, archive, renumber=True))


def test_a_deletion_during_an_export_takes_nothing_from_it(
    origin: AdapterStore, tmp_path: Path, root: Path
) -> None:
    deleted = False

    def delete(done_bytes: int, total_bytes: int) -> None:
        nonlocal deleted
        if not deleted:
            deleted = True
            with AdapterStore(root) as other:
                for digest in other.delete("sql", all_versions=True) + other.delete("other"):
                    assert not other.remove_blob(digest)
                other.recover()

    export_store(origin, tmp_path / "store.tar", report=delete)
    assert references(origin) == []
    with AdapterStore(tmp_path / "new") as new:
        import_store(new, tmp_path / "store.tar")
        assert references(new) == ["other@1", "sql@1", "sql@2"]
    origin.recover()
    assert list((root / "blobs/sha256").iterdir()) == []


def test_a_damaged_adapter_stops_an_export_once(origin: AdapterStore, tmp_path: Path) -> None:
    path = origin.path_of(origin.get("sql@2").facts.digest) / WEIGHTS_FILE
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(AdapterCorruptError, match="SHA-256"):
        export_store(origin, tmp_path / "store.tar")
    assert origin.get("sql@2").state == "FAILED"
    assert export_store(origin, tmp_path / "store.tar").left_out == ("sql@2",)


def refused(archive: Path, tmp_path: Path) -> AdapterError:
    """The error of an import that must leave nothing."""
    with AdapterStore(tmp_path / "new") as new:
        with pytest.raises(AdapterError) as refusal:
            import_store(new, archive)
        assert references(new) == []
        assert staged_by_anyone(tmp_path / "new") == []
        assert list((tmp_path / "new/blobs/sha256").iterdir()) == []
    return refusal.value


def rebuilt(archive: Path, change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]) -> None:
    """Rewrites an archive with each member changed."""
    with tarfile.open(archive) as tar:
        members = []
        for info in tar.getmembers():
            file = tar.extractfile(info)
            assert file is not None
            members.append((info, file.read()))
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            changed, data = change(info, data)
            changed.size = len(data) if changed.isreg() else 0
            tar.addfile(changed, io.BytesIO(data))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files(kind: bytes, archive: Path, tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if info.name.endswith(WEIGHTS_FILE):
            info.type, info.linkname = kind, "/etc/passwd"
        return info, data

    rebuilt(archive, change)
    assert isinstance(refused(archive, tmp_path), InvalidAdapterError)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "x/../../escaped", "a" * 90])
def test_names_that_lead_elsewhere(name: str, archive: Path, tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if info.name.endswith(WEIGHTS_FILE):
            info.name = name
        return info, data

    rebuilt(archive, change)
    assert "where" in str(refused(archive, tmp_path))
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    "path",
    [
        ("contents", 0, 0, "name"),
        ("versions", 0, "name"),
        ("versions", 0, "digest"),
        ("versions", 0, "version"),
        ("versions", 0, "aliases"),
        ("versions", 0, "created_s"),
        ("last_versions", 0),
        ("format",),
        ("versions",),
        ("contents",),
    ],
)
@pytest.mark.parametrize("value", ["../x", -1, None, {"": []}, [["x"]]])
def test_manifests_that_say_what_cannot_be(
    path: tuple[str | int, ...], value: object, archive: Path, tmp_path: Path
) -> None:
    def change(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if info.name == "manifest.json":
            document = place = json.loads(data)
            for step in path[:-1]:
                place = next(iter(place.values())) if isinstance(place, dict) and step == 0 else place[step]
            last = next(iter(place)) if path[-1] == 0 else path[-1]
            place[last] = value
            data = json.dumps(document).encode()
        return info, data

    rebuilt(archive, change)
    error = refused(archive, tmp_path)  # a harmless change still breaks the seal
    assert isinstance(error, InvalidAdapterError | AdapterCorruptError)


def test_content_under_a_false_digest(origin: AdapterStore, root: Path, tmp_path: Path) -> None:
    """Everything agrees with everything, but the digest is not the content's."""
    true, false = origin.get("other@1").facts.digest, "sha256:" + "0" * 64
    origin.path_of(true).rename(root / "blobs/sha256" / false[7:])
    with closing(sqlite3.connect(root / "catalogue.sqlite3")) as connection:
        connection.execute("UPDATE versions SET digest = ? WHERE digest = ?", (false, true))
        connection.execute(
            "UPDATE contents SET digest = ?1, facts = replace(facts, ?2, ?1) WHERE digest = ?2", (false, true)
        )
        connection.commit()
    export_store(origin, tmp_path / "forged.tar")
    assert f"has the content {true} under the digest {false}" in str(
        refused(tmp_path / "forged.tar", tmp_path)
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_an_archive_that_is_cut_or_flipped_anywhere(
    data: st.DataObject, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = archive.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1025))  # before the mark of the end, which says nothing
    broken = raw[:at] if data.draw(st.booleans()) else raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
    folder = tmp_path_factory.mktemp("broken")
    (folder / "store.tar").write_bytes(broken)
    with AdapterStore(folder / "new") as new:
        try:
            import_store(new, folder / "store.tar")
        except AdapterError:
            assert references(new) == []
        else:  # only what nobody reads: padding of a head
            assert references(new) == ["other@1", "sql@1", "sql@2"]
            for record in new.list()[0]:
                new.verify(record.facts.digest)
        assert staged_by_anyone(folder / "new") == []


def test_the_command(
    origin: AdapterStore, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, new = str(tmp_path / "out.tar"), str(tmp_path / "new")
    assert main(["store", "export", "--store", str(root), "--out", out]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 3 versions, 2 contents, ")
    assert main(["store", "import", "--store", new, out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 versions imported, 0 were there already"
    assert main(["store", "import", "--store", new, out, "--json"]) == 0
    assert not any(each["created"] for each in json.loads(capsys.readouterr().out))
    assert main(["store", "export", "--store", str(tmp_path / "none"), "--out", out]) == 1
    assert "is no store of adapters" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["store", "import", "--store", new, str(root / "catalogue.sqlite3")]) == 1
    assert capsys.readouterr().err.startswith("error: the archive ")
