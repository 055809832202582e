"""The version that commands build and serve, once online learning has promoted one."""

from __future__ import annotations

from pathlib import Path

from builders import pipeline
from builders.repository.publish import take_back
from builders.spec import DeploymentSpec
from online.loop.building import with_checkpoint
from online.loop.journal import LoopFiles
from runtime.settings import ServerSettings


def champion_spec(spec: DeploymentSpec, build_dir: Path) -> tuple[DeploymentSpec, int | None]:
    """The spec with the champion's checkpoint in place of its model, and the champion's version; or the spec as it is,
    and None, where online learning was not asked for or has promoted nothing."""
    if spec.online is None:
        return spec, None
    files = LoopFiles(build_dir, spec.name)
    state = files.load()
    if state is None:
        return spec, None
    champion = state.champion
    found = spec if champion.update == 0 else with_checkpoint(spec, files.checkpoint(champion.update))
    return found, champion.version


def put_champion_first(spec: DeploymentSpec, build_dir: Path) -> None:
    """For a server that takes no versions beside its own: what a rollout left in the repository is no version to start
    with, and goes. The loop builds it again when it goes on."""
    files = LoopFiles(build_dir, spec.name)
    state = files.load() if spec.online is not None else None
    repository = pipeline.repository_path(build_dir, spec, "cpu")
    if state is None or state.update is None:
        return
    take_back(repository, ServerSettings.model_validate_json(state.champion.settings))
