"""`kill -9` at every effect of every operation: the old state or the new, never half."""

import json
import subprocess
import sys
import tempfile

import pytest

from tests.adapters.killing import OPERATIONS
from tests.adapters.staging import IN_MEMORY


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_killed_process_leaves_the_old_state_or_the_new(operation: str) -> None:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        command = [sys.executable, "-m", "tests.adapters.killing", operation, folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    outcomes = report["outcomes"]
    assert len(outcomes) > 20, "the process was hardly ever killed"
    if report["same"]:
        assert set(outcomes) == {"old"}
        return
    committed = outcomes.index("new")
    assert outcomes == ["old"] * committed + ["new"] * (len(outcomes) - committed)
    assert 0 < committed < len(outcomes) - 1, "it was never killed after the commit"
