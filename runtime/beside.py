"""A version beside the one that serves, in one Triton: under names of its own.

Two versions under one name would not stand beside each other. A request without a version goes to the newest, be it
proven or not; the steps of an ensemble are in one configuration for all of its versions, so that the old ensemble would
use the new parts; and a reload with another version policy starts the old version anew. Under names of its own the new
version touches nothing of the old one, and gets the requests that are sent to it, and no others.

    <repository>/beside/<model>.v<n>/config.pbtxt   names each other by these names
                                    /<n>            a link to <repository>/<model>/<n>
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from runtime.errors import BadEnvironment
from runtime.model_config import CONFIG, parse_pbtxt, replace_config, to_pbtxt
from runtime.settings import ServerSettings

FOLDER = "beside"


def name_beside(model: str, version: int) -> str:
    return f"{model}.v{version}"


def names_beside(settings: ServerSettings) -> tuple[str, ...]:
    """In the order to load them."""
    return tuple(name_beside(model, settings.version) for model in settings.load_order)


def lay_out_beside(repository: Path, settings: ServerSettings) -> None:
    """Again where it is there already. Raises BadEnvironment when files of the version are missing."""
    for model in settings.models:
        version = repository / model / str(settings.version)
        if not version.is_dir():
            raise BadEnvironment(f"{version} is not there; publish version {settings.version} again")
        folder = repository / FOLDER / name_beside(model, settings.version)
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / str(settings.version)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(version.resolve(), folder.resolve()))
        replace_config(folder / CONFIG, _renamed(repository / model / CONFIG, settings))


def laid_out_beside(repository: Path, version: int) -> list[str]:
    """Names of what is there, in the order to unload it: what consists of others before these."""
    names = (path.name for path in (repository / FOLDER).glob(f"*.v{version}"))
    return sorted(names, key=lambda name: (len(name), name))


def take_away_beside(repository: Path, version: int) -> None:
    """The version's own files stay: what goes are links to them."""
    for name in laid_out_beside(repository, version):
        shutil.rmtree(repository / FOLDER / name, ignore_errors=True)


def _renamed(path: Path, settings: ServerSettings) -> str:
    config = parse_pbtxt(path.read_text("utf-8"))
    config.name = name_beside(config.name, settings.version)
    for step in config.ensemble_scheduling.step if config.HasField("ensemble_scheduling") else ():
        step.model_name = name_beside(step.model_name, settings.version)
    config.version_policy.specific.versions[:] = [settings.version]
    return to_pbtxt(config)
