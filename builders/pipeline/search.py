"""`trireme search`: recipes of compression tried one after another, each timed by the executor that serves.

Optuna proposes (Bergstra et al. 2011, tree-structured Parzen estimators, two objectives); SQLite keeps what was found,
so a search that was killed goes on. A trial is judged on texts that neither calibrate nor judge a build, untrained; the
best few are then trained for a short while and judged as `trireme compress` does, and the fastest within the budget is
taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.artifacts import Quality
from builders.checkpoint import load_checkpoint
from builders.compress import plan
from builders.compress.judged import by_text, outputs
from builders.compress.step import carry_out
from builders.compress.texts import Batch, CalibrationText
from builders.errors import DivergedError, InputError, MachineError, QualityError, SpecError
from builders.export.encoder import graph_module, write_graph
from builders.export.sentence import head_modules
from builders.export.weights import load_encoder
from builders.graph import GRAPH_FILE, count_weights, record_graph
from builders.judging import corpus
from builders.pipeline import choice, compress
from builders.pipeline.judged import StepFigures, by_executor, judge, missed, missed_of, plain
from builders.pipeline.opened import opened
from builders.pipeline.result import Build, Report
from builders.pipeline.space import LEFT_TO_TRAINING, Choices, Tried, finalists, front
from builders.spec import DeploymentSpec, DistilSlice, StepSlice
from builders.store.closure import code_key
from builders.store.processor import this_processor
from builders.store.store import Store, key_of

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

FINALISTS = 5


@dataclass(frozen=True)
class Finalist:
    """`trial`: what was tried, with the step behind it that trained it; `judged` on held-out texts; `missed`: keys of
    the budget, with figures."""

    trial: Tried
    judged: StepFigures
    missed: dict[str, float]


@dataclass(frozen=True)
class Found:
    """`own`: the spec's own steps, measured like a trial. `trained`: the finalists were. `chosen` is one of them, or
    None."""

    trials: tuple[Tried, ...]
    own: Tried | None
    finalists: tuple[Finalist, ...]
    chosen: Finalist | None
    resumed: int
    trained: bool = False

    @property
    def front(self) -> list[Tried]:
        return front(self.trials, self.trained)


def searched(
    spec: DeploymentSpec, root: Path, trials: int, minutes: float, seed: int,
    report: Report = lambda stage, message: None, distil_minutes: float = 0.0,
) -> Found:  # fmt: skip
    """Until there are `trials` trials in all, those of earlier runs among them, or `minutes` are over. Each finalist is
    then trained towards the original for `distil_minutes`, as `distil` of a spec has them.

    Raises SpecError for a model that compress is not built for, MachineError where the same search runs already.
    """
    if spec.generates:
        raise SpecError(
            "search: model.task", got=spec.model.task, expected="embedding, classification or reranking",
            fix="search is built for encoders",
        )  # fmt: skip
    store, folder = Store(root / "store"), root / spec.name / "search"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / "lock"):
        training = _training(spec, distil_minutes)
        bench = _Bench.of(spec, store, report, trained=training is not None)
        study = _study(folder / "study.db", bench, seed)
        resumed = len(_complete(study))
        _run(study, bench, trials, minutes, report)
        done = [_measured(trial, bench.choices) for trial in _complete(study)]
        own = None if not spec.compress else bench.own(store, report)
        best = finalists(done, FINALISTS, training)
        judged = tuple(_judged(bench, trial, store, report) for trial in best)
    within = [each for each in judged if not each.missed]
    chosen = max(within, key=lambda each: each.judged.speeds[spec.cpu_executor], default=None)
    return Found(tuple(done), own, judged, chosen, resumed, training is not None)


def _training(spec: DeploymentSpec, minutes: float) -> DistilSlice | None:
    """As the spec's own steps train, where they do."""
    if not minutes:
        return None
    own = next((step.distil for step in reversed(spec.compress) if step.distil is not None), DistilSlice(minutes=1))
    shape = ("student_layers", "student_width", "match_layers", "sparsity", "exits", "exit")
    return own.model_copy(update={"minutes": minutes, "tokens": None, **dict.fromkeys(shape)})


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MachineError(
                f"search in {file.parent}", got="another search that is running", expected="one at a time",
                fix="wait for it, or give another --build-dir",
            ) from error  # fmt: skip
        yield


@dataclass(frozen=True)
class _Bench:
    """What every trial is measured with; the original's graph, and its vectors of the texts that are watched.
    `trained`: the best are trained, so that what a trial's vectors miss of the budget does not count against it."""

    built: Build
    plain: Build
    choices: Choices
    texts: CalibrationText
    watched: list[Batch]
    wanted: Any
    trained: bool

    @staticmethod
    def of(spec: DeploymentSpec, store: Store, report: Report, trained: bool = False) -> _Bench:
        checkpoint = load_checkpoint(spec.model)
        built = Build(spec, "cpu", checkpoint, original=checkpoint)
        texts = CalibrationText(checkpoint, spec.precision)
        watched = texts.watched()
        model, as_forward = opened(checkpoint)
        wanted = outputs(as_forward(model), watched)
        reference = by_executor(plain(built, checkpoint, store, report), spec.cpu_executor)
        choices = Choices.of(compress.widths_of(checkpoint), spec.parallel.tensor)
        return _Bench(built, reference, choices, texts, watched, wanted, trained)

    @property
    def key(self) -> str:
        """Of everything that a trial's figures depend on, and of the budget that says which are within it."""
        spec = self.built.spec
        content = {
            "checkpoint": self.built.checkpoint.model_dump(mode="json", exclude={"source"}),
            "graph": self.plain.served_graph.digest,
            "texts": corpus.corpus_key(spec.precision.calibration_texts),
            "left out": spec.precision.calibration_samples,
            "serving": self.plain.spec.serving.model_dump(mode="json", include={"threads", "tokens_per_batch"}),
            "executor": spec.cpu_executor,
            "tensor": spec.parallel.tensor,
            "trained": self.trained,
            "budget": spec.compress_budget.model_dump(mode="json"),
            "processor": this_processor().model_dump(mode="json"),
            "code": code_key(searched),
        }
        return key_of(content)

    def measure(self, number: int, steps: tuple[StepSlice, ...]) -> Tried:
        """The steps carried out in memory. Raises SpecError for steps that the model cannot take."""
        spec, checkpoint = self.built.spec, self.built.checkpoint
        plan.check(steps, compress.widths_of(checkpoint), spec.parallel.tensor)
        model, as_forward = opened(checkpoint)
        for step in steps:
            carry_out(step, model, as_forward, checkpoint, self.texts, spec.parallel.tensor)
        return self._figures(number, steps, model)

    def own(self, store: Store, report: Report) -> Tried:
        """The spec's own steps, which may train: of the checkpoint that a build makes by them."""
        made = compress.carried_out(self.built, store, report).checkpoint
        return self._figures(-1, self.built.spec.compress, load_encoder(made))

    def _figures(self, number: int, steps: tuple[StepSlice, ...], model: Any) -> Tried:
        """The graph exported and timed."""
        checkpoint = self.built.checkpoint
        head = head_modules(checkpoint)
        near = by_text(self.wanted, outputs(graph_module(model, head, checkpoint), self.watched))
        with tempfile.TemporaryDirectory(prefix="trireme-search-") as folder:
            file = Path(folder) / GRAPH_FILE
            write_graph(model, head, checkpoint, "fp32", file)
            quality = Quality(
                mean_cosine=float(near.mean()), worst_cosine=float(near.min()), max_abs_difference=0.0,
                texts=len(near), executor="torch",
            )  # fmt: skip
            graph = record_graph(Path(folder), "fp32", quality, checkpoint.digest)
            speed = choice.encoder_speed(self.plain, replace(self.plain, graphs=(graph,)))
            found = Tried(number, steps, float(near.mean()), float(near.min()), speed, count_weights(file))
        return replace(found, missed=tuple(missed_of(_bounded(found), self.built.spec.compress_budget)))


def _bounded(found: Tried) -> dict[str, float]:
    """What a trial measures, by the key of the budget that bounds it from below."""
    return {"min_mean_cosine": found.cosine, "min_worst_cosine": found.worst, "min_speedup": found.speed}


def _study(file: Path, bench: _Bench, seed: int) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{file.resolve()}", study_name=bench.key, load_if_exists=True,
        directions=["maximize", "maximize"],
    )  # fmt: skip
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its process was killed: this one holds the lock
    if not study.trials:
        for start in bench.choices.starts():
            study.enqueue_trial(start)
    # Another seed each time the search goes on, or it would propose again what it has seen.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _complete(study: Study) -> list[FrozenTrial]:
    import optuna

    found: list[FrozenTrial] = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return found


def _run(study: Study, bench: _Bench, trials: int, minutes: float, report: Report) -> None:
    import optuna

    end = time.monotonic() + 60 * minutes
    for _ in range(2 * trials):  # some may fail
        done = _complete(study)
        if len(done) >= trials or time.monotonic() >= end:
            return
        trial = study.ask()
        steps = bench.choices.steps(_suggested(trial, bench.choices))
        same = next((one for one in (_measured(old, bench.choices) for old in done) if one.steps == steps), None)
        try:
            found = same or bench.measure(trial.number, steps)
        except InputError as error:  # what the model or its texts cannot give
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            report("compress", f"trial {trial.number} cannot be: {error}")
            continue
        for key, value in _bounded(found).items():
            if bench.trained and key in LEFT_TO_TRAINING:
                continue
            if (limit := getattr(bench.built.spec.compress_budget, key)) is not None:
                trial.set_constraint(key, limit - value)  # 0 or less is within it
        for key in ("cosine", "worst", "speed", "parameters"):
            trial.set_user_attr(key, getattr(found, key))
        trial.set_user_attr("missed", list(found.missed))
        study.tell(trial, [found.cosine, found.speed])
        report("compress", f"trial {len(done) + 1} of {trials}: {found.told}: cosine {found.cosine:.3f}, "
                           f"{found.speed:.2f} x as fast")  # fmt: skip


def _suggested(trial: Trial, choices: Choices) -> dict[str, int]:
    def of(name: str, steps: tuple[int, int], least: int | None = None) -> int:
        step, most = steps
        found: int = trial.suggest_int(name, step if least is None else least, most, step=step)
        return found

    return {
        "layers": trial.suggest_int("layers", 1, choices.layers),
        "heads": of("heads", choices.heads),
        "ffn": of("ffn", choices.ffn),
        "rank": of("rank", choices.rank, 0),
    }


def _measured(trial: FrozenTrial, choices: Choices) -> Tried:
    kept = trial.user_attrs
    return Tried(
        trial.number, choices.steps(trial.params), kept["cosine"], kept["worst"], kept["speed"], kept["parameters"],
        tuple(kept["missed"]),
    )  # fmt: skip


def _judged(bench: _Bench, trial: Tried, store: Store, report: Report) -> Finalist:
    spec = bench.built.spec.model_copy(update={"compress": trial.steps})
    built = replace(bench.built, spec=spec)
    if trial.steps:
        report("compress", f"finalist: {trial.told}")
        try:
            built = compress.carried_out(built, store, report)
        except DivergedError as error:
            report("compress", f"{error}; it stays as it is")
            return _judged(bench, replace(trial, steps=trial.steps[:-1]), store, report)
    figures = judge(built, built.checkpoint, store, report)
    return Finalist(trial, figures, missed(figures, spec.compress_budget, spec.cpu_executor))


def require_chosen(found: Found) -> Finalist:
    """Raises QualityError with the nearest where nothing is within the budget."""
    if found.chosen is not None:
        return found.chosen
    if found.finalists:
        told = "; ".join(
            f"{each.trial.told} misses {', '.join(f'{key} with {value:.3f}' for key, value in each.missed.items())}"
            for each in found.finalists
        )
        raise QualityError(f"search: of {len(found.trials)} trials the best miss the budget on held-out texts: {told}")
    nearest = sorted(found.trials, key=lambda each: len(each.missed))[:FINALISTS]
    told = "; ".join(f"{each.told}: cosine {each.cosine:.3f}, {each.speed:.2f} x" for each in nearest)
    raise QualityError(
        f"search: none of {len(found.trials)} trials is within the budget; the nearest: {told or 'none'}. Give it more "
        "--trials or --minutes, or lower the budget knowingly"
    )
