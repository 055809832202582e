"""What `compress` left against the original: figures, the budget, and the step that is to blame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray

from builders.artifacts import Artifact, Checkpoint, Quality
from builders.graph import count_weights, flops_per_token
from builders.judging import corpus, intervals, retrieval, vectors
from builders.judging.intervals import MEDIAN_ROUNDS, ConfidenceInterval
from builders.judging.retrieval import Retrieval, RetrievalFigures
from builders.pipeline import choice, encoder, generator
from builders.pipeline.result import Build, Report, Step
from builders.repository.directories import encoder_settings
from builders.spec import BudgetSlice, DeploymentSpec, ParallelSlice
from builders.store.processor import this_processor
from builders.store.store import Store
from runtime.proof.judging import cosines

EXECUTORS = ("openvino", "onnxruntime")


class StepFigures(Artifact):
    """A model against the original, as graphs on one CPU. No files: the figures are the result.

    `quality` and `cosines`, text by text, are None and empty where vectors of two widths cannot be compared; only of
    embeddings are there cosines by text, Spearman's correlation (of the similarities of all pairs of held-out texts)
    and retrieval. `speeds`: of the original's, by executor, by CPU time in the same run. `stored_bytes`: of the
    checkpoint's weights, codebooks counted; `graph_bytes`: of the graph, scales counted. `intervals`: 95 %, by figure.
    """

    parameters: int
    graph_bytes: int
    stored_bytes: int
    flops_per_token: float
    quality: Quality | None
    cosines: tuple[float, ...]
    spearman: float | None
    retrieval: Retrieval | None
    mrr_ratio: float | None
    speeds: dict[str, float]
    intervals: dict[str, ConfidenceInterval]


def judge(built: Build, checkpoint: Checkpoint, store: Store, report: Report) -> StepFigures:
    """A checkpoint against `built.original`, as fp32 graphs: on the held-out texts, on pairs, and by CPU time."""
    assert built.original is not None
    report("compress", f"{checkpoint.source} against the original")
    reference, candidate = (plain(built, item, store, report) for item in (built.original, checkpoint))
    return judge_graphs(reference, candidate, store)


def judge_graphs(reference: Build, candidate: Build, store: Store, stored_bytes: int | None = None) -> StepFigures:
    """The graph that `candidate` serves against that of `reference`, whose held-out texts judge both."""
    first, second = reference.served_graph, candidate.served_graph

    def run(out: Path) -> StepFigures:
        return _figures(out, reference, candidate, store, stored_bytes)

    item, _ = store.get_or_build(
        "judge",
        {
            "reference": [first.digest, _key(reference)],
            "candidate": [second.digest, _key(candidate)],
            "stored": stored_bytes,
            "texts": corpus.corpus_key(reference.spec.precision.calibration_texts),
            "left out": reference.spec.precision.calibration_samples,
            "pairs": corpus.corpus_key(None),
            "processor": this_processor().model_dump(mode="json"),
        },
        StepFigures,
        run,
    )
    return item


def _key(built: Build) -> list[object]:
    return [
        built.checkpoint.model_dump(mode="json", exclude={"source"}),
        built.spec.serving.model_dump(mode="json", include={"threads", "tokens_per_batch"}),
        [built.spec.precision.cpu, built.spec.cpu_executor],
    ]


def _figures(
    out: Path, reference: Build, candidate: Build, store: Store, stored_bytes: int | None
) -> StepFigures:  # fmt: skip
    task = reference.checkpoint.task
    _, held_out = vectors.calibration_and_held_out(reference.spec.precision)
    requests = vectors.sample_requests(candidate.checkpoint, held_out)
    wanted, outputs = (outputs_of(each, held_out) for each in (reference, candidate))
    embeds, alike = task == "embedding", wanted.shape == outputs.shape
    before, after = (_found(each, store) if embeds else None for each in (reference, candidate))
    rounds = {name: choice.encoder_speeds(by_executor(reference, name), by_executor(candidate, name), MEDIAN_ROUNDS)
              for name in EXECUTORS}  # fmt: skip
    found: dict[str, ConfidenceInterval] = {f"x {name}": intervals.of_median(taken) for name, taken in rounds.items()}
    if alike:
        found["mean_cosine"] = intervals.of_figure(
            len(wanted), lambda some: float(cosines(wanted[some], outputs[some], by_label=not embeds).mean())
        )
    if before is not None and after is not None:
        found |= {"spearman": retrieval.spearman_interval(wanted, outputs), **_of_retrieval(before, after)}
    graph, chosen = candidate.graph("fp32"), candidate.spec.precision.cpu
    executor = "ONNX Runtime" if chosen == "fp32" else f"{candidate.spec.cpu_executor} in {chosen}"
    return StepFigures(
        directory=out,
        files=(),
        parameters=count_weights(graph.file_path),
        graph_bytes=candidate.served_graph.bytes,
        stored_bytes=weight_bytes(candidate.checkpoint) if stored_bytes is None else stored_bytes,
        flops_per_token=flops_per_token(graph.file_path, round(mean(item["input_ids"].size for item in requests))),
        quality=vectors.measure(wanted, outputs, task, executor) if alike else None,
        cosines=tuple(cosines(wanted, outputs, by_label=False)) if alike and embeds else (),
        spearman=retrieval.spearman(wanted, outputs) if embeds else None,
        retrieval=after,
        mrr_ratio=after.mrr / before.mrr if before and after else None,
        speeds={name: median(taken) for name, taken in rounds.items()},
        intervals=found,
    )


def _of_retrieval(before: Retrieval, after: Retrieval) -> dict[str, ConfidenceInterval]:
    return {
        "mrr": intervals.of_mean(after.reciprocal),
        "recall_at_1": intervals.of_mean(after.within(1)),
        "recall_at_10": intervals.of_mean(after.within(10)),
        "mrr_ratio": intervals.of_ratio(before.reciprocal, after.reciprocal),
    }


def outputs_of(built: Build, texts: Sequence[str]) -> NDArray[np.float32]:
    """[texts, width] of the served graph: fp32 by ONNX Runtime, the reference; else by the executor that serves, since
    how it computes is a part of what is judged."""
    requests, graph = vectors.sample_requests(built.checkpoint, texts), built.served_graph
    if built.spec.precision.cpu == "fp32":
        return vectors.graph_outputs(graph.file_path, requests, built.checkpoint)
    settings = encoder_settings(built.spec, "cpu", [graph])
    return vectors.served_outputs(settings, {"cpu": graph.file_path}, requests).values


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Of the files that hold weights, as they lie in the checkpoint."""
    return sum(record.bytes for record in checkpoint.files if record.name.endswith((".safetensors", ".bin")))


def plain(built: Build, checkpoint: Checkpoint, store: Store, report: Report) -> Build:
    """The fp32 graph of a checkpoint, as a CPU serves it without ranks; the very one that a build exports."""
    spec = built.spec.with_cpu_precision("fp32").model_copy(update={"parallel": ParallelSlice()})
    export: Step = generator.export if spec.generates else encoder.export
    return export(replace(built, platform="cpu", spec=spec, checkpoint=checkpoint), store, report)


def by_executor(built: Build, executor: str) -> Build:
    serving = built.spec.serving.model_copy(update={"executor": executor})
    return replace(built, spec=built.spec.model_copy(update={"serving": serving}))


def _found(built: Build, store: Store) -> Retrieval:
    def run(out: Path) -> RetrievalFigures:
        lines, bodies = (outputs_of(built, texts) for texts in zip(*retrieval.pairs(), strict=True))
        return RetrievalFigures(directory=out, files=(), retrieval=retrieval.retrieval(lines, bodies))

    inputs = {"graph": built.served_graph.digest, "made of": _key(built), "pairs": corpus.corpus_key(None)}
    return store.get_or_build("retrieval", inputs, RetrievalFigures, run)[0].retrieval


def figures(item: StepFigures, executor: str) -> dict[str, float | None]:
    """By the key of the budget that bounds each from below."""
    assert item.quality is not None  # no step changes the width of the output
    return {
        "min_mean_cosine": item.quality.mean_cosine,
        "min_worst_cosine": item.quality.worst_cosine,
        "min_mrr_ratio": item.mrr_ratio,
        "min_speedup": item.speeds[executor],
    }


def missed(item: StepFigures, budget: BudgetSlice, executor: str) -> dict[str, float]:
    """Keys of the budget that are missed, with the figure."""
    return missed_of(figures(item, executor), budget)


def missed_of(figures: Mapping[str, float | None], budget: BudgetSlice) -> dict[str, float]:
    """The same, of figures by the key of the budget that bounds each from below."""
    return {
        key: value
        for key, value in figures.items()
        if (limit := getattr(budget, key)) is not None and value is not None and not value >= limit
    }


def at_fault(spec: DeploymentSpec, judged: Sequence[StepFigures]) -> str | None:
    """Which step is to blame for each key that is missed in the end, in words; None where all is within the budget.

    That is the first of the steps since which it has been missed: one that a later step made good is not. No step slows
    a model down, so of a speed that is not reached the last is named.
    """
    executor = spec.cpu_executor
    every = [missed(item, spec.compress_budget, executor) for item in judged]
    what = f"{vectors.HELD_OUT_TEXTS} held-out texts"
    return blamed(spec, every, [figures(item, executor) for item in judged], what)


def blamed(
    spec: DeploymentSpec,
    every: Sequence[Mapping[str, float]],
    figures: Sequence[Mapping[str, float | None]],
    what: str,
) -> str | None:
    """The same of what each step misses, and of its figures; `what` they were judged on."""
    budget, said = spec.compress_budget, []
    for key, value in every[-1].items():
        since = next(number for number in range(len(every)) if all(key in later for later in every[number:]))
        number = len(every) - 1 if key == "min_speedup" else since
        found = [each[key] for each in figures]
        steps = ", ".join(f"{step.name} {value:.4f}" for step, value in zip(spec.compress, found, strict=True))
        said.append(
            f"budget.{key} is {getattr(budget, key)}, and {value:.4f} is left: step {number} "
            f"({spec.compress[number].name}) is at fault (after each step: {steps})"
        )
    if not said:
        return None
    return (
        f"compress misses its budget on {what}: {'; '.join(said)}. Take out less "
        "in that step, add one that recovers, or lower the budget knowingly"
    )
