"""What an update is made by, and judged by: a seam for tests, in which both are arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from builders.training.recipe import TrainingProgress
from online.gate.forgetting import halves
from online.gate.verdict import GateBudget, GateVerdict, judge_candidate
from online.learner.memory import load_memory
from online.learner.update import REPORT, UpdateReport, update_version
from online.loop.records import UpdateRecord
from online.tasks.task import LearningTask, Rows


class Learning(Protocol):
    """`rows`: to learn from, and held out. Both may be called again for the same update, and then give the same."""

    def train(
        self, task: LearningTask, champion: Path, update: UpdateRecord, rows: tuple[Rows, Rows], out: Path
    ) -> UpdateReport:
        """The candidate's folder `out` is there when it returns. Raises CheckError for a training that came to nothing;
        `out` is then not there."""

    def judge(
        self, task: LearningTask, champion: Path, update: UpdateRecord, held_out: Rows, candidate: Path
    ) -> GateVerdict: ...


class JudgedAtTheGate:
    """However it was trained."""

    def judge(
        self, task: LearningTask, champion: Path, update: UpdateRecord, held_out: Rows, candidate: Path
    ) -> GateVerdict:
        return judge_update(task, champion, update.domain, held_out, candidate, update.budget)


@dataclass(frozen=True)
class TaskLearning(JudgedAtTheGate):
    report: Callable[[TrainingProgress], None] = lambda progress: None

    def train(
        self, task: LearningTask, champion: Path, update: UpdateRecord, rows: tuple[Rows, Rows], out: Path
    ) -> UpdateReport:
        if out.is_dir():
            return UpdateReport.model_validate_json((out / REPORT).read_bytes())
        return update_version(
            task, champion, update.domain, *rows, out, update.recipe, budget=update.budget, report=self.report
        )


def judge_update(
    task: LearningTask, champion: Path, domain: str, held_out: Rows, candidate: Path, budget: GateBudget
) -> GateVerdict:
    """By halves of the old hold-outs that the training did not choose by, and all of the new one."""
    old = {name: halves(rows)[1] for name, rows in load_memory(champion).held_out.items()}
    return judge_candidate(task, champion, candidate, (domain, held_out), old, budget)
