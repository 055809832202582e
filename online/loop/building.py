"""A candidate through the same pipeline as every build, into the same repository; and the way back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Protocol

from builders import pipeline
from builders.errors import QualityError
from builders.judging import intervals
from builders.pipeline import Build, Report, choice
from builders.repository.publish import hold_back, missing_models, take_back
from builders.spec import DeploymentSpec
from online.loop.records import SpeedFound
from online.rollout.drive import CanaryDoor, LoadedVersions
from runtime.settings import FILE_NAME, ServerSettings


@dataclass(frozen=True)
class BuiltVersion:
    """`settings`: of the server, as they were published; with them the version can be made current again. `speed`:
    where a champion was named."""

    version: int
    settings: str
    speed: SpeedFound | None = None


@dataclass(frozen=True)
class Champion:
    """What a candidate's speed is held against. `checkpoint` is None for the spec's own model."""

    checkpoint: Path | None
    min_speed: float


class VersionBuilds(Protocol):
    """A seam for tests: what is real takes minutes."""

    def first(self) -> BuiltVersion:
        """Of the spec's own model."""

    def build(
        self, checkpoint: Path, keep: Collection[int], least: int, champion: Champion | None = None
    ) -> BuiltVersion:
        """Beside those of `keep`; a server starts with it until `hold_back`, and until then the same again gives the
        same version. Raises CheckError for a candidate that a stage refuses, by its figures, or that is slower than
        `champion` allows; nothing is published then."""

    def hold_back(self, champion: str) -> None:
        """A server starts with the champion, whatever lies beside it."""

    def has(self, settings: str) -> bool:
        """Whether all of this version is there."""

    def make_current(self, settings: str) -> None:
        """A server starts with this version, and later ones are gone."""


@dataclass(frozen=True)
class PipelineBuilds:
    """For a CPU: where it runs is where it is proven."""

    spec: DeploymentSpec
    build_dir: Path
    report: Report

    def first(self) -> BuiltVersion:
        return self._built(self.spec, (), 1)

    def build(
        self, checkpoint: Path, keep: Collection[int], least: int, champion: Champion | None = None
    ) -> BuiltVersion:
        spec = with_checkpoint(self.spec, checkpoint)
        speed = None if champion is None else self._fast_enough(spec, champion)
        return replace(self._built(spec, keep, least), speed=speed)

    def hold_back(self, champion: str) -> None:
        hold_back(self.repository, ServerSettings.model_validate_json(champion))

    def has(self, settings: str) -> bool:
        return not missing_models(self.repository, ServerSettings.model_validate_json(settings))

    def make_current(self, settings: str) -> None:
        take_back(self.repository, ServerSettings.model_validate_json(settings))

    def _built(self, spec: DeploymentSpec, keep: Collection[int], least: int) -> BuiltVersion:
        built = pipeline.build(spec, "cpu", self.build_dir, "repository", self.report, keep=keep, least=least)
        assert built.entry is not None
        return BuiltVersion(built.entry.version, (self.repository / FILE_NAME).read_text())

    def _fast_enough(self, spec: DeploymentSpec, champion: Champion) -> SpeedFound:
        """As both are served here. Raises QualityError only where no round had a candidate fast enough: one slow round
        is the machine's."""
        before = self.spec if champion.checkpoint is None else with_checkpoint(self.spec, champion.checkpoint)
        reference, candidate = (self._qualified(each) for each in (before, spec))
        rounds = choice.speeds(reference, candidate, intervals.MEDIAN_ROUNDS)
        found = intervals.of_median(rounds)
        speed = SpeedFound(ratio=median(rounds), low=found.low, high=found.high)
        if speed.high < champion.min_speed:
            taken = " and ".join(str(each.spec.precision.cpu) for each in (reference, candidate))
            raise QualityError(
                f"the candidate has {speed}; online.gate.min_speed={champion.min_speed:g} is asked for ({taken}, "
                f"{self.spec.cpu_executor})"
            )
        return speed

    def _qualified(self, spec: DeploymentSpec) -> Build:
        return pipeline.build(spec, "cpu", self.build_dir, "qualify", self.report)

    @property
    def repository(self) -> Path:
        return pipeline.repository_path(self.build_dir, self.spec, "cpu")


def with_checkpoint(spec: DeploymentSpec, checkpoint: Path) -> DeploymentSpec:
    model = spec.model.model_copy(update={"source": str(checkpoint), "revision": None})
    return spec.model_copy(update={"model": model})


@dataclass(frozen=True)
class Serving:
    """What serves now, and takes a new version beside the old one."""

    door: CanaryDoor
    versions: LoadedVersions
