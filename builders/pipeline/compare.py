"""`trireme compare A B`: two models judged on the same texts, the second against the first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.errors import InputError
from builders.judging import corpus, labels
from builders.judging.labels import Labelled
from builders.pipeline import choice, compress, encoder
from builders.pipeline.differences import Difference, differences, faster
from builders.pipeline.judged import StepFigures, judge_graphs, outputs_of
from builders.pipeline.result import Build, Report
from builders.spec import DeploymentSpec, ParallelSlice
from builders.store.store import Store


@dataclass(frozen=True)
class ComparedSide:
    """`judged` is against the first side. `served`: the precision that was judged and timed."""

    name: str
    checkpoint: Checkpoint
    served: str
    judged: StepFigures


@dataclass(frozen=True)
class Comparison:
    """`labelled` is None without labels."""

    sides: tuple[ComparedSide, ComparedSide]
    differences: tuple[Difference, ...]
    labelled: Labelled | None


def compared(
    names: tuple[str, str],
    specs: tuple[DeploymentSpec, DeploymentSpec],
    label_file: Path | None,
    root: Path,
    report: Report = lambda stage, message: None,
) -> Comparison:
    """What each spec would serve on a CPU without ranks, `compress` carried out whatever its budget says.

    Raises InputError for two that cannot be judged on the same texts, and what a build raises.
    """
    _require_comparable(names, specs)
    store = Store(root / "store")
    first, second = (_served(spec, store, report) for spec in specs)
    _require_labels(names, (first.checkpoint, second.checkpoint), label_file)
    sides = []
    for name, built in zip(names, (first, second), strict=True):
        report("compress", f"{name} against {names[0]}")
        judged = judge_graphs(first, built, store)
        sides.append(ComparedSide(name, built.checkpoint, str(built.spec.precision.cpu), judged))
    a, b = sides
    near = tuple(each for each in differences(a.judged, b.judged) if each.figure != "cosine")  # A's to itself is 1
    found = None if label_file is None else _labelled(first, second, label_file)
    return Comparison((a, b), (*near, *faster(b.judged)), found)


def _served(spec: DeploymentSpec, store: Store, report: Report) -> Build:
    """Up to the graph that a CPU serves."""
    built = Build(spec, "cpu", load_checkpoint(spec.model))
    if spec.compress:
        built = compress.carried_out(built, store, report)  # widths depend on the ranks that are to share them
    built = replace(built, spec=spec.model_copy(update={"parallel": ParallelSlice()}))
    for step in (choice.choose, encoder.export, encoder.quantize):
        built = step(built, store, report)
    return built


def _labelled(first: Build, second: Build, file: Path) -> Labelled:
    wanted, texts, _ = zip(*corpus.labelled(file, first.checkpoint.labels), strict=True)
    return labels.labelled(outputs_of(first, texts), outputs_of(second, texts), wanted)


def _require_comparable(names: tuple[str, str], specs: tuple[DeploymentSpec, DeploymentSpec]) -> None:
    first, second = specs
    for name, spec in zip(names, specs, strict=True):
        if spec.generates:
            raise InputError(
                f"compare: {name}", got=f"model.task={spec.model.task}",
                expected="embedding, classification or reranking: language models are judged by perplexity",
                fix="build both with `trireme build`, which says what each is to its own checkpoint",
            )  # fmt: skip
    for key, values in (
        ("model.task", (first.model.task, second.model.task)),
        ("precision.calibration_texts", tuple(spec.precision.calibration_texts for spec in specs)),
        ("precision.calibration_samples", tuple(spec.precision.calibration_samples for spec in specs)),
    ):
        if values[0] != values[1]:
            raise InputError(
                f"compare: {key}", got=f"{values[0]} in {names[0]} and {values[1]} in {names[1]}",
                expected="the same in both: texts that one was made with cannot judge the other",
                fix=f"set {key} alike",
            )  # fmt: skip


def _require_labels(names: tuple[str, str], found: tuple[Checkpoint, Checkpoint], file: Path | None) -> None:
    first, second = found
    if first.labels != second.labels:
        raise InputError(
            "compare: labels", got=f"{first.labels} of {names[0]} and {second.labels} of {names[1]}",
            expected="as many of both", fix="compare classifiers of one task",
        )  # fmt: skip
    if file is not None and (first.task != "classification" or first.labels < 2):
        raise InputError(
            "--labels", got=f"task {first.task} with {first.labels} labels",
            expected="classifiers of two labels or more", fix="leave --labels out",
        )  # fmt: skip
