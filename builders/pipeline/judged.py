"""What `compress` left against the original: figures, the budget, and the step that is to blame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from builders.artifacts import Artifact, Checkpoint, Quality
from builders.graph import count_weights
from builders.judging import corpus, retrieval, vectors
from builders.judging.retrieval import Retrieval, RetrievalFigures
from builders.pipeline import choice, encoder
from builders.pipeline.result import Build, Report
from builders.spec import BudgetSlice, DeploymentSpec, ParallelSlice
from builders.store.processor import this_processor
from builders.store.store import Store

EXECUTORS = ("openvino", "onnxruntime")


class StepFigures(Artifact):
    """A compressed checkpoint against the original, both as fp32 graphs, on one CPU. No files: the figures are the
    result.

    `spearman` is of the similarities of all pairs of held-out texts, and only embeddings find anything. `speeds`: of
    the original's, by executor, by CPU time in the same run.
    """

    parameters: int
    graph_bytes: int
    quality: Quality
    spearman: float | None
    retrieval: Retrieval | None
    mrr_ratio: float | None
    speeds: dict[str, float]


def judge(built: Build, checkpoint: Checkpoint, store: Store, report: Report) -> StepFigures:
    """A checkpoint against `built.original`, as fp32 graphs: on the held-out texts, on pairs, and by CPU time."""
    assert built.original is not None
    graphs = [_plain(built, item, store, report) for item in (built.original, checkpoint)]
    reference, candidate = (item.graph("fp32") for item in graphs)

    def run(out: Path) -> StepFigures:
        _, held_out = vectors.calibration_and_held_out(built.spec.precision)
        requests = vectors.sample_requests(checkpoint, held_out)
        wanted, outputs = (
            vectors.graph_outputs(graph.file_path, requests, checkpoint) for graph in (reference, candidate)
        )
        embeds = checkpoint.task == "embedding"
        before, after = (_found(item, store) if embeds else None for item in graphs)
        return StepFigures(
            directory=out,
            files=(),
            parameters=count_weights(candidate.file_path),
            graph_bytes=candidate.bytes,
            quality=vectors.measure(wanted, outputs, checkpoint.task, "ONNX Runtime"),
            spearman=retrieval.spearman(wanted, outputs) if embeds else None,
            retrieval=after,
            mrr_ratio=after.mrr / before.mrr if before and after else None,
            speeds={name: choice.encoder_speed(*(_by(item, name) for item in graphs)) for name in EXECUTORS},
        )

    report("compress", f"{checkpoint.source} against the original")
    item, _ = store.get_or_build(
        "judge",
        {
            "reference": reference.digest,
            "candidate": candidate.digest,
            "checkpoint": checkpoint.model_dump(mode="json", exclude={"source"}),
            "texts": corpus.corpus_key(built.spec.precision.calibration_texts),
            "left out": built.spec.precision.calibration_samples,
            "pairs": corpus.corpus_key(None),
            "serving": built.spec.serving.model_dump(mode="json", include={"threads", "tokens_per_batch"}),
            "processor": this_processor().model_dump(mode="json"),
        },
        StepFigures,
        run,
    )
    return item


def _plain(built: Build, checkpoint: Checkpoint, store: Store, report: Report) -> Build:
    """The fp32 graph of a checkpoint, as a CPU serves it without ranks; the very one that a build exports."""
    spec = built.spec.with_cpu_precision("fp32").model_copy(update={"parallel": ParallelSlice()})
    return encoder.export(replace(built, platform="cpu", spec=spec, checkpoint=checkpoint), store, report)


def _by(built: Build, executor: str) -> Build:
    serving = built.spec.serving.model_copy(update={"executor": executor})
    return replace(built, spec=built.spec.model_copy(update={"serving": serving}))


def _found(built: Build, store: Store) -> Retrieval:
    graph, checkpoint = built.graph("fp32"), built.checkpoint

    def run(out: Path) -> RetrievalFigures:
        lines, bodies = (
            vectors.graph_outputs(graph.file_path, vectors.sample_requests(checkpoint, texts), checkpoint)
            for texts in zip(*retrieval.pairs(), strict=True)
        )
        return RetrievalFigures(directory=out, files=(), retrieval=retrieval.retrieval(lines, bodies))

    key = {"graph": graph.digest, "checkpoint": checkpoint.model_dump(mode="json", exclude={"source"})}
    inputs = {**key, "pairs": corpus.corpus_key(None)}
    return store.get_or_build("retrieval", inputs, RetrievalFigures, run)[0].retrieval


def figures(item: StepFigures, executor: str) -> dict[str, float | None]:
    """By the key of the budget that bounds each from below."""
    return {
        "min_mean_cosine": item.quality.mean_cosine,
        "min_worst_cosine": item.quality.worst_cosine,
        "min_mrr_ratio": item.mrr_ratio,
        "min_speedup": item.speeds[executor],
    }


def missed(item: StepFigures, budget: BudgetSlice, executor: str) -> dict[str, float]:
    """Keys of the budget that are missed, with the figure."""
    return {
        key: value
        for key, value in figures(item, executor).items()
        if (limit := getattr(budget, key)) is not None and value is not None and not value >= limit
    }


def at_fault(spec: DeploymentSpec, judged: Sequence[StepFigures]) -> str | None:
    """Which step is to blame for each key that is missed in the end, in words; None where all is within the budget.

    That is the first of the steps since which it has been missed: one that a later step made good is not. No step slows
    a model down, so of a speed that is not reached the last is named.
    """
    budget, executor = spec.compress_budget, spec.cpu_executor
    every = [missed(item, budget, executor) for item in judged]
    said = []
    for key, value in every[-1].items():
        since = next(number for number in range(len(every)) if all(key in later for later in every[number:]))
        number = len(every) - 1 if key == "min_speedup" else since
        found = [figures(item, executor)[key] for item in judged]
        steps = ", ".join(f"{step.name} {value:.4f}" for step, value in zip(spec.compress, found, strict=True))
        said.append(
            f"budget.{key} is {getattr(budget, key)}, and {value:.4f} is left: step {number} "
            f"({spec.compress[number].name}) is at fault (after each step: {steps})"
        )
    if not said:
        return None
    return (
        f"compress misses its budget on {judged[-1].quality.texts} held-out texts: {'; '.join(said)}. Take out less "
        "in that step, add one that recovers, or lower the budget knowingly"
    )
