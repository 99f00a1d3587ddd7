"""What docker/ promises, as far as it can be checked without Docker, Grafana or Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from curkv.config import OPTIONS
from curkv.server.metrics import Metrics
from tests.server.scripted import ScriptedClient

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/curkv.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule
    for group in yaml.safe_load((DOCKER / "prometheus/rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
VARIABLES = {option.variable for option in OPTIONS.values()}
METRIC = re.compile(r"curkv:[a-z0-9_:]+|process_[a-z_]+")


class ComposeLoader(yaml.SafeLoader):
    """Reads Compose's own tags as the plain values."""


ComposeLoader.add_constructor("!reset", lambda loader, node: loader.construct_sequence(node))


def compose(name: str) -> Any:
    return yaml.load((DOCKER / name).read_text(), ComposeLoader)  # a subclass of SafeLoader


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """Names of all samples that the server can emit."""
    metrics = Metrics("m")
    metrics.describe(ScriptedClient())  # type: ignore[arg-type]
    names = set()
    for family in metrics.registry.collect():
        names |= {family.name + suffix for suffix in SUFFIXES[family.type]}
    return names


SUFFIXES = {
    "gauge": [""],
    "counter": ["_total"],
    "histogram": ["_bucket", "_sum", "_count"],
}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_each_panel_queries_metrics_that_exist_and_names_them(
    panel: dict[str, Any], metrics: set[str]
) -> None:
    used = {name for target in panel["targets"] for name in METRIC.findall(target["expr"])}
    assert used and used <= metrics
    named = set(METRIC.findall(panel["description"]))
    assert (
        {re.sub("_(bucket|sum|count)$", "", name) for name in used}
        <= named
        <= metrics | {re.sub("_bucket$", "", name) for name in metrics}
    )


def test_grafanas_own_schema_knows_all_of_the_dashboard() -> None:
    """Read and written by the models that Grafana generates from its schema, it is what it was."""
    dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard").Dashboard
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder").JSONEncoder
    written = json.loads(encoder().encode(dashboard.from_json(DASHBOARD)))
    assert list(lost(DASHBOARD, written)) == []


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Paths of what is there no more; how the editor had a variable's query written is not needed."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key in given.keys() - {"definition"}:
            yield from lost(given[key], kept.get(key), f"{path}/{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, pair in enumerate(zip(given, kept, strict=True)):
            yield from lost(*pair, f"{path}/{i}")
    elif given != kept:
        yield path


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_each_variable_of_a_query_is_defined() -> None:
    variables = DASHBOARD["templating"]["list"]
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    queries += [variable["definition"] for variable in variables if variable["type"] == "query"]
    used = set(re.findall(r"\$(\w+)", " ".join(queries)))
    assert used == {"__rate_interval", "model_name", "instance", "policy"}
    assert used - {"__rate_interval"} < {variable["name"] for variable in variables}


def test_rules_use_metrics_that_exist(metrics: set[str]) -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for rule in RULES:
        assert set(METRIC.findall(rule["expr"])) <= metrics | recorded, rule
    assert {rule["alert"] for rule in RULES if "alert" in rule} >= {
        "CurkvDown",
        "CurkvPoolNearlyFull",
        "CurkvLatencyBurnsFast",
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_alerts_fire_when_they_should() -> None:
    rules = DOCKER / "prometheus"
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        run = subprocess.run(["promtool", *command], cwd=rules, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def files(service: dict[str, Any]) -> Iterator[Path]:
    for volume in service.get("volumes", ()):
        if volume.startswith("."):
            yield DOCKER / volume.split(":")[0]
    if "build" in service:
        yield DOCKER / service["build"]["context"] / service["build"]["dockerfile"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.replicas.yaml"])
def test_compose_files_name_files_services_and_settings_that_exist(name: str) -> None:
    document = compose(name)
    services = document["services"]
    for service in services.values():
        if "extends" in service:
            service = {
                **compose(service["extends"]["file"])["services"][service["extends"]["service"]],
                **service,
            }
        assert all(path.exists() for path in files(service))
        assert set(service.get("depends_on", ())) <= set(services)
        for variable in service.get("environment", ()):
            assert not variable.startswith("CURKV_") or variable in VARIABLES
        if "build" in service:
            stages = re.findall(r"^FROM .* AS (\S+)", (DOCKER / "Dockerfile").read_text(), re.M)
            assert service["build"]["target"] in stages


def test_the_router_knows_every_replica() -> None:
    services = compose("compose.replicas.yaml")["services"]
    replicas = {name for name, service in services.items() if "curkv" in str(service.get("networks"))}
    workers = {
        word.removeprefix("http://").removesuffix(":8000")
        for word in services["router"]["command"]
        if "http" in word
    }
    assert workers == replicas == {"curkv-1", "curkv-2", "curkv-3"}
