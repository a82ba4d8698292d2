"""What deploy/ holds fits the schemas of Kubernetes, the settings of the gateway and the metrics that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml

from codefend.gateway.app import create_app
from codefend.gateway.config import Settings, load_settings
from gateway_kit import Invert

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
VERSION = "1.33"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """The names of all series of a gateway with a shared cache."""
    settings = load_settings(upstream="http://m:1", noise_secret="s" * 16, cache_url="redis://localhost:1")
    app = create_app(settings, purifier=Invert())
    families = list(app.state.meters.registry.collect())
    ends = ("", "_total", "_bucket", "_count", "_sum")
    return {family.name + end for family in families for end in ends}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_schemas(path: Path) -> None:
    kubernetes_validate.validate(load(path), VERSION, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    broken = load(DEPLOY / "kubernetes" / "deployment.yaml")
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)


def test_the_kustomization_names_every_manifest() -> None:
    kustomization = load(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]


def test_all_manifests_select_the_same_pods() -> None:
    deployment, service, budget = (
        load(DEPLOY / "kubernetes" / f"{name}.yaml") for name in ("deployment", "service", "disruption-budget")
    )
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"] == labels
    scaler = load(DEPLOY / "kubernetes" / "autoscaler.yaml")["spec"]["scaleTargetRef"]
    assert (scaler["kind"], scaler["name"]) == ("Deployment", deployment["metadata"]["name"])


def test_pods_run_without_rights_and_have_time_to_drain() -> None:
    pod = load(DEPLOY / "kubernetes" / "deployment.yaml")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"]
    assert (rights["allowPrivilegeEscalation"], rights["capabilities"]) == (False, {"drop": ["ALL"]})
    literals = load(DEPLOY / "kubernetes" / "kustomization.yaml")["configMapGenerator"][0]["literals"]
    config = dict(literal.split("=", 1) for literal in literals)
    drain = float(config["CODEFEND_DRAIN_S"]) + float(config["CODEFEND_LAME_DUCK_S"])
    assert pod["terminationGracePeriodSeconds"] > drain
    assert {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")} == {"/readyz"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"


@pytest.mark.parametrize(
    "file", ["kubernetes/deployment.yaml", "kubernetes/kustomization.yaml", "compose/compose.yaml"]
)
def test_every_variable_is_a_setting(file: str) -> None:
    names = set(re.findall(r"CODEFEND_(\w+)", (DEPLOY / file).read_text()))
    assert names
    assert {name.lower() for name in names} <= set(Settings.model_fields)


def test_the_autoscaler_and_the_dashboard_use_metrics_that_exist(metrics: set[str]) -> None:
    scaler = load(DEPLOY / "kubernetes" / "autoscaler.yaml")["spec"]["metrics"]
    own = {entry["pods"]["metric"]["name"] for entry in scaler if entry["type"] == "Pods"}
    assert own == {"codefend_queue_images", "codefend_pixels_in_flight"} & metrics
    dashboard = json.loads((DEPLOY / "compose" / "grafana" / "dashboards" / "codefend.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    names = set(re.findall(r"\b(?:codefend|process)_\w+", queries))
    assert len(names) > 12
    assert names <= metrics


def test_the_compose_file_fits_its_specification() -> None:
    text = (DEPLOY / "compose" / "compose.yaml").read_text()
    assert "gateway" in compose_spec.PyCompose.from_yaml(text).service_names()
    broken = yaml.safe_load(text)
    broken["services"]["gateway"]["helthcheck"] = {}
    with pytest.raises(ValueError, match="helthcheck"):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(broken))


def test_files_that_compose_mounts_exist() -> None:
    services = load(DEPLOY / "compose" / "compose.yaml")["services"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    assert mounts
    assert all((DEPLOY / "compose" / mount).exists() for mount in mounts)
    provider = load(DEPLOY / "compose" / "grafana" / "provisioning" / "dashboards" / "codefend.yml")["providers"][0]
    targets = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in targets
