"""Which engines the ranks of a generator run, and what passes between its stages: `engines.json` beside the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from runtime.errors import BadEnvironment
from runtime.ranks.program import RankGrid

MANIFEST = "engines.json"


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Passed(_Stored):
    """A value from or to the rank of the same number in another stage. A string among `dims` is batch or length."""

    name: str
    stage: int
    dims: tuple[int | str, ...]
    itemsize: int


class RankEngines(_Stored):
    """`files` by target and capacity ("sm90.512")."""

    received: tuple[Passed, ...]
    sent: tuple[Passed, ...]
    files: dict[str, str]


class EngineManifest(_Stored):
    """`ranks` by process number: rank r of stage s is s * tensor + r."""

    flavour: Literal["tensorrt", "tensorrt-rtx"]
    tensor: int
    pipeline: int
    vocabulary: int
    ranks: tuple[RankEngines, ...]

    @property
    def layout(self) -> RankGrid:
        return RankGrid(self.tensor, self.pipeline)

    def save(self, folder: Path) -> Path:
        file = folder / MANIFEST
        file.write_text(self.model_dump_json(indent=1) + "\n")
        return file


def load_manifest(file: Path) -> EngineManifest:
    """Raises BadEnvironment for a manifest that is missing, damaged or of another release."""
    try:
        manifest = EngineManifest.model_validate_json(file.read_text())
    except (OSError, ValueError) as error:
        raise BadEnvironment(f"{file}: missing, or not of this release; run `trireme build` again ({error})") from error
    if len(manifest.ranks) != manifest.layout.ranks:
        raise BadEnvironment(
            f"{file}: engines of {len(manifest.ranks)} ranks for {manifest.layout.ranks}; run `trireme build` again"
        )
    return manifest
