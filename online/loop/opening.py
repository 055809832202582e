"""What a loop works on, opened as the spec says: the store of feedback, and what serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from builders import pipeline
from builders.spec import DeploymentSpec
from online.loop.building import Serving
from online.loop.journal import LoopFiles
from online.loop.settings import online_of
from online.serving import GatewayDoor, TritonVersions
from runtime.settings import ServerSettings

if TYPE_CHECKING:
    from online.feedback.store import FeedbackStore, KeptTraffic


def feedback_store(spec: DeploymentSpec, build_dir: Path, traffic: KeptTraffic | None = None) -> FeedbackStore:
    """The spec's, or the loop's own beside its files. Raises ImportError where the extra `online` is not installed."""
    from online.feedback.store import FeedbackStore

    return FeedbackStore(online_of(spec).feedback or LoopFiles(build_dir, spec.name).feedback_url, traffic=traffic)


def serving(
    spec: DeploymentSpec, build_dir: Path, gateway: str, triton: str, secret: str,
    settings_of: Callable[[int], ServerSettings | None],
) -> Serving:  # fmt: skip
    """`gateway`: its URL; `triton`: host:port of its Triton over gRPC; `secret`: of both; `settings_of`: what a version
    was published with."""
    repository = pipeline.repository_path(build_dir, spec, "cpu")
    door = GatewayDoor(gateway, secret, repository, slo_s=online_of(spec).canary.slow_ms / 1e3)
    return Serving(door, TritonVersions(triton, secret, repository, door, settings_of=settings_of))
