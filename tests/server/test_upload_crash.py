"""`kill -9` and a power cut at every effect of an upload: what is told is there, and what is left goes on."""

import itertools
import json
import subprocess
import sys
import tempfile

import pytest

from tests.adapters.staging import IN_MEMORY
from tests.server.upload_killing import OPERATIONS

CUT_BYTES = 902  # where `send_some` stops: the first file and three chunks of the second
STORIES = {
    "send": ["gone", 0, 602, 1202, "gone", "published"],
    "be cut": ["gone", 0, 602, CUT_BYTES],
    "go on": [CUT_BYTES, "gone", "published"],
    "start again": [CUT_BYTES, 602, 1202, "gone", "published"],
    "ask the canary": [1392, "published"],
    "after a deletion": ["gone", 0, 602, 1202, "gone", "published"],
    "remove": [CUT_BYTES, "gone"],
    "sweep": [CUT_BYTES, "gone"],
}
"""What a server that starts after each death tells of the upload, in order. "gone" after the last offset is
the moment between moving the files into the store and listing or noting them."""


@pytest.mark.parametrize("how", ["kill", "power"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_told_after_a_death_is_there_and_goes_on(operation: str, how: str) -> None:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        command = [sys.executable, "-m", "tests.server.upload_killing", operation, how, folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    assert len(outcomes) > 20, "the process was hardly ever killed"
    assert [outcome for outcome, _ in itertools.groupby(outcomes)] == STORIES[operation]
