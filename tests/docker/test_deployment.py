"""docker/systemd and docker/kubernetes: valid by their own validators, and true to what the server does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from curkv.config import OPTIONS, Settings
from curkv.exits import Exit
from curkv.server.run import CLOSE_SECONDS

DOCKER = Path(__file__).parents[2] / "docker"
UNIT = DOCKER / "systemd" / "curkv.service"
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((DOCKER / "kubernetes" / "curkv.yaml").read_text()))
DRAIN = Settings().limits.drain_timeout


def unit(name: str) -> list[str]:
    lines = UNIT.read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (document for document in MANIFESTS if document["kind"] == kind)
    return found


POD = manifest("Deployment")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    """But that the program is not installed where the unit expects it."""
    installed = tmp_path / "curkv.service"
    installed.write_text(
        UNIT.read_text().replace("/opt/curkv/bin/curkv", shutil.which("true") or "/bin/true")
    )
    done = subprocess.run(["systemd-analyze", "verify", installed], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_the_unit_gives_time_to_drain_and_starts_again_only_what_may_start() -> None:
    assert float(*unit("TimeoutStopSec")) > DRAIN + CLOSE_SECONDS
    assert unit("RestartPreventExitStatus") == [f"{Exit.BAD_OPTION:d} {Exit.BAD_MODEL:d}"]


@pytest.mark.parametrize("document", MANIFESTS, ids=lambda document: str(document["kind"]))
def test_manifests_follow_kubernetes_schemas(document: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validate.validate(document, validate.latest_version(), strict=True)


def test_a_pod_has_time_to_drain_and_a_volume_for_models() -> None:
    variables = {variable["name"]: variable for variable in CONTAINER["env"]}
    assert variables.keys() <= {option.variable for option in OPTIONS.values()}
    drain = float(variables["CURKV_DRAIN_TIMEOUT"]["value"])
    before = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert POD["terminationGracePeriodSeconds"] > before + drain + CLOSE_SECONDS - 1
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in CONTAINER["volumeMounts"]}
    claim = mounted["/cache"]["persistentVolumeClaim"]["claimName"]
    assert claim == manifest("PersistentVolumeClaim")["metadata"]["name"]
    assert mounted.keys() == {"/cache", "/tmp"} and CONTAINER["securityContext"]["readOnlyRootFilesystem"]


def test_traffic_goes_to_pods_that_take_requests_and_a_draining_one_is_left_alive() -> None:
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/health"
    assert "httpGet" not in CONTAINER["livenessProbe"]
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Service")["spec"]["selector"].items() <= labels.items()
