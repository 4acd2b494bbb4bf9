"""The demo: its parts against a tiny server, and the whole story on the real model (slow)."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.base import Base, load_base
from quickchange import Client
from quickchange.demo.asking import BASE, Ask, ask_together, everyone, held_out, marks
from quickchange.demo.errors import DemoError
from quickchange.demo.lessons import Lesson, trained
from quickchange.demo.merged import answers_of
from quickchange.demo.screen import one_line
from quickchange.demo.server_process import ServerProcess as DemoServer
from quickchange.demo.swap import swap_under_load
from quickchange.demo.workspace import Workspace
from tests.e2e.process import ServerProcess
from training.tasks import Question, Task, dates_task

QUESTIONS = tuple(Question(f"What is {n}?", "a number", f"{n}", "a number") for n in range(6))
STREAM_TOKENS = 800
"""Some twenty times what a stream gets while an adapter of this size is uploaded and checked."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "demo")


# The parts


def test_base_and_adapters_are_asked_in_one_batch(client: Client, pushed: Mapping[str, str]) -> None:
    tasks = [Task(name, "title", "credit", QUESTIONS, QUESTIONS[:3], ("a", "b")) for name in ("a", "b")]
    together = ask_together(client, everyone(tasks, 2))
    assert len(together.answers) == 2 * 3  # both tasks have the same questions here
    assert together.mixed_steps > 0
    assert together.steps >= together.mixed_steps
    question = QUESTIONS[0]
    answers = {adapter: together.answers[Ask(adapter, question)] for adapter in (BASE, "a", "b")}
    assert len(set(answers.values())) == 3
    assert answers["a"] == client.generate(question.messages, adapter="a", max_new_tokens=20).text


def test_marks_compare_each_adapter_with_the_base(client: Client, pushed: Mapping[str, str]) -> None:
    learned_by_a = client.generate(QUESTIONS[0].messages, adapter="a", max_new_tokens=20).text
    question = Question(QUESTIONS[0].text, learned_by_a, "source", learned_by_a)
    tasks = [Task("a", "title", "credit", (), (question,))]
    (found,) = marks(tasks, ask_together(client, held_out(tasks)))
    assert (found.adapter.exact, found.base.exact, found.base.total) == (1, 0, 1)


def test_a_swap_under_load_disturbs_nobody(
    own_server: Callable[..., ServerProcess], adapters: Mapping[str, Path]
) -> None:
    server = own_server(engine__max_running_requests=16, engine__max_waiting_requests=16)
    with server.client() as client:
        client.adapters.push(adapters["a"], "live")
        swap = swap_under_load(client, "live", adapters["b"], QUESTIONS, stream_tokens=STREAM_TOKENS)
    assert (str(swap.old), str(swap.new)) == ("live@1", "live@2")
    assert swap.streams_on_the_old == len(swap.streams)
    assert all(stream.arrived_s[-1] > swap.published_s for stream in swap.streams)
    assert swap.agreement_with_old == [len(stream.token_ids) for stream in swap.streams]  # float32: exact
    assert max(swap.agreement_with_new) < len(swap.streams[0].token_ids)
    assert swap.answered_by(swap.new)
    assert {answer.adapter.version for answer in swap.asked_afterwards} == {2}


def test_a_stream_that_fails_ends_the_swap_with_its_error(
    client: Client, adapters: Mapping[str, Path]
) -> None:
    with pytest.raises(Exception, match="nobody"):
        swap_under_load(client, "nobody", adapters["b"], QUESTIONS)


def test_a_plain_model_answers_in_its_own_process(base: Path, client: Client) -> None:
    live = [client.generate(question.messages, max_new_tokens=20).text for question in QUESTIONS[:2]]
    assert answers_of(base, [question.messages for question in QUESTIONS[:2]]) == live


def test_a_step_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"merged .*nowhere` failed: .*"):
        answers_of(tmp_path / "nowhere", [])


def test_a_server_that_cannot_start_says_why(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKCHANGE_ENGINE_BLOCK_TOKENS", "none")
    with pytest.raises(DemoError, match=r"the server did not start \(error: .*block_tokens"):
        DemoServer(workspace)


def test_a_kept_server_is_not_pulled_from_under(workspace: Workspace, server: ServerProcess) -> None:
    (workspace.store / "catalogue").touch()
    workspace.remember_server(4711, server.grpc)
    with pytest.raises(DemoError, match="stop it with `kill 4711`, or give another --out"):
        Workspace.open(workspace.root)
    assert (workspace.store / "catalogue").exists()
    workspace.remember_server(4711, "127.0.0.1:1")  # it is gone since
    Workspace.open(workspace.root)
    assert not (workspace.store / "catalogue").exists()


def test_an_adapter_is_kept_for_what_it_was_made_of(
    workspace: Workspace, base: Path, base_cache: Path
) -> None:
    lesson = Lesson("dates", dates_task(rows=8), {"learning_rate": 1e-3})
    tiny = load_base(str(base), purpose="train", device="cpu", cache_dir=base_cache, progress=False)
    first = trained(lesson, workspace, "sha256:1", lambda: tiny)
    again = trained(lesson, workspace, "sha256:1", _asked_for_the_base)
    assert (first.cached, again.cached) == (False, True)
    assert (again.folder, again.losses) == (first.folder, first.losses)
    for changed, fingerprint in (
        (lesson, "sha256:2"),
        (replace(lesson, settings={"learning_rate": 2e-3}), "sha256:1"),
        (replace(lesson, task=dates_task(rows=9)), "sha256:1"),
    ):
        with pytest.raises(AskedForTheBaseError):
            trained(changed, workspace, fingerprint, _asked_for_the_base)


class AskedForTheBaseError(Exception):
    """Something is to be trained."""


def _asked_for_the_base() -> Base:
    raise AskedForTheBaseError


@pytest.mark.parametrize(
    ("text", "shown"), [("a\n\n b", "a b"), ("abcdefgh", "abcd…"), ("abcde", "abcde"), ("", "")]
)
def test_cells_fit_on_a_line(text: str, shown: str) -> None:
    assert one_line(text, 5) == shown


# The whole


@pytest.fixture
def told(smollm2_cache: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs the command as a user would; whatever server it kept is stopped."""

    def tell(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "quickchange", "demo", "--fast", "--out", str(tmp_path / "out")]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=1200, check=False, env=environment
        )

    yield tell
    kept = tmp_path / "out" / "server.json"
    if kept.is_file():
        os.kill(json.loads(kept.read_text())["pid"], 15)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_story(told: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    first = told()
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("trained in") == 4
    scores = re.findall(r"^   (\w+) +(\d+)/12 \(\d+%\) +(\d+)/12", first.stdout, re.MULTILINE)
    assert [name for name, *_ in scores] == ["sentiment", "dates", "language"]
    assert sum(int(adapter) for _, adapter, _ in scores) > 3 + sum(int(base) for *_, base in scores)
    assert re.search(r"[1-9]\d* of them served several adapters at once \(up to 3 beside", first.stdout)
    assert "4 of 4 began on language@1" in first.stdout
    assert "0 got the old version" in first.stdout
    assert "\x1b" not in first.stdout

    second = told("--keep")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("from an earlier run") == 4
    address = re.search(r"the server stays up at (\S+);", second.stdout)
    assert address is not None
    with Client(address[1]) as client:
        assert {model.reference for model in client.models()} >= {"", "sentiment@1", "language@2"}

    third = told()
    assert third.returncode == 1
    assert third.stderr.strip().count("\n") == 0
    assert "the server of an earlier demo still runs" in third.stderr
