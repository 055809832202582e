"""`trireme manifests`: a kustomize overlay from a spec.

    <folder>/
      kustomization.yaml   what it is made of, and the settings that all pods read
      replica/             the pod: devices, memory, probes, grace
      store/, scaling/     the model store, the autoscaler
      access/              keys and certificate of the pods' gateway
      surroundings/        the way in from outside, alerts
      group/               the nodes of a replica, where it has several
      build/               what the engine-build Job builds, and where
      k8s/                 base and components, copied, so that the folder stands alone
      rendered.yaml        what `kubectl kustomize` makes of it, checked

Planning is pure (`overlay_files`); writing is `write_manifests`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.errors import InputError, SpecError
from builders.manifests.access import access
from builders.manifests.jobs import jobs
from builders.manifests.lint.check import ManifestFault, check_text
from builders.manifests.patches import Patch, group, images, namespace_of, replica
from builders.manifests.render import K8S, render
from builders.manifests.scaling import scaler
from builders.manifests.sizing import Sizing, size
from builders.manifests.storage import store
from builders.manifests.surroundings import DASHBOARD, creates_namespace, dashboard, gateway, monitors
from builders.manifests.written import written
from builders.spec import DeploymentSpec, Platform
from builders.store.atomic import atomic_directory
from runtime.record import Record

RENDERED = "rendered.yaml"
_HEADER = "# Written by `trireme manifests`; change the spec and write it again.\n"


class Manifests(Record):
    """What was written. `namespace` holds everything; `workload` is the Deployment, or the LeaderWorkerSet of a replica
    over several nodes."""

    directory: Path
    namespace: str
    workload: str
    objects: int
    gpus_per_pod: int
    nodes: int


@dataclass(frozen=True)
class Overlay:
    """The overlay's own files by path, before `k8s/` is copied beside them."""

    files: Mapping[str, str]
    components: tuple[str, ...]
    sizing: Sizing


def write_manifests(spec: DeploymentSpec, platform: Platform, folder: Path) -> Manifests:
    """Writes the overlay and its rendering, checked, into a new or an earlier written `folder`.

    Raises SpecError, UnsupportedError: no such deployment. MachineError: no kubectl. ManifestFault: our own checks
    refuse the result. InputError: the folder holds something else. On failure an earlier overlay stays as it was.
    """
    plan, folder = overlay_files(spec, platform), folder.resolve()
    _require_ours(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with atomic_directory(partial) as work:
            for name, text in plan.files.items():
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).write_text(text)
            for part in ("base", *(f"components/{name}" for name in plan.components)):
                shutil.copytree(K8S / part, work / "k8s" / part)
            rendered = render(work)
            findings = check_text(rendered, RENDERED)
            if findings:
                raise ManifestFault(findings)
            (work / RENDERED).write_text(_HEADER + rendered)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Manifests(
        directory=folder,
        namespace=namespace_of(spec),
        workload=f"{spec.name}-serving",
        objects=rendered.count("\nkind: "),
        gpus_per_pod=plan.sizing.gpus,
        nodes=plan.sizing.nodes,
    )


def _require_ours(folder: Path) -> None:
    kustomization = folder / "kustomization.yaml"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not kustomization.is_file() or not kustomization.read_text().startswith(_HEADER):
        raise InputError(
            str(folder),
            got="something else",
            expected="a new folder, or one that `trireme manifests` wrote",
            fix="choose another folder with -o",
        )


def overlay_files(spec: DeploymentSpec, platform: Platform) -> Overlay:
    """The whole overlay as text."""
    _require_reachable(spec)
    sizing = size(spec, platform)
    first = _components(spec, platform, sizing)
    local = {
        "replica": replica(spec, sizing),
        "store": store(spec),
        "scaling": scaler(spec, sizing),
        "access": access(spec),
        "surroundings": [*gateway(spec), *monitors(spec)],
    }
    if spec.kubernetes.build_in_cluster:
        local["build"] = jobs(spec, platform)
    local["group"] = group(spec, sizing)
    local = {name: patches for name, patches in local.items() if patches}
    own = list(local)
    if "group" in local:  # it takes the pod as the patches before leave it
        own.insert(-1, "k8s/components/multi-node")
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace_of(spec),
        "namePrefix": f"{spec.name}-",
        "labels": [_labels(spec, sizing)],
        "resources": ["k8s/base"],
        "components": [*(f"k8s/components/{name}" for name in first), *own, "k8s/components/images"],
        "images": images(spec, platform),
        "configMapGenerator": [_settings(spec, platform, sizing)],
    }
    files = {"kustomization.yaml": _yaml(kustomization)}
    for name, patches in local.items():
        files |= _component(name, patches, _generator(spec, name))
    if spec.kubernetes.build_in_cluster:
        files["build/spec.yaml"] = _yaml(spec.model_dump(mode="json", exclude={"kubernetes"}, exclude_defaults=True))
    if spec.kubernetes.monitoring:
        files[f"surroundings/{DASHBOARD}"] = dashboard(spec)
    late = ["multi-node"] if "group" in local else []
    return Overlay(files, (*first, *late, "images"), sizing)


def _components(spec: DeploymentSpec, platform: Platform, sizing: Sizing) -> list[str]:
    cluster = spec.kubernetes
    on_gpu, by_claim = platform == "gpu", cluster.gpus_by == "dra"
    chosen = {
        "namespace": creates_namespace(spec),
        "gpu": on_gpu and not by_claim,
        "dra": on_gpu and by_claim,
        "multi-gpu": sizing.gpus > 1 and not by_claim,
        "model-cache": cluster.model_store.cache_gib > 0,
        "full-pool": not cluster.surge,
        "engine-build": cluster.build_in_cluster,
        "networkpolicy": True,
        "disruption": True,
        "monitoring": cluster.monitoring,
        "autoscaling-hpa": cluster.scaling.by == "hpa",
        "autoscaling-keda": cluster.scaling.by == "keda",
        "gateway-api": cluster.gateway is not None,
    }
    return [name for name, wanted in chosen.items() if wanted]


def _labels(spec: DeploymentSpec, sizing: Sizing) -> dict[str, Any]:
    """This deployment's own label, in every selector too. kustomize knows where built-in kinds have theirs."""
    paths = {"spec/selector/matchLabels": "PodMonitor"}
    if sizing.nodes > 1:
        for role in ("leader", "worker"):
            paths[f"spec/leaderWorkerTemplate/{role}Template/metadata/labels"] = "LeaderWorkerSet"
    fields = [{"path": path, "kind": kind, "create": True} for path, kind in paths.items()]
    return {"includeSelectors": True, "pairs": {"app.kubernetes.io/instance": spec.name}, "fields": fields}


def _settings(spec: DeploymentSpec, platform: Platform, sizing: Sizing) -> dict[str, Any]:
    cluster = spec.kubernetes
    values = {
        "MODEL": spec.name,
        "PLATFORM": platform,
        "LOAD_S": cluster.load_s,
        "FETCH_S": cluster.fetch_s,
        "DRAIN_S": cluster.drain_s,
        "THREADS": sizing.threads,
        "GRAPH_DIGEST": cluster.graph_digest,
    }
    if sizing.nodes > 1:
        values["RANKS_EACH"] = sizing.ranks
    return {"name": "settings", "behavior": "merge", "literals": [f"{key}={value}" for key, value in values.items()]}


def _require_reachable(spec: DeploymentSpec) -> None:
    """What the engine-build Job reads must not lie on this machine."""
    if not spec.kubernetes.build_in_cluster:
        return
    local = {
        "model.source": Path(spec.model.source).is_dir(),
        "precision.calibration_texts": spec.precision.calibration_texts,
    }
    for key, found in local.items():
        if found:
            raise SpecError(
                key,
                got="a path of this machine",
                expected="a source that a pod in the cluster can read",
                fix="use a Hugging Face id, or set kubernetes.build_in_cluster: false and run `trireme publish` where "
                "the model store is mounted",
            )


def _generator(spec: DeploymentSpec, component: str) -> dict[str, Any] | None:
    """The ConfigMap that a component of the overlay fills."""
    if component == "build":
        return {"name": "spec", "behavior": "merge", "files": ["spec.yaml"]}
    if component == "surroundings" and spec.kubernetes.monitoring:
        # Grafana's sidecar keeps dashboards by file name.
        annotations = {"kustomize.toolkit.fluxcd.io/substitute": "disabled"}  # ${source} is Grafana's
        options = {
            "labels": {"grafana_dashboard": "1"},
            "annotations": annotations,
            "disableNameSuffixHash": True,
        }
        files = [f"{namespace_of(spec)}-{spec.name}.json={DASHBOARD}"]
        return {"name": "dashboard", "behavior": "replace", "files": files, "options": options}
    return None


def _component(name: str, patches: list[Patch], generator: dict[str, Any] | None) -> dict[str, str]:
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "resources": [patch.file for patch in patches if patch.target is None],
        "patches": [{"target": patch.target, "path": patch.file} for patch in patches if patch.target is not None],
    }
    if generator is not None:
        kustomization["configMapGenerator"] = [generator]
    files = {f"{name}/kustomization.yaml": _yaml(kustomization)}
    return files | {f"{name}/{patch.file}": _yaml(patch.content) for patch in patches}


def _yaml(content: object) -> str:
    return _HEADER + written(content)
