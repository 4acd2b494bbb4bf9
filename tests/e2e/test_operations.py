"""docs/operations.md against what there is: alerts, flags, metrics, and a backup that is restored."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from quickchange import Client
from quickchange.cli import main
from server.setting_sources import FLAG_NAMES, all_settings
from tests.e2e.process import ServerProcess
from tests.server.promised import CERTIFICATE, PROMISED

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs/operations.md").read_text()
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/rules/alerts.yml").read_text())["groups"]


def test_every_alert_has_a_section_and_points_at_it() -> None:
    rules = [rule for group in ALERTS for rule in group["rules"]]
    headings = re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE)
    assert sorted(rule["alert"] for rule in rules) == sorted(headings)
    for rule in rules:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_flags_and_metrics_that_are_named_are_there() -> None:
    short = {path: flag for flag, path in FLAG_NAMES.items()}
    flags = {short.get(s.path, s.path.split(".")[1]).replace("_", "-") for s in all_settings()}
    others = {"dry-run", "state", "build-arg", "out"}  # of other commands
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", RUNBOOK)) - others <= flags
    names = set(re.findall(r"`(?:quickchange_)?(\w+_(?:total|seconds|bytes|ratio|waiting|up))\b", RUNBOOK))
    assert len(names) > 10
    assert names - {"process_resident_memory_bytes"} <= (PROMISED | CERTIFICATE).keys()


def facts_of(client: Client) -> list[tuple[object, ...]]:
    return [
        (a.name, a.version, a.digest, a.aliases, dict(a.labels), a.pinned) for a in client.adapters.list()
    ]


def test_a_backup_brings_back_versions_aliases_labels_and_pins(
    own_server: Callable[..., ServerProcess], adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    server = own_server()
    with server.client() as client:
        for path in (adapters["a"], adapters["b"]):
            client.adapters.push(path, "sql", labels={"team": "x"})
        client.adapters.alias("sql", "prod", 1)
        client.adapters.pin("sql@2")
        before = facts_of(client)
        tokens = client.generate("back", adapter="sql:prod", max_new_tokens=8).token_ids
    archive, restored = tmp_path / "backup.tar", tmp_path / "restored"
    assert main(["store", "export", "--store", str(server.store), "--out", str(archive)]) == 0
    server.close()
    assert main(["store", "import", "--store", str(restored), str(archive)]) == 0
    with own_server(restored).client() as client:
        after = facts_of(client)
        assert client.generate("back", adapter="sql:prod", max_new_tokens=8).token_ids == tokens

    assert after == before
    assert [entry[-1] for entry in after] == [False, True]
