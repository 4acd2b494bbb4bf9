"""How long a thread may take before it is doubted, and that a pause of the whole process is no hang."""

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from server.watchdog import Progress, Watchdog


def compute(progress: Progress, tokens: int, seconds: float) -> None:
    with progress.computing(tokens):
        time.sleep(seconds)


def test_patience_follows_what_steps_cost() -> None:
    progress = Progress()
    least_s = progress.patience_s
    assert least_s < 1
    compute(progress, 1, 0.2)  # the first one holds what is slow only once
    with progress.computing(128):
        assert progress.patience_s == least_s
    compute(progress, 1, 0.05)
    with progress.computing(128):
        assert progress.patience_s >= 5 * 128 * 0.05
    assert progress.patience_s == least_s  # between two steps nothing takes long
    for _ in range(200):
        compute(progress, 1, 0)
    with progress.computing(128):
        assert progress.patience_s == pytest.approx(least_s)  # what was dear once is forgotten


def test_a_long_step_is_not_doubted_where_steps_are_known_to_be_long() -> None:
    progress, told = Progress(), []
    compute(progress, 1, 0)
    compute(progress, 1, 0.1)
    dog = Watchdog(progress, 60, alive=lambda: True, on_doubt=told.append, on_hang=lambda: None)
    dog.start()
    compute(progress, 8, 1.2)
    compute(progress, 1, 1.2)  # and one that should take a tenth of a second is
    time.sleep(0.2)
    dog.close()
    assert told == [True, False]


def test_what_is_known_to_take_long_may_take_longer_than_the_bound() -> None:
    progress, hung = Progress(), threading.Event()
    compute(progress, 1, 0)
    compute(progress, 1, 0.1)
    dog = Watchdog(progress, 1, alive=lambda: True, on_doubt=lambda _: None, on_hang=hung.set)
    dog.start()
    compute(progress, 8, 2.0)
    assert not hung.is_set()
    dog.close()


def test_a_thread_that_ended_does_not_hang() -> None:
    hung = threading.Event()
    dog = Watchdog(Progress(), 1, alive=lambda: False, on_doubt=lambda _: None, on_hang=hung.set)
    dog.start()
    assert not hung.wait(1.5)


PAUSED = """
    # Pauses itself for longer than the bound, with a thread that gets on in between.
    import os, signal, subprocess, sys, threading, time
    from server.watchdog import Progress, Watchdog

    progress, told = Progress(), []
    calls = {"on_doubt": told.append, "on_hang": lambda: told.append("hang")}
    dog = Watchdog(progress, 1.0, alive=lambda: True, **calls)
    dog.start()
    waking = subprocess.Popen(["sh", "-c", f"sleep 2.5; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    progress.mark()
    time.sleep(0.3)
    waking.wait()
    sys.exit(0 if told == [] else f"{told}")
"""


def test_a_process_that_was_paused_does_not_find_itself_hanging() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PAUSED)], timeout=60, check=False)
    assert done.returncode == 0
