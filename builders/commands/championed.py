"""A spec as it stands today: with the model that online learning promoted last."""

from __future__ import annotations

import sys
from pathlib import Path

from builders.spec import DeploymentSpec, load_spec


def load_championed(argument: str, build_dir: Path, *, alone: bool = False) -> DeploymentSpec:
    """Says so on standard error where the model is not the spec's own. `alone`: for a server that takes no versions
    beside its own."""
    spec = load_spec(argument)
    if spec.online is None:
        return spec
    from online.loop.served import champion_spec

    found, version = champion_spec(spec, build_dir, alone)
    if found is not spec:
        said = f"trireme: version {version}, which online learning promoted, stands for {spec.model.source}"
        print(said, file=sys.stderr)
    return found
