"""A language model against another on one CPU: perplexity, agreement, divergence, bytes, and speed as it is served."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from builders.artifacts import Artifact, Checkpoint
from builders.graph import flops_per_token
from builders.judging import corpus, intervals, language, perplexity, vectors
from builders.judging.intervals import MEDIAN_ROUNDS, ConfidenceInterval
from builders.pipeline import choice
from builders.pipeline.differences import Difference, sizes
from builders.pipeline.judged import blamed, missed_of, plain, weight_bytes
from builders.pipeline.result import Build, Report
from builders.spec import BudgetSlice, DeploymentSpec
from builders.store.processor import this_processor
from builders.store.store import Store
from runtime.generation.grouping import pool_for
from runtime.step import Batch, StepExecutor


class LanguageFigures(Artifact):
    """A language model against a reference, both by the executors that serve them. No files: the figures are the
    result.

    `losses`, in nats, `agreement` and `divergence` are those of `judging.language`, by row of held-out tokens; `speed`:
    of the reference's, by CPU time in the same run, prompts and decoding together. `flops_per_token`: of one decoding
    step, attention over the cache left out. `stored_bytes`: of the checkpoint's weights; `graph_bytes`: of the graph,
    scales counted. `intervals`: 95 %, by figure.
    """

    parameters: int
    graph_bytes: int
    stored_bytes: int
    flops_per_token: float
    tokens: int
    losses: tuple[float, ...]
    reference_losses: tuple[float, ...]
    agreement: tuple[float, ...]
    divergence: tuple[float, ...]
    speed: float
    executor: str
    intervals: dict[str, ConfidenceInterval]

    @property
    def perplexity(self) -> float:
        return language.perplexity(np.array(self.losses))

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / language.perplexity(np.array(self.reference_losses))

    @property
    def summary(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f}, {self.perplexity_ratio:.4f} of the original's, "
            f"{self.mean_agreement:.1%} of next tokens the same, {self.speed:.2f} x as fast ({self.executor})"
        )

    @property
    def mean_agreement(self) -> float:
        return float(np.mean(self.agreement))

    @property
    def mean_divergence(self) -> float:
        return float(np.mean(self.divergence))


def judge_language(
    reference: Build, candidate: Build, store: Store, rows: perplexity.Ids | None = None
) -> LanguageFigures:  # fmt: skip
    """The graph that `candidate` serves against that of `reference`, whose held-out texts judge both unless there are
    `rows` of tokens. Their tokens must be the same."""
    first, second = reference.served_graph, candidate.served_graph

    def run(out: Path) -> LanguageFigures:
        return _figures(out, reference, candidate, rows)

    item, _ = store.get_or_build(
        "judge-language",
        {
            "reference": [first.digest, _key(reference)],
            "candidate": [second.digest, _key(candidate)],
            "texts": corpus.corpus_key(reference.spec.precision.calibration_texts),
            "rows": None if rows is None else hashlib.sha256(rows.tobytes()).hexdigest(),
            "left out": reference.spec.precision.calibration_samples,
            "processor": this_processor().model_dump(mode="json"),
        },
        LanguageFigures,
        run,
    )
    return item


def _key(built: Build) -> list[object]:
    spec = built.spec
    return [
        built.checkpoint.model_dump(mode="json", exclude={"source"}),
        spec.serving.model_dump(mode="json", include={"threads"}),
        [spec.precision.cpu, spec.cpu_executor, spec.generation.slots, spec.cache_lengths_on("cpu")],
    ]


def _figures(
    out: Path, reference: Build, candidate: Build, rows: perplexity.Ids | None
) -> LanguageFigures:  # fmt: skip
    if rows is None:
        _, held_out = vectors.calibration_and_held_out(reference.spec.precision)
        rows = perplexity.token_rows(reference.checkpoint, held_out)
    with choice.decoder(reference, len(rows)) as plain, choice.decoder(candidate, len(rows)) as other:

        def step_of(built: Build, executor: StepExecutor, longest: int = rows.shape[1] - 1) -> language.Step:
            pool = pool_for(longest, built.spec.cache_lengths_on("cpu"))
            return lambda at, ids: executor.run([Batch(pool, 0, ids, np.full(len(ids), at))])[0]

        found = language.side_by_side(rows, step_of(reference, plain), step_of(candidate, other))
    rounds = choice.decoder_speeds(reference, candidate, MEDIAN_ROUNDS)
    graph = candidate.graph("fp32")
    return LanguageFigures(
        directory=out,
        files=(),
        parameters=candidate.checkpoint.parameters,
        graph_bytes=candidate.served_graph.bytes,
        stored_bytes=weight_bytes(candidate.checkpoint),
        flops_per_token=flops_per_token(graph.file_path, 1),
        tokens=rows[:, 1:].size,
        losses=tuple(found.losses.tolist()),
        reference_losses=tuple(found.reference_losses.tolist()),
        agreement=tuple(found.agreement.tolist()),
        divergence=tuple(found.divergence.tolist()),
        speed=median(rounds),
        executor=candidate.spec.cpu_executor,
        intervals={
            "perplexity_ratio": language.perplexity_ratio_interval(found.reference_losses, found.losses),
            "agreement": intervals.of_mean(found.agreement),
            "divergence": intervals.of_mean(found.divergence),
            "speed": intervals.of_median(rounds),
        },
    )


def judge_step(built: Build, checkpoint: Checkpoint, store: Store, report: Report) -> LanguageFigures:
    """A checkpoint against `built.original`, as fp32 graphs."""
    assert built.original is not None
    report("compress", f"{checkpoint.source} against the original")
    reference, candidate = (plain(built, item, store, report) for item in (built.original, checkpoint))
    return judge_language(reference, candidate, store)


def language_figures(item: LanguageFigures) -> dict[str, float | None]:
    """By the key of the budget that bounds each."""
    return {
        "max_perplexity_ratio": item.perplexity_ratio,
        "min_agreement": item.mean_agreement,
        "min_speedup": item.speed,
    }


def missed_by_language(item: LanguageFigures, budget: BudgetSlice) -> dict[str, float]:
    """Keys of the budget that are missed, with the figure."""
    found = language_figures(item)
    ratio = item.perplexity_ratio
    over = {} if ratio <= budget.max_perplexity_ratio else {"max_perplexity_ratio": ratio}
    return {**over, **missed_of({key: found[key] for key in ("min_agreement", "min_speedup")}, budget)}


def language_at_fault(spec: DeploymentSpec, judged: Sequence[LanguageFigures]) -> str | None:
    """As `at_fault`, of a language model."""
    every = [missed_by_language(item, spec.compress_budget) for item in judged]
    return blamed(spec, every, [language_figures(item) for item in judged], f"{judged[-1].tokens} held-out tokens")


def language_differences(reference: LanguageFigures, candidate: LanguageFigures) -> tuple[Difference, ...]:
    """Both judged against the same original, on the same rows."""
    return (*_perplexity(reference, candidate), *_nearness(reference, candidate), *sizes(reference, candidate))


def _perplexity(reference: LanguageFigures, candidate: LanguageFigures) -> Iterator[Difference]:
    over = language.perplexity_difference(np.array(reference.losses), np.array(candidate.losses))
    verdict = over.against(0.0, more_is_better=False)
    yield Difference("perplexity", reference.perplexity, candidate.perplexity, over, verdict)


def _nearness(reference: LanguageFigures, candidate: LanguageFigures) -> Iterator[Difference]:
    """Which is nearer to the original that both were judged against."""
    for name, old, new, more in (
        ("agreement", reference.agreement, candidate.agreement, True),
        ("divergence", reference.divergence, candidate.divergence, False),
    ):
        over = intervals.of_difference(old, new)
        yield Difference(name, float(np.mean(old)), float(np.mean(new)), over, over.against(0.0, more_is_better=more))


def language_faster(candidate: LanguageFigures) -> Difference:
    """Than the model that it was judged against, by the interval over rounds."""
    over = candidate.intervals["speed"]
    return Difference(f"x {candidate.executor}", None, candidate.speed, over, over.against(1.0))
