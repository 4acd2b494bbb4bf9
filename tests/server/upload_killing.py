"""Kills a process at every step of an upload that can be resumed, and goes on with what is left.

Run as a program, so that the processes it forks have no threads:
`python -m tests.server.upload_killing OPERATION HOW FOLDER` prints one line of JSON.

HOW is "kill", or "power": then all bytes of the upload that were not yet synchronised are lost as well.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import google_crc32c

from adapters.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.report import ValidationReport
from adapters.store import AdapterStore
from adapters.uploads import Shelved, shelf_key
from quickchange.v1 import adapters_pb2
from server.services import drafts
from server.services.drafts import Ingested, ResumableDraft
from server.services.upload_plan import UploadPlan, plan_of
from tests.adapters.dying import Work, deaths
from tests.adapters.staging import facts_of, references

WEIGHTS = "".join(map(str, range(500)))
DATA = {CONFIG_FILE: b"{}", WEIGHTS_FILE: WEIGHTS.encode()}
FACTS = facts_of(WEIGHTS)
CHUNK_BYTES = 300
SAVE_EVERY_BYTES = 2 * CHUNK_BYTES
KEY = shelf_key("an-upload", "")
SYNCED = "synced"  # beside the store: how much of each file was on disk for good


def plan() -> UploadPlan:
    files = [
        adapters_pb2.UploadFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in DATA.items()
    ]
    return plan_of(adapters_pb2.UploadHeader(name="sql", upload_id="an-upload", files=files), 1 << 20)


def opened(store: AdapterStore) -> ResumableDraft:
    """A stream that begins, or goes on in another process than the last one."""
    draft = ResumableDraft(store, plan(), KEY, None)
    assert draft.open() is None
    return draft


def chunks(offsets: Sequence[int]) -> Iterator[adapters_pb2.UploadChunk]:
    """What is missing from there on."""
    for index, (data, begin) in enumerate(zip(DATA.values(), offsets, strict=True)):
        for offset in range(begin, len(data), CHUNK_BYTES):
            piece = data[offset : offset + CHUNK_BYTES]
            yield adapters_pb2.UploadChunk(
                file_index=index, write_offset=offset, data=piece, crc32c=google_crc32c.value(piece)
            )


def send(draft: ResumableDraft, offsets: Sequence[int], count: int | None = None) -> None:
    for chunk in list(chunks(offsets))[:count]:
        draft.write(chunk)


def publish(store: AdapterStore, draft: ResumableDraft) -> None:
    """What the desk does once all is there and every check has passed."""
    draft.finish()
    record, created = store.publish("sql", draft.folder, FACTS)
    draft.published(Ingested(plan(), FACTS, ValidationReport("sha256:base"), record, created))
    draft.close()


def send_all(store: AdapterStore) -> None:
    draft = opened(store)
    send(draft, (0, 0))
    publish(store, draft)


def send_some(store: AdapterStore) -> None:
    """Up to a cut between two saves."""
    draft = opened(store)
    send(draft, (0, 0), count=4)
    draft.keep()


def go_on(store: AdapterStore) -> None:
    draft = opened(store)
    send(draft, told(store))
    publish(store, draft)


def send_all_and_keep(store: AdapterStore) -> None:
    """Cut after the last chunk."""
    draft = opened(store)
    send(draft, (0, 0))
    draft.keep()


def ask_canary(store: AdapterStore) -> None:
    """The canary is asked, the stream cut, and the next one comes to the end."""
    draft = opened(store)
    draft.finish()
    store.keep_unlisted(draft.folder, FACTS)
    draft.keep()
    publish(store, opened(store))


def start_again(store: AdapterStore) -> None:
    """As clients do that know an upload's ID but not where it stands."""
    draft = opened(store)
    send(draft, (0, 0))
    publish(store, draft)


def send_all_and_delete(store: AdapterStore) -> None:
    send_all(store)
    for digest in store.delete("sql@1"):
        store.remove_blob(digest)


OPERATIONS: dict[str, tuple[Callable[[AdapterStore], object], Callable[[AdapterStore], object]]] = {
    # what was done before: what is done while the process may die
    "send": (lambda store: None, send_all),
    "be cut": (lambda store: None, send_some),
    "go on": (send_some, go_on),
    "start again": (send_some, start_again),
    "ask the canary": (send_all_and_keep, ask_canary),
    "after a deletion": (send_all_and_delete, send_all),
    "remove": (send_some, lambda store: opened(store).discard()),
    "sweep": (send_some, lambda store: store.uploads.sweep(ttl_s=-1.0, keep=0)),
}


def main(operation: str, how: str, folder: Path) -> None:
    drafts.SAVE_EVERY_BYTES = SAVE_EVERY_BYTES  # type: ignore[misc]  # as if the files were large
    before, work = OPERATIONS[operation]
    with AdapterStore(folder / "before") as store:
        before(store)
    outcomes = []
    for root in deaths(folder, working(work, folder / SYNCED)):
        if how == "power":
            lose_unsynced(root, folder)
        outcomes.append(inspect(root))
        (folder / SYNCED).unlink(missing_ok=True)
    print(json.dumps(outcomes))


def working(operation: Callable[[AdapterStore], object], log: Path) -> Work:
    def work(root: Path, be_mortal: Callable[[], None]) -> None:
        store = AdapterStore(root)
        note_syncs(log)
        be_mortal()
        operation(store)

    return work


def note_syncs(log: Path) -> None:
    """Every file that is made durable is noted with its size."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    synchronise = os.fdatasync

    def fdatasync(file: int) -> None:
        synchronise(file)
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        os.write(descriptor, f"{name} {os.fstat(file).st_size}\n".encode())

    os.fdatasync = fdatasync


def lose_unsynced(root: Path, folder: Path) -> None:
    """What a power cut may take: whatever was written to the upload's files since they were synchronised."""
    lines = (folder / SYNCED).read_text().splitlines()
    synced = {name: int(size) for name, size in (line.split() for line in lines)}
    for path in root.glob("uploads/*/files/*"):
        earlier = folder / "before" / path.relative_to(root)
        safe = earlier.stat().st_size if earlier.exists() else 0
        os.truncate(path, min(path.stat().st_size, max(safe, synced.get(path.name, 0))))


def inspect(root: Path) -> str | int:
    """What a server that starts now tells of the upload; what it tells is true, and the upload ends well."""
    with AdapterStore(root) as store:
        shelved, visible = store.uploads.find(KEY), references(store)
        if shelved is not None and shelved.outcome is None:
            is_whole = sum(shelved.offsets) == plan().size_bytes
            assert visible == [] or is_whole, "a part of an upload can be seen"
            check_bytes(root, shelved)
        offsets = told(store)
        end(store, offsets)
        (record,) = store.list()[0]
        assert visible in ([], [record.reference]), "the same content came twice"
        for name, data in DATA.items():
            assert (store.path_of(record.facts.digest) / name).read_bytes() == data
        assert {path.name for path in (root / "uploads" / KEY).iterdir()} == {
            "plan.json", "state.json", "done.json"
        }  # fmt: skip
    if visible:
        return "published"
    return "gone" if shelved is None or shelved.outcome else sum(offsets)


def told(store: AdapterStore) -> tuple[int, ...]:
    """What QueryUpload says, or where a client begins to which it says NOT_FOUND."""
    shelved = store.uploads.find(KEY)
    is_known = shelved and (shelved.outcome is None or drafts.outcome_of(store, shelved.outcome))
    return shelved.offsets if shelved and is_known else (0, 0)


def check_bytes(root: Path, shelved: Shelved) -> None:
    for (name, data), offset in zip(DATA.items(), shelved.offsets, strict=True):
        path = root / "uploads" / KEY / "files" / name
        there = path.read_bytes() if path.exists() else b""
        assert there[:offset] == data[:offset], f"{name} has not the {offset} bytes that are told"


def end(store: AdapterStore, offsets: Sequence[int]) -> None:
    """The uploader comes back and sends what is missing."""
    draft = ResumableDraft(store, plan(), KEY, None)
    if draft.open() is None:
        send(draft, offsets)
        publish(store, draft)
    draft.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
