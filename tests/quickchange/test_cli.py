"""The command line against the scripted server: what it sends and prints, how it fails, its exit codes."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from quickchange.cli import COMMANDS, main
from quickchange.v1 import inference_pb2, server_pb2
from tests.quickchange.scripted import DIGEST, Script, queue_full, rich

ACTIONS = (
    *("push", "check", "list", "show", "alias", "pin", "unpin", "load", "unload", "rm", "pull"),
    *("watch", "gc"),
)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command against the scripted server; gives exit code, standard output and standard error."""
    monkeypatch.setenv("QUICKCHANGE_SERVER", target)

    def once(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        output = capsys.readouterr()
        return code, output.out, output.err

    return once


@contextmanager
def spawned(*argv: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A command as a process of its own, which does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "quickchange", *argv],
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,  # type: ignore[call-overload]
    )
    with process:
        try:
            yield process
        finally:
            process.kill()  # no effect on one that has ended


# Asking


def test_generate_prints_the_answer_alone(run: Run, script: Script) -> None:
    assert run("generate", "--adapter", "sql:prod", "--max-new-tokens", "5", "Hello") == (0, "SELECT 1\n", "")
    request = script.requests[0]
    assert (request.text, request.adapter, request.sampling.max_new_tokens) == ("Hello", "sql:prod", 5)
    assert not request.sampling.HasField("temperature")


def test_generate_sends_what_is_typed(run: Run, script: Script) -> None:
    flags = (
        *("--temperature", "0.5", "--top-p", "0.75", "--top-k", "9", "--min-p", "0.25", "--seed", "7"),
        *("--repetition-penalty", "1.5", "--stop", "A", "--stop", "B", "--logprobs", "1", "--echo"),
    )
    assert run("generate", *flags, "Hello")[0] == 0
    request = script.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.75, 9, 0.25)
    assert (sampling.seed, sampling.repetition_penalty) == (7, 1.5)
    assert (list(request.stopping.stop), request.output.logprobs, request.output.echo) == (
        ["A", "B"],
        1,
        True,
    )


def test_generate_as_chat_and_from_standard_input(
    run: Run, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("line 1\nline 2\n")
    with (tmp_path / "prompt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run("generate", "--chat", "--system", "Be brief.", "-")[0] == 0
    messages = [(message.role, message.content) for message in script.requests[0].chat.messages]
    assert messages == [("system", "Be brief."), ("user", "line 1\nline 2\n")]
    code, _, err = run("generate", "--system", "x", "Hello")
    assert (code, err) == (2, "error: --system goes with --chat; add it\n")


def test_generate_json_has_everything(run: Run) -> None:
    code, out, _ = run("generate", "--adapter", "sql", "--logprobs", "1", "--json", "Hello")
    answer = json.loads(out)
    assert code == 0
    assert answer["adapter"] == {"name": "sql", "version": 3, "digest": DIGEST}
    assert answer["finish_reason"] == "length"
    assert answer["token_ids"] == [5, 6]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["timings"]["total_s"] == 1.0
    assert answer["logprobs"][0]["alternatives"] == [[9, -1.5]]


def test_generate_stream(run: Run) -> None:
    assert run("generate", "--stream", "Hello") == (0, "t0 t1 t2 \n", "")
    _, out, _ = run("generate", "--stream", "--json", "Hello")
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["started", "delta", "delta", "delta", "finished"]
    assert events[4]["finish_reason"] == "stop"


def test_generate_retries_only_if_told(run: Run, script: Script) -> None:
    script.failures = [queue_full(0.01)]
    assert run("generate", "Hello") == (1, "", "error: the queue is full\n")
    script.failures = [queue_full(0.01)]
    assert run("generate", "--retries", "1", "Hello")[0] == 0


def test_chat_keeps_history_and_changes_adapter(
    run: Run, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = ["Hi", "", "/adapter sql:prod", "More", "/what", "/reset", "/adapter", "Again", "/exit", "never"]
    (tmp_path / "lines").write_text("\n".join(lines))
    with (tmp_path / "lines").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = run("chat", "--system", "Be brief.", "--adapter", "first", "--seed", "3")
    assert code == 0
    assert out == "t0 t1 t2 \n" * 3
    asked = [entry.request for entry in script.requests if hasattr(entry, "request")]
    assert [[message.content for message in entry.chat.messages] for entry in asked] == [
        ["Be brief.", "Hi"],
        ["Be brief.", "Hi", "t0 t1 t2 ", "More"],
        ["Be brief.", "Again"],
    ]
    assert [entry.adapter for entry in asked] == ["first", "sql:prod", ""]
    assert {entry.sampling.seed for entry in asked} == {3}
    assert "no command /what" in err
    assert "the base answers from here on" in err


def test_chat_that_is_no_conversation_fails_at_the_first_error(
    run: Run, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lines").write_text("Hi\nMore\n")
    script.failures = [rich(grpc.StatusCode.NOT_FOUND, "no adapter x", "ADAPTER_NOT_FOUND")]
    with (tmp_path / "lines").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run("chat", "--adapter", "x") == (1, "", "error: no adapter x\n")
    assert len(script.requests) == 1


def test_chat_at_a_terminal(target: str, script: Script) -> None:
    ours, theirs = pty.openpty()
    with spawned("chat", "--server", target, stdin=theirs, stderr=theirs, stdout=theirs) as process:
        os.close(theirs)
        assert _read_until(ours, b"> ")
        script.failures = [rich(grpc.StatusCode.NOT_FOUND, "no adapter x", "ADAPTER_NOT_FOUND")]
        os.write(ours, b"Hi\n")
        assert b"error: no adapter x" in _read_until(ours, b"> ")
        script.endless = True
        script.ended.clear()
        os.write(ours, b"Hello\n")
        _read_until(ours, b"t1 ")
        process.send_signal(signal.SIGINT)
        assert b"[stopped]" in _read_until(ours, b"> ")
        assert script.ended.wait(5)
        script.endless = False
        os.write(ours, b"Bye\n")
        assert b"t0 t1 t2" in _read_until(ours, b"> ")
        os.write(ours, b"\x04")
        assert process.wait(10) == 0
    os.close(ours)
    last = script.requests[-1].request.chat.messages
    assert [message.role for message in last] == ["user", "assistant", "user"]  # the refused one is forgotten
    assert last[1].content.startswith("t0 t1 ")


def _read_until(terminal: int, end: bytes) -> bytes:
    shown = b""
    while end not in shown:
        assert select.select([terminal], [], [], 20)[0], f"no {end!r} after {shown!r}"
        shown += os.read(terminal, 1024)
    return shown


# Adapters


def test_push(run: Run, script: Script, folder: Path) -> None:
    code, out, err = run(
        *("adapters", "push", str(folder), "--name", "sql", "--label", "team=a", "--label", "x=y=z"),
        *("--description", "SQL", "--alias", "prod", "--alias", "canary"),
    )
    assert (code, out, err) == (0, f"sql@1 {DIGEST}\n", "rank 8, 1 modules, |ΔW| 0.5\n")
    header = script.uploads[0][0].header
    assert dict(header.labels) == {"team": "a", "x": "y=z"}
    assert header.description == "SQL"
    updates = [entry for entry in script.requests if entry != "upload"]
    assert [(entry.adapter, list(entry.set_aliases)) for entry in updates] == [
        ("sql@1", ["prod"]),
        ("sql@1", ["canary"]),
    ]


def test_push_validate_only_publishes_no_alias(run: Run, script: Script, folder: Path) -> None:
    code, out, _ = run("adapters", "push", str(folder), "--name", "sql", "--validate-only", "--alias", "prod")
    assert (code, out) == (0, "valid: rank 8, 1 modules, |ΔW| 0.5\n")
    assert script.requests == ["upload"]


def test_push_shows_progress_if_asked(run: Run, folder: Path) -> None:
    _, _, err = run("adapters", "push", str(folder), "--name", "sql", "--progress")
    assert "push sql" in err
    assert "100%" in err


def test_push_of_nothing(run: Run, tmp_path: Path) -> None:
    code, out, err = run("adapters", "push", str(tmp_path), "--name", "sql")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path} has no adapter_config.json")
    assert err.count("\n") == 1


def test_list_as_table_and_as_json(run: Run) -> None:
    _, out, _ = run("adapters", "list")
    lines = out.splitlines()
    assert lines[0].split() == [
        "ADAPTER",
        "ALIASES",
        "STATE",
        "WHERE",
        "PINNED",
        "METHOD",
        "RANK",
        "SIZE",
        "DIGEST",
    ]
    assert lines[1].split() == ["a0@1", "prod", "ready", "disk", "-", "rslora", "8", "2.0", "KiB", "ab" * 6]
    assert len(lines) == 4
    _, out, _ = run("adapters", "list", "--json", "--state", "ready", "--label", "a=b")
    assert [entry["name"] for entry in json.loads(out)] == ["a0", "a1", "a2"]


def test_list_of_nothing_is_a_header(run: Run, script: Script) -> None:
    script.adapters = 0
    assert run("adapters", "list")[1].startswith("ADAPTER")
    assert json.loads(run("adapters", "list", "--json")[1]) == []


def test_show(run: Run) -> None:
    _, out, _ = run("adapters", "show", "sql:prod")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["method"] == "rslora, rank 8, alpha 16"
    assert facts["digest"] == DIGEST
    assert "error" not in facts
    shown = json.loads(run("adapters", "show", "sql", "--json")[1])
    assert shown["create_time"] == "2023-11-14T22:13:20+00:00"


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        (("alias", "sql", "prod", "3"), "sql:prod is sql@3\n"),
        (("alias", "sql", "prod", "--remove"), "sql:prod removed\n"),
        (("pin", "sql@3"), "sql@3 pinned\n"),
        (("unpin", "sql@3"), "sql@3 unpinned\n"),
        (("load", "sql"), "sql@3 device\n"),
        (("unload", "sql"), "sql@3 disk\n"),
        (("rm", "sql@3"), "1 version deleted\n"),
        (("rm", "sql", "--all-versions"), "2 versions deleted\n"),
    ],
)
def test_small_commands(run: Run, argv: tuple[str, ...], out: str) -> None:
    assert run("adapters", *argv) == (0, out, "")


def test_pull(run: Run, script: Script, tmp_path: Path) -> None:
    script.files = {"adapter_config.json": b"{}"}
    assert run("adapters", "pull", "sql", str(tmp_path / "new"))[:2] == (0, f"sql@3 {tmp_path}/new (2 B)\n")
    code, _, err = run("adapters", "pull", "sql", str(tmp_path / "new"))
    assert (code, "not an empty folder" in err) == (1, True)


def test_info(run: Run) -> None:
    _, out, _ = run("info")
    assert "base         tiny (nf4, float32 on cpu)" in out
    assert "4 mixed adapters (up to 3 at once)" in out
    assert "512 tokens; a prompt up to all of it, an answer up to 128, 4 answers to a request" in out
    assert json.loads(run("info", "--json")[1])["limits"]["max_context_tokens"] == 512
    assert "merged" not in out


@pytest.mark.parametrize(
    ("into", "note"),
    [("dequantized", "dequantized\n"), ("requantized", "requantized, which is not quite the live adapter\n")],
)
def test_info_shows_what_is_merged(run: Run, script: Script, into: str, note: str) -> None:
    sql = inference_pb2.ResolvedAdapter(name="sql", version=3, digest="sha256:5")
    script.merged = server_pb2.MergedAdapter(adapter=sql, into=into, bare_base_fingerprint="sha256:b")
    _, out, _ = run("info")
    assert f"merged       sql@3 (sha256:5), {note}" in out
    assert "bare base    sha256:b\n" in out
    assert json.loads(run("info", "--json")[1])["merged"]["adapter"]["name"] == "sql"


# Failing


def test_errors_are_one_line_with_the_remedy(run: Run, script: Script, free_port: int) -> None:
    script.failures = [rich(grpc.StatusCode.NOT_FOUND, "no adapter\nx;  push it", "ADAPTER_NOT_FOUND")]
    assert run("adapters", "show", "x") == (1, "", "error: no adapter x; push it\n")
    code, out, err = run("generate", "--server", f"127.0.0.1:{free_port}", "--wait", "0.1", "x")
    assert (code, out) == (1, "")
    assert err == (
        f"error: no server answers at 127.0.0.1:{free_port}; "
        "start one with `quickchange serve`, or correct the address\n"
    )


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("nonsense",),
        ("generate",),
        ("generate", "--max-new-tokens", "many", "x"),
        ("generate", "--timeout", "0", "x"),
        ("generate", "--time", "1", "x"),
        ("adapters",),
        ("adapters", "push", "dir"),
        ("adapters", "push", "dir", "--name", "x", "--label", "novalue"),
        ("adapters", "alias", "sql", "prod"),
        ("adapters", "alias", "sql", "prod", "3", "--remove"),
        ("adapters", "list", "--state", "brilliant"),
        ("merge", "--base", "x"),
    ],
)
def test_misuse_exits_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: quickchange" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        *(f"adapters {action}" for action in ACTIONS),
    ],
)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: quickchange {command}" in shown
    assert f"  quickchange {command}" in shown.partition("examples:")[2]


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from quickchange.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'yaml', 'tqdm') if m in sys.modules])"
    )
    for flag in ("--help", "--version"):
        shown = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=True)
        assert shown.stdout.splitlines()[-1] == "[]"
    assert shown.stdout.startswith("quickchange 0.")


def test_ctrl_c_exits_130_without_a_trace_and_cancels(target: str, script: Script) -> None:
    for argv in (("generate", "x"), ("generate", "--stream", "x")):
        script.endless = True
        script.begun.clear()
        script.ended.clear()
        with spawned(*argv, "--server", target) as process:
            assert script.begun.wait(20)
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (130, "")
        assert script.ended.wait(5)


def test_text_that_the_terminal_cannot_show(target: str, script: Script) -> None:
    script.text = "naïve 日本"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    with spawned("generate", "x", "--server", target, env=environment, encoding="latin-1") as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "naïve ??\n", "")


def test_standard_input_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    with (
        (tmp_path / "bytes").open() as stdin,
        spawned("generate", "-", stdin=stdin, env=environment) as process,
    ):
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: standard input is no text")


def test_a_closed_pipe_is_quiet(target: str, script: Script) -> None:
    script.endless = True
    with spawned("generate", "--stream", "x", "--server", target) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "t0 "
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        process.wait(10)
    assert (process.returncode, err) == (141, "")
    assert script.ended.wait(5)


def test_a_pipe_closed_before_a_short_answer_is_quiet(target: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed:
        result = subprocess.run(
            [sys.executable, "-m", "quickchange", "info", "--server", target],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (result.returncode, result.stderr) == (141, "")
