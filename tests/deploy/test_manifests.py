"""What deploys a server: schemas where there are any, and what has to agree with the server's settings."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.config import GrpcSettings, MetricsSettings
from server.setting_sources import settings_from
from tests.server.promised import LORA_INFO, PROMISED

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
GRACE_S = GrpcSettings().drain_grace_s
FLUSH_S = 2
"""What the server takes after the grace, for last messages."""

FOREIGN: Mapping[str, frozenset[str]] = {
    # inference.networking.k8s.io_inferencepools.yaml of the extension, version v1
    "InferencePool": frozenset({
        "appProtocol", "selector.matchLabels", "targetPorts.number", "endpointPickerRef.name",
        "endpointPickerRef.port.number", "endpointPickerRef.failureMode",
    }),
    # monitoring.coreos.com_podmonitors.yaml of the operator, version v1
    "PodMonitor": frozenset({
        "jobLabel", "selector.matchLabels", "podMetricsEndpoints.port", "podMetricsEndpoints.interval",
    }),
}  # fmt: skip
"""Fields of kinds that no schema is here for, as their definitions name them; checked by hand."""


def documents() -> list[dict[str, Any]]:
    return [
        document
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] == kind]


def pods() -> list[dict[str, Any]]:
    return [deployment["spec"]["template"]["spec"] for deployment in of_kind("Deployment")]


def fields(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from fields(item, prefix)
    elif isinstance(value, dict) and not prefix.endswith("matchLabels"):
        for name, item in value.items():
            yield from fields(item, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix


@pytest.mark.parametrize("document", documents(), ids=lambda d: f"{d['kind']} {d['metadata']['name']}")
def test_every_manifest_has_the_fields_of_its_kind(document: dict[str, Any]) -> None:
    if document["kind"] in FOREIGN:
        assert set(fields(document["spec"])) <= FOREIGN[document["kind"]]
    else:
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_a_pod_is_given_the_time_that_draining_takes() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        grace_s = settings_from({"base": "b"}, environment).grpc.drain_grace_s
        needed_s = container["lifecycle"]["preStop"]["sleep"]["seconds"] + grace_s + FLUSH_S
        assert pod["terminationGracePeriodSeconds"] > needed_s


def test_a_pod_has_no_rights_and_a_read_only_root() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        (container,) = pod["containers"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/tmp"}


def test_ports_and_probes_are_the_servers() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"grpc": GrpcSettings().port, "metrics": MetricsSettings().port}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == ports["grpc"]


def test_flags_are_ones_that_the_server_has() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        words = [*container.get("command", ["quickchange", "serve"])[2:], *container["args"]]
        flags = {
            flag.removeprefix("--").replace("-", "_"): value
            for flag, value in zip(words[::2], words[1::2], strict=True)
        }
        assert settings_from(flags, {}).base.source == "smollm2"


def test_whoever_selects_pods_finds_some() -> None:
    labels = [deployment["spec"]["template"]["metadata"]["labels"] for deployment in of_kind("Deployment")]
    selectors = [service["spec"]["selector"] for service in of_kind("Service")]
    for kind in ("PodMonitor", "InferencePool", "PodDisruptionBudget"):
        selectors += [document["spec"]["selector"]["matchLabels"] for document in of_kind(kind)]
    selectors += [document["spec"]["podSelector"]["matchLabels"] for document in of_kind("NetworkPolicy")]
    assert len(selectors) == 6
    for selector in selectors:
        assert any(selector.items() <= pod.items() for pod in labels), selector


def test_whoever_names_a_metric_names_one_there_is() -> None:
    text = "".join(path.read_text() for path in (DEPLOY / "kubernetes").glob("*.yaml"))
    names = set(re.findall(r"(?<![\w-])quickchange_(\w+)", text))
    assert {"requests_waiting", "kv_blocks_used_ratio", "lora_requests_info"} <= names
    assert names <= (PROMISED | LORA_INFO).keys()


def test_the_compose_file_gives_the_server_its_grace_and_no_rights() -> None:
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    assert float(server["stop_grace_period"].removesuffix("s")) > GRACE_S + FLUSH_S
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]


def test_images_are_pinned() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    images = [service["image"] for service in services]
    images += [container["image"] for pod in pods() for container in pod["containers"]]
    images += re.findall(r"^ARG PYTHON_IMAGE=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert len(images) == 6
    assert [image for image in images if not re.search(r":v?\d+\.\d+\.\d+", image)] == []


def test_hadolint_accepts_the_dockerfile() -> None:
    command = [shutil.which("hadolint") or ROOT / ".venv/bin/hadolint", ROOT / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a command that is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (Debian's package systemd)")
    text = (DEPLOY / "systemd/quickchange.service").read_text()
    assert f"TimeoutStopSec={GRACE_S + FLUSH_S + 13:.0f}s" in text
    unit = tmp_path / "quickchange.service"
    unit.write_text(text.replace("/opt/quickchange/bin/quickchange", "/usr/bin/env"))
    return unit


def test_systemd_accepts_the_unit(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_is_hardened(unit: Path) -> None:
    """2.0 of 10 is where systemd stops calling a service OK; one without any of it has 9.6."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
