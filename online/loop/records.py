"""What the loop writes down: updates with their figures and decisions, and the versions that were promoted."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from online.federated.plan import FederatedPlan
from online.gate.verdict import GateBudget, GateVerdict
from online.learner.recipe import UpdateRecipe
from online.learner.update import UpdateReport
from online.rollout.policy import RolloutPolicy
from online.rollout.state import Decision
from online.tasks.reading import LearntTask
from runtime.record import Record


class UpdateStage(StrEnum):
    """What is done of an update. The last three end it."""

    GATHERED = "gathered"  # its rows are set aside
    TRAINED = "trained"  # there is a candidate
    PASSED = "passed"  # the gate
    BUILT = "built"  # by the pipeline, with its proof
    ROLLING = "rolling"  # its rollout has begun
    PROMOTED = "promoted"
    REFUSED = "refused"  # before it was given a request
    ROLLED_BACK = "rolled_back"


class SpeedFound(Record):
    """Of a candidate, over the champion's: the median of rounds by turns, by CPU time, and the interval around it."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} of the champion's speed ({self.low:.2f} to {self.high:.2f})"


class UpdateRecord(Record):
    """One update. It keeps the settings that it began with, whatever becomes of the spec meanwhile.

    `champion`: the version that it starts from. `fed_to`: the number of the last sample that it has read. `version`: of
    what was built of it. `reason`: why it ended.
    """

    number: int = Field(ge=1)
    stage: UpdateStage = UpdateStage.GATHERED
    champion: int
    began: str
    trigger: str
    task: LearntTask = "generation"
    samples: int
    unread: int = 0  # samples that say nothing to the model
    unread_why: dict[str, int] = Field(default_factory=dict)
    rows: int
    held_out_rows: int
    fed_to: int
    recipe: UpdateRecipe
    budget: GateBudget
    federated: FederatedPlan | None = None  # clients train it, in rounds
    policy: RolloutPolicy
    report: UpdateReport | None = None
    verdict: GateVerdict | None = None
    min_speed: float = 0.0  # that a built candidate must have, of the champion's; 0: not measured
    speed: SpeedFound | None = None
    version: int | None = None
    settings: str = ""  # of the server, as the publication of this version wrote them
    decisions: tuple[Decision, ...] = ()
    reason: str = ""
    ended: str | None = None

    @property
    def domain(self) -> str:
        return f"update-{self.number}"


class PromotedVersion(Record):
    """`update`: the one that made it, 0 for the first; its folder holds the checkpoint."""

    version: int = Field(ge=1)
    update: int = Field(ge=0)
    since: str
    settings: str  # of the server, as the publication of this version wrote them


class DriftState(Record):
    """Of a Page-Hinkley test on losses in units of their spread; `scored_to`: number of the last sample in it."""

    count: int = 0
    mean: float = 0.0
    sum: float = 0.0
    lowest: float = 0.0
    scored_to: int = 0


class LoopState(Record):
    """`promoted`: oldest first; the last is the champion. `origin`: digest of the checkpoint that it began with."""

    origin: str
    promoted: tuple[PromotedVersion, ...] = Field(min_length=1)
    update: UpdateRecord | None = None
    updates: int = 0  # that were begun
    highest: int  # version that was ever built
    fed_to: int = 0
    learnt_at: float  # seconds since 1970: when the last update ended, or the loop began
    drift: DriftState = DriftState()

    @property
    def champion(self) -> PromotedVersion:
        return self.promoted[-1]

    @property
    def challenger(self) -> int | None:
        """The version whose rollout is under way."""
        rolling = self.update is not None and self.update.stage is UpdateStage.ROLLING
        return self.update.version if rolling and self.update is not None else None
