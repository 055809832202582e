"""`kubectl kustomize`: offline, and the same renderer that `kubectl apply -k` uses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from builders.errors import CheckError, MachineError

K8S = Path(__file__).parents[2] / "k8s"  # base and components
KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")  # one of them makes a folder kustomize's
_LIMIT_S = 60


def render(folder: Path) -> str:
    """The YAML of an overlay.

    Raises MachineError without kubectl; CheckError when kustomize refuses the folder, with its words.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise MachineError(
            "kubectl",
            got="not on PATH",
            expected="kubectl 1.27 or newer: it renders kustomize overlays, and needs no cluster for it",
            fix="install kubectl (https://kubernetes.io/docs/tasks/tools)",
        )
    try:
        done = subprocess.run(
            [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CheckError(f"kubectl kustomize {folder}: no answer within {_LIMIT_S} s") from error
    if done.returncode:
        raise CheckError(f"kubectl kustomize {folder}: {' '.join(done.stderr.split())[:800]}")
    return done.stdout
