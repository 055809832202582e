"""The version that commands build and serve, once online learning has promoted one."""

from __future__ import annotations

from pathlib import Path

from builders import pipeline
from builders.repository.publish import take_back
from builders.spec import DeploymentSpec
from online.loop.building import with_checkpoint
from online.loop.journal import LoopFiles
from runtime.settings import ServerSettings


def champion_spec(spec: DeploymentSpec, build_dir: Path, alone: bool) -> tuple[DeploymentSpec, int | None]:
    """The spec with the champion's checkpoint in place of its model, and the champion's version; or the spec as it is,
    and None, where nothing was begun. `alone`: for a server that takes no versions beside its own, what a rollout left
    in the repository is no version to start with, and goes; the loop builds it again when it goes on."""
    files = LoopFiles(build_dir, spec.name)
    state = files.load()
    if state is None:
        return spec, None
    champion = state.champion
    if alone and state.update is not None:
        settings = ServerSettings.model_validate_json(champion.settings)
        take_back(pipeline.repository_path(build_dir, spec, "cpu"), settings)
    found = spec if champion.update == 0 else with_checkpoint(spec, files.checkpoint(champion.update))
    return found, champion.version
