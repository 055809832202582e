"""A language model over several nodes becomes a group of pods, or is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from builders.errors import UnsupportedError
from builders.manifests.overlay import overlay_files, write_manifests
from builders.manifests.sizing import size
from builders.spec import DeploymentSpec, Platform, load_spec
from runtime.pod.__main__ import _parser
from tests.conftest import needs_kubectl
from tests.manifests.test_overlay import objects_of

pytestmark = needs_kubectl


def language_model(tensor: int, pipeline: int, **kubernetes: Any) -> DeploymentSpec:
    return DeploymentSpec.model_validate(
        {
            "name": "llama",
            "model": {"source": "a/b", "task": "generation", "max_length": 4096},
            "parallel": {"tensor": tensor, "pipeline": pipeline},
            "engine": {"flavour": "tensorrt", "targets": ["sm90"]},
            "kubernetes": kubernetes,
        }
    )


@pytest.mark.parametrize(
    ("tensor", "pipeline", "most", "nodes", "each"),
    [(8, 1, 8, 1, 8), (8, 2, 8, 2, 8), (4, 4, 8, 2, 8), (2, 3, 4, 3, 2), (1, 2, 1, 2, 1), (2, 6, 8, 2, 6)],
)
def test_whole_stages_go_to_as_few_nodes_as_hold_them(
    tensor: int, pipeline: int, most: int, nodes: int, each: int
) -> None:
    found = size(language_model(tensor, pipeline, gpus_per_node=most), "gpu")
    assert (found.nodes, found.ranks, found.gpus) == (nodes, each, each)


def test_a_replica_that_nodes_cannot_share_is_refused() -> None:
    spec = load_spec("minilm-tp2")
    small = spec.model_copy(update={"kubernetes": spec.kubernetes.model_copy(update={"gpus_per_node": 1})})
    with pytest.raises(UnsupportedError, match="only language models span nodes"):
        size(small, "gpu")
    with pytest.raises(UnsupportedError, match=r"lower parallel\.tensor and raise"):
        size(language_model(16, 1), "gpu")
    mixed = language_model(8, 2)
    mixed = mixed.model_copy(update={"engine": mixed.engine.model_copy(update={"targets": ("sm89", "sm90")})})
    with pytest.raises(UnsupportedError, match="must be alike"):
        overlay_files(mixed, "gpu")


@pytest.mark.parametrize(
    ("platform", "by", "scaled"),
    [("gpu", "hpa", "HorizontalPodAutoscaler"), ("gpu", "keda", "ScaledObject"), ("cpu", "none", None)],
)
def test_a_replica_over_nodes_is_a_group(platform: Platform, by: str, scaled: str | None, tmp_path: Path) -> None:
    """Its pods are the Deployment's, with the arguments that the pods' program takes; what named the Deployment names
    the group."""
    spec = language_model(8, 2, scaling={"by": by})
    done = write_manifests(spec, platform, tmp_path / "overlay")
    assert (done.nodes, done.gpus_per_pod) == (2, 8 if platform == "gpu" else 0)
    objects = objects_of(tmp_path / "overlay")
    assert not list(objects.of("Deployment"))
    [found] = objects.of("LeaderWorkerSet")
    template = found.data["spec"]["leaderWorkerTemplate"]
    assert found.name == "llama-serving"
    assert template["size"] == 2
    assert found.data["spec"].get("replicas") == (None if scaled else 2)
    if scaled:
        [scaler] = objects.of(scaled)
        target = scaler.data["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("LeaderWorkerSet", "llama-serving")
    variables = {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "llama-serving-0.llama"}
    [settings] = [item.data["data"] for item in objects.of("ConfigMap") if "RANKS_EACH" in item.data["data"]]
    for role, component in (("leader", "serving"), ("worker", "rank")):
        labels = template[f"{role}Template"]["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "llama"
        assert labels["app.kubernetes.io/component"] == component
        pod = template[f"{role}Template"]["spec"]
        [secret] = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "control"]
        assert (secret["secretName"], secret["optional"]) == ("llama-triton-control", False)
        words = [re.sub(r"\$\((\w+)\)", lambda key: (variables | settings)[key[1]], word) for word in pod_args(pod)]
        asked = _parser().parse_args(words)
        assert (asked.hosts, asked.ranks_each, asked.leader) == (2, 8, "llama-serving-0.llama")
        assert str(asked.repository) == "/repository"
        ports = {port["name"] for port in pod["containers"][0]["ports"]}
        probes = [
            pod["containers"][0][f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")
        ]
        assert set(probes) <= ports
    assert asked.host == 1
    assert asked.platform == platform


def pod_args(pod: Any) -> list[str]:
    [triton] = pod["containers"]
    found: list[str] = triton["args"]
    return found
