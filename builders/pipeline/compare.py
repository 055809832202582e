"""`trireme compare A B`: two models judged on the same texts, the second against the first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.errors import InputError
from builders.judging import corpus, labels
from builders.judging.labels import Labelled
from builders.pipeline import choice, compress, encoder, generator
from builders.pipeline.differences import Difference, differences, faster
from builders.pipeline.judged import StepFigures, judge_graphs, outputs_of
from builders.pipeline.judged_language import LanguageFigures, judge_language, language_differences, language_faster
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
    first, second = (served(spec, store, report) for spec in specs)
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


@dataclass(frozen=True)
class LanguageSide:
    """As `ComparedSide`, of a language model."""

    name: str
    checkpoint: Checkpoint
    served: str
    judged: LanguageFigures


@dataclass(frozen=True)
class LanguageComparison:
    sides: tuple[LanguageSide, LanguageSide]
    differences: tuple[Difference, ...]


def compared_language(
    names: tuple[str, str],
    specs: tuple[DeploymentSpec, DeploymentSpec],
    root: Path,
    report: Report = lambda stage, message: None,
) -> LanguageComparison:
    """The same of two language models with the same tokens, by the executor that serves each."""
    _require_comparable(names, specs)
    _require_same_tokens(names, (load_checkpoint(specs[0].model), load_checkpoint(specs[1].model)))
    store = Store(root / "store")
    first, second = (served(spec, store, report) for spec in specs)
    sides = []
    for name, built in zip(names, (first, second), strict=True):
        report("compress", f"{name} against {names[0]}")
        judged = judge_language(first, built, store)
        sides.append(LanguageSide(name, built.checkpoint, str(built.spec.precision.cpu), judged))
    a, b = sides
    # A's agreement with itself is 1, and its divergence 0.
    near = [each for each in language_differences(a.judged, b.judged) if each.figure not in ("agreement", "divergence")]
    return LanguageComparison((a, b), (*near, language_faster(b.judged)))


def served(spec: DeploymentSpec, store: Store, report: Report) -> Build:
    """Up to the graph that a CPU serves without ranks, `compress` carried out whatever its budget says."""
    built = Build(spec, "cpu", load_checkpoint(spec.model))
    if spec.compress:
        built = compress.carried_out(built, store, report)  # widths depend on the ranks that are to share them
    built = replace(built, spec=spec.model_copy(update={"parallel": ParallelSlice()}))
    kind = generator if spec.generates else encoder
    for step in (choice.choose, kind.export, kind.quantize):
        built = step(built, store, report)
    return built


def _labelled(first: Build, second: Build, file: Path) -> Labelled:
    wanted, texts, _ = zip(*corpus.labelled(file, first.checkpoint.labels), strict=True)
    return labels.labelled(outputs_of(first, texts), outputs_of(second, texts), wanted)


def _require_comparable(names: tuple[str, str], specs: tuple[DeploymentSpec, DeploymentSpec]) -> None:
    first, second = specs
    for name, spec in zip(names, specs, strict=True):
        if spec.model.task == "seq2seq":
            raise InputError(
                f"compare: {name}", got="model.task=seq2seq",
                expected="generation, embedding, classification or reranking: it is not built for encoder-decoders",
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


def _require_same_tokens(names: tuple[str, str], found: tuple[Checkpoint, Checkpoint]) -> None:
    """Perplexities of other tokens are other figures."""
    kept = [
        ({record.sha256 for record in each.files if record.name == "tokenizer.json"}, each.generation) for each in found
    ]
    (first, facts), (second, other) = kept
    assert facts is not None
    assert other is not None
    sizes = [(each.vocabulary, each.bos_id, each.eos_ids[:1]) for each in (facts, other)]
    if first != second or sizes[0] != sizes[1]:
        raise InputError(
            "compare: tokens", got=f"{names[0]} and {names[1]} with other tokenizers or vocabularies",
            expected="one tokenizer.json, vocabulary and marks: perplexities by other tokens cannot be compared",
            fix="compare a model with what was made of it",
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
