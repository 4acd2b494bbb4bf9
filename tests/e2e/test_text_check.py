"""An adapter says at which tokens its answers end; a server that would go on after one of them refuses it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.text import load_text
from quickchange import CheckOutcome, Client, FailedPreconditionError
from quickchange.types import UploadResult
from tests.e2e.spoiling import MANIFEST


@pytest.fixture
def fingerprint(client: Client) -> str:
    return client.server_info().base_fingerprint


def dry_run(client: Client, adapter: Path, folder: Path, **members: Any) -> UploadResult:
    """What the server says of the adapter with this manifest."""
    copy = Path(shutil.copytree(adapter, folder / "copy"))
    (copy / MANIFEST).write_text(json.dumps({"format": 1} | members))
    return client.adapters.push(copy, "ends", validate_only=True)


def test_where_answers_end_is_compared_with_the_base(
    client: Client, base: Path, adapters: Mapping[str, Path], fingerprint: str, tmp_path: Path
) -> None:
    text = load_text(str(base))
    ends = sorted(text.eos_token_ids)
    result = dry_run(
        client, adapters["a"], tmp_path, base_fingerprint=fingerprint, eos_token_ids=ends,
        chat_template=text.chat_template, training={"recipe": {"rank": 4}, "metrics": {"final_loss": 0.5}},
    )  # fmt: skip
    check = result.report.check("text")
    assert check is not None
    assert check.outcome is CheckOutcome.PASSED
    assert f"answers end at {', '.join(map(str, ends))}; " in check.detail
    assert check.detail.endswith("the base's template")


def test_an_end_that_the_base_does_not_know_is_refused(
    client: Client, base: Path, adapters: Mapping[str, Path], fingerprint: str, tmp_path: Path
) -> None:
    ends = sorted(load_text(str(base)).eos_token_ids | {77})
    with pytest.raises(FailedPreconditionError, match="does not stop at 77 but at") as refusal:
        dry_run(client, adapters["a"], tmp_path, base_fingerprint=fingerprint, eos_token_ids=ends)
    assert refusal.value.reason == "WRONG_BASE"
    report = refusal.value.report
    assert report is not None
    assert [check.name for check in report.checks if check.outcome is CheckOutcome.FAILED] == ["text"]


def test_an_adapter_without_a_manifest_is_not_asked(client: Client, adapters: Mapping[str, Path]) -> None:
    report = client.adapters.push(adapters["a"], "ends", validate_only=True).report
    check = report.check("text")
    assert check is not None
    assert check.outcome is CheckOutcome.SKIPPED
