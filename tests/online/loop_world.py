"""Everything that a loop stands on, with nothing real but its files: it may die at any call, and the world goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from builders.errors import QualityError
from builders.spec import DeploymentSpec
from builders.store.atomic import atomic_directory
from builders.training import language
from online.feedback.errors import FeedbackUnavailable
from online.gate.forgetting import Change
from online.gate.verdict import GateRefusal, GateVerdict, Objection
from online.learner.blend import PartialStep
from online.learner.memory import Memory, Reservoir, load_memory, save_memory
from online.learner.update import UpdateReport
from online.loop.building import BuiltVersion, Champion, Serving
from online.loop.due import Clock
from online.loop.journal import LoopJournal
from online.loop.learning import Learning
from online.loop.records import LoopState, UpdateRecord
from online.loop.steps import Loop
from online.tasks.task import LearningTask, Rows
from tests.online.small import RECIPE, WINDOW, speech
from tests.online.test_rollout import OLD, Crash, World

WORDS = 24  # of a sample
CANARY = {"margin_errors": 0.2, "margin_slow": None, "mirrored_requests": 40, "step_requests": 10,
          "soak_requests": 100, "most_requests": 20_000}  # fmt: skip


def save_first(folder: Path) -> Path:
    """A model of random weights that knows 40 words, with a memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    language.new_model(RECIPE).save_pretrained(folder)
    vocabulary = {"<end>": 0, **{f"w{number}": number for number in range(1, 257)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    kept = Reservoir.empty(WINDOW + 1).offered(speech(1, 64, 2), np.random.default_rng(0))
    save_memory(Memory(kept).with_domain("one", speech(1, 60, 3)), folder)
    return folder


def spoken(language_seed: int, count: int, first: int = 1) -> list[tuple[int, dict[str, Any]]]:
    """Numbered corrections in one of the made-up languages."""
    rows = speech(language_seed, 2 * count, first)[:, :WORDS]
    texts = [" ".join(f"w{word}" for word in (*one, *other)) for one, other in zip(rows[::2], rows[1::2], strict=True)]
    return [
        (number, {"request_id": f"r{number}", "kind": "correction", "prompt": None, "answer": None, "text": text})
        for number, text in enumerate(texts, first)
    ]


def loop_spec(folder: Path, task: str = "generation", **online: Any) -> DeploymentSpec:
    learner = {"window": WINDOW, "rows": 8, "steps": 4, "held_out_share": 0.4, **online.pop("learner", {})}
    when = {"samples": 100, **online.pop("when", {})}
    model: dict[str, Any] = {"source": str(folder), "task": task, "max_length": WINDOW}
    encoder: dict[str, Any] = {} if task == "generation" else {"serving": {"length_buckets": [WINDOW]}}
    if task == "embedding":
        model |= {"pooling": "mean", "normalize": True}
    return DeploymentSpec.model_validate(
        {
            "name": "tiny",
            "model": model,
            "precision": {"cpu": "fp32", "calibration_samples": 32},
            **encoder,
            "online": {"learner": learner, "when": when, "canary": CANARY, **online},
        }
    )


@dataclass
class Samples:
    rows: list[tuple[int, dict[str, Any]]]
    away: bool = False

    def read(self, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.away:
            raise FeedbackUnavailable("the feedback database cannot be used now: it is away")
        return iter([row for row in self.rows if row[0] > after])

    def close(self) -> None:
        pass


@dataclass
class Everything:
    """Calls are counted by `world`, which lets the process die before or after the effect of those in its `crashes`."""

    folder: Path  # of the build
    first: Path
    samples: Samples
    world: World = field(default_factory=World)
    refuses: str = ""  # "gate", "pipeline"
    online: dict[str, Any] = field(default_factory=dict)
    task: str = "generation"
    learning: Learning | None = None  # a real one
    without_canary: bool = False
    serves: bool = True
    published: dict[int, str] = field(default_factory=dict)
    current: int = 0
    to_beat: list[Champion | None] = field(default_factory=list)
    learnt: list[tuple[int, int]] = field(default_factory=list)  # update, first token of its first row
    wall: float = 1e9
    mono: float = 0.0

    # VersionBuilds
    def make_first(self) -> BuiltVersion:
        self.published[OLD], self.current = str(OLD), OLD
        return BuiltVersion(OLD, str(OLD))

    def build(self, checkpoint: Path, keep: Collection[int], least: int) -> BuiltVersion:
        assert (checkpoint / "model.safetensors").is_file()
        self.world._at()
        if self.refuses == "pipeline":
            raise QualityError("w8: perplexity 1.4 of fp32; 1.05 is allowed")
        version = self.current
        if self.published[self.current] != str(checkpoint):
            version = max([*self.published, least - 1]) + 1
            kept = {number for number in self.published if number in (*keep, self.current)}
            self.published = {number: self.published[number] for number in sorted(kept)} | {version: str(checkpoint)}
            self.current = version
        self.world._at()
        return BuiltVersion(version, f"{version}")

    def hold_back(self, champion: str) -> None:
        assert int(champion) in self.published
        self.world._at()
        self.current = int(champion)
        self.world._at()

    def make_current(self, settings: str) -> None:
        assert int(settings) in self.published, f"version {settings} is gone"
        self.world._at()
        self.current = int(settings)
        self.published = {number: of for number, of in self.published.items() if number <= self.current}
        self.world._at()

    # Learning
    def train(
        self, task: LearningTask, champion: Path, update: UpdateRecord, rows: tuple[Rows, Rows], out: Path
    ) -> UpdateReport:
        self.world._at()
        if not out.is_dir():
            memory = load_memory(champion).with_domain(update.domain, rows[1])
            with atomic_directory(out) as work:
                for file in champion.iterdir():
                    if file.is_file():
                        shutil.copy2(file, work / file.name)
                save_memory(memory, work)
        self.world._at()
        return UpdateReport(
            recipe=update.recipe, max_forgetting=0.03, domain=update.domain, new_rows=len(rows[0]), replayed_rows=4,
            previous_sha256="", curve=(), step=PartialStep(share=0.5, monotone=True, tried=()), cpu_s=0.0,
        )  # fmt: skip

    def judge(
        self, task: LearningTask, champion: Path, update: UpdateRecord, held_out: Rows, candidate: Path
    ) -> GateVerdict:
        self.world._at()
        assert len(held_out) == update.held_out_rows
        why = (Objection(name=GateRefusal.FORGETTING, why="one: perplexity +9 %"),) * (self.refuses == "gate")
        change = Change(domain=update.domain, rows=60, before=40, after=10, change=-0.75, low=-0.8, high=-0.7)
        old = change.model_copy(update={"domain": "one", "before": 20, "after": 20.2, "change": 0.01, "high": 0.02})
        return GateVerdict(budget=update.budget, new=change, old=(old,), objections=why)

    def process(self) -> _Process:
        """A new one; the last has died or ended."""
        return _Process(self)


class _Process:
    def __init__(self, all_of_it: Everything) -> None:
        self._all = all_of_it

    def __enter__(self) -> Loop:
        found = self._all
        self.journal = _CrashingJournal(found.folder, "tiny", found.world)
        serving = Serving(found.world, found.world) if found.serves else None
        self.loop = Loop(
            loop_spec(found.first, found.task, **found.online), self.journal, _Builds(found), lambda: found.samples,
            serving, found.without_canary, clock=Clock(lambda: found.wall, lambda: found.mono),
            learning=found.learning or found,
        )  # fmt: skip
        return self.loop

    def __exit__(self, *error: object) -> None:
        self.loop.close()
        self.journal.__exit__()


@dataclass(frozen=True)
class _Builds:
    found: Everything

    def first(self) -> BuiltVersion:
        return self.found.make_first()

    def build(
        self, checkpoint: Path, keep: Collection[int], least: int, champion: Champion | None = None
    ) -> BuiltVersion:
        self.found.to_beat.append(champion)
        return self.found.build(checkpoint, keep, least)

    def hold_back(self, champion: str) -> None:
        self.found.hold_back(champion)

    def has(self, settings: str) -> bool:
        return int(settings) in self.found.published

    def make_current(self, settings: str) -> None:
        self.found.make_current(settings)


class _CrashingJournal(LoopJournal):
    def __init__(self, build_dir: Path, name: str, world: World) -> None:
        super().__init__(build_dir, name)
        self._world = world

    def save(self, state: LoopState) -> None:
        self._around(lambda: super(_CrashingJournal, self).save(state))

    def set_aside(self, number: int, learnt: Rows, held_out: Rows) -> None:
        self._around(lambda: super(_CrashingJournal, self).set_aside(number, learnt, held_out))

    def put_down(self, record: UpdateRecord) -> None:
        self._around(lambda: super(_CrashingJournal, self).put_down(record))

    def tidy(self, keep: set[int]) -> None:
        self._around(lambda: super(_CrashingJournal, self).tidy(keep))

    def _around(self, effect: Callable[[], None]) -> None:
        self._world._at()
        effect()
        self._world._at()


def ran(all_of_it: Everything, updates: int = 1, most: int = 400) -> LoopState:
    """New processes, each until it dies, until so many updates have ended."""
    for _ in range(len(all_of_it.world.crashes) + 1):
        try:
            with all_of_it.process() as loop:
                for _ in range(most):
                    loop.step()
                    if len(loop.journal.ended()) >= updates and (found := loop.journal.load()) and not found.update:
                        return found
                raise AssertionError(f"it does not end: {loop.journal.load()}")
        except Crash:
            continue
    raise AssertionError("more crashes than were planned")
