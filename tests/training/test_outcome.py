"""What a run leaves, and when: the adapter and its report before an upload, the curve after it."""

import json
from pathlib import Path
from typing import Any

import pytest

import training.train
from adapters.files import CARD_FILE
from adapters.validate import validate_adapter
from tests.training.bases import bases_in, write_rows
from training.errors import PublishError
from training.outcome import artefacts_folder
from training.recipe import Recipe
from training.train import train


@pytest.mark.parametrize("failure", [None, PublishError("refused"), KeyboardInterrupt()])
def test_only_the_curve_waits_for_the_upload_and_it_comes_even_if_that_fails(
    failure: BaseException | None, tmp_path: Path, base_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases_in(tmp_path, base_cache)("none")
    recipe = Recipe(
        data=write_rows(tmp_path / "rows.jsonl"), out=tmp_path / "out", method="lora", rank=4, max_steps=2,
        publish="127.0.0.1:1", name="x",
    )  # fmt: skip
    artefacts = artefacts_folder(recipe.out)
    uploads: list[Path] = []

    def upload(folder: Path, *_: Any, **__: Any) -> str:
        uploads.append(folder)
        assert validate_adapter(folder, base.layout, max_rank=4, beside=(CARD_FILE,)).delta_norm > 0
        report = json.loads((artefacts / "training.json").read_text())
        assert (report["fit"]["steps"], report["checks"]["canary"]) == (2, "recorded")
        assert report["memory"]["measured_peak"] > 0
        assert not (artefacts / "loss.png").exists()
        if failure is not None:
            raise failure
        return "x@1"

    monkeypatch.setattr(training.train, "resident_at", lambda _: None)
    monkeypatch.setattr(training.train, "publish_adapter", upload)
    if failure is None:
        assert train(recipe, base, progress=False).published == "x@1"
    else:
        with pytest.raises(type(failure)):
            train(recipe, base, progress=False)
    assert uploads == [recipe.out]
    assert {path.name for path in artefacts.iterdir()} == {"training.json", "tensorboard", "loss.png"}
    assert (artefacts / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert ("seconds_to_first_token" in json.loads((artefacts / "training.json").read_text())) == (
        not failure
    )
