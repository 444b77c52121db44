"""The cluster manifests parse, fit KubeRay's schema where it is at hand, and agree with the package."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from moleblend_ray.config.compose import load_config
from moleblend_ray.config.pretrain import PretrainConfig

REPOSITORY = Path(__file__).resolve().parents[2]
MANIFESTS = sorted((REPOSITORY / "infra" / "kuberay").rglob("*.yaml"))


def pinned(package: str) -> str:
    text = (REPOSITORY / "constraints.txt").read_text()
    found = re.search(rf"^{package}==(.+)$", text, re.M)
    assert found is not None
    return found[1]


def manifest_of(file: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(file.read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.shared_data
@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_manifests_fit_the_schema_of_kuberay(file: Path, shared_data: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((shared_data / "kuberay" / "rayjob-v1.schema.json").read_text())
    jsonschema.validate(manifest_of(file), schema)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_manifests_run_the_tested_ray_in_one_image_of_this_version(file: Path) -> None:
    cluster = manifest_of(file)["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {
        container["image"]
        for group in groups
        for container in group["template"]["spec"]["containers"]
    }
    version = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert images == {f"moleblend-ray:{version[1]}-gpu"}


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_manifests_keep_the_operator_s_rules(file: Path) -> None:
    manifest = manifest_of(file)
    spec = manifest["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"])
    assert spec["shutdownAfterJobFinishes"] is True
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"]), dict)
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert not {"num-cpus", "num-gpus", "memory"} & set(group["rayStartParams"])


def test_the_pretraining_entrypoint_composes_and_fits_its_cluster() -> None:
    spec = manifest_of(REPOSITORY / "infra" / "kuberay" / "pretrain.yaml")["spec"]
    python, script, *overrides = shlex.split(spec["entrypoint"])
    assert python == "python"
    assert (REPOSITORY / script).is_file()
    config = load_config(PretrainConfig, "pretrain", overrides)
    gpus = sum(
        group["replicas"] * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    )
    assert config.cluster.use_gpu
    assert config.cluster.num_workers == gpus


def test_the_docker_recipe_copies_only_what_exists() -> None:
    recipe = (REPOSITORY / "infra" / "docker" / "Dockerfile").read_text()
    sources = {
        source for line in re.findall(r"^COPY (.+)$", recipe, re.M) for source in line.split()[:-1]
    }
    assert {source for source in sources if not (REPOSITORY / source).exists()} == set()
    assert len(re.findall(r"^USER ray$", recipe, re.M)) == 2


def test_the_docker_recipe_names_no_package_index() -> None:
    recipe = (REPOSITORY / "infra" / "docker" / "Dockerfile").read_text()
    assert "://" not in recipe
    assert re.search(r"^ARG TORCH_INDEX$", recipe, re.M)
