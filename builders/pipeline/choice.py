"""`precision.cpu`: candidates are built, judged and timed on this CPU by the executor that serves; one is taken.

With ranks, the whole graph is measured by ONNX Runtime, which runs their pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from builders.artifacts import PrecisionCandidate, PrecisionChoice, Processor
from builders.errors import CheckError, UnsupportedError
from builders.judging import corpus, perplexity, precision, speed, vectors
from builders.pipeline import encoder, generator
from builders.pipeline.result import Build, Report, done
from builders.repository import directories
from builders.spec import CpuPrecision
from builders.store.processor import this_processor
from builders.store.store import Store
from runtime.encoding.encoder import Encoder, open_encoder
from runtime.generation.opening import open_executor
from runtime.step import StepExecutor


def choose(built: Build, store: Store, report: Report) -> Build:
    """`auto` becomes the fastest precision within the budget. Raises QualityError with all figures where none is."""
    if built.platform != "cpu" or built.spec.precision.cpu != "auto":
        return built
    processor = this_processor()

    def run(out: Path) -> PrecisionChoice:
        tried, measured = _try_all(built, processor, store, report)
        chosen, judged = precision.decide([*tried, *measured], built.checkpoint.source)
        return _record(built, processor, out, chosen, judged)

    report("precision", f"candidates on {processor.name}")
    item, hit = _stored(built, processor, store, run)
    taken = next(each for each in item.candidates if each.precision == item.chosen)
    report("precision", done(f"{item.chosen}, {taken.speed or 1:.2f} of fp32's speed", hit))
    return replace(built, spec=built.spec.with_cpu_precision(item.chosen), choice=item)


def weigh(built: Build, store: Store, report: Report) -> Build:
    """A precision that was asked for by name against fp32: it is taken, with a warning where it is slower."""
    named = built.spec.precision.cpu
    if built.platform != "cpu" or built.choice is not None or named == "auto" or named == "fp32":
        return built
    processor = this_processor()

    def run(out: Path) -> PrecisionChoice:
        found = built.served or built.served_graph.quality
        ratio = _speed(_in(built, "fp32"), _in(built, named))
        asked = PrecisionCandidate(precision=named, quality=found, speed=ratio, reason="taken: asked for by name")
        plain = PrecisionCandidate(
            precision="fp32", quality=built.graph("fp32").quality, speed=1.0, reason="the yardstick"
        )
        note = precision.warning(asked, processor)
        return _record(built, processor, out, named, (asked, plain), note)

    report("qualify", f"{named} against fp32 in speed")
    item, _ = _stored(built, processor, store, run)
    report("qualify", item.warning or precision.describe(item.candidates[0]))
    return replace(built, choice=item)


def _try_all(
    built: Build, processor: Processor, store: Store, report: Report
) -> tuple[list[PrecisionCandidate], list[PrecisionCandidate]]:
    """Candidates with their figures or refusals, and those left out."""
    names, left_out = precision.candidates(built.spec.generates, built.spec.cpu_executor, processor)
    builds: dict[CpuPrecision, Build] = {"fp32": _qualified(built, "fp32", store, report)}
    found = []
    for name in names:
        if name == "fp32":
            found.append(_measured(builds["fp32"], 1.0))
            continue
        try:
            builds[name] = _qualified(built, name, store, report)
        except (CheckError, UnsupportedError) as error:
            found.append(PrecisionCandidate(precision=name, reason=f"refused: {error}"))
            continue
        report("precision", f"{name} against fp32 in speed")
        found.append(_measured(builds[name], _speed(builds["fp32"], builds[name])))
    return found, left_out


def _measured(built: Build, ratio: float) -> PrecisionCandidate:
    chosen = built.spec.precision.cpu
    assert chosen != "auto"
    return PrecisionCandidate(precision=chosen, quality=built.served or built.served_graph.quality, speed=ratio)


def _qualified(built: Build, name: CpuPrecision, store: Store, report: Report) -> Build:
    """The whole graph in one precision, judged by what serves it. Raises CheckError where it misses the budget."""
    kind = generator if built.spec.generates else encoder
    found = replace(built, spec=built.spec.with_cpu_precision(name))
    for step in (kind.export, kind.quantize, kind.qualify):
        found = step(found, store, report)
    return found


def _in(built: Build, name: CpuPrecision) -> Build:
    """The same graphs, served in another precision."""
    return replace(built, spec=built.spec.with_cpu_precision(name))


def _speed(reference: Build, candidate: Build) -> float:
    return median(speeds(reference, candidate))


def speeds(reference: Build, candidate: Build, fewest: int = speed.FEWEST_ROUNDS) -> list[float]:
    """Of rounds by turns; 2.0: the candidate's graph takes half the CPU time of the reference's, each by the executor
    that serves it. Graphs are whole, whatever ranks share them."""
    plain, other = (replace(each, partition=None, ranks=None) for each in (reference, candidate))
    return (decoder_speeds if reference.spec.generates else encoder_speeds)(plain, other, fewest)


def encoder_speed(reference: Build, candidate: Build) -> float:
    """2.0: the candidate's graph takes half the CPU time of the reference's, by the executor of their spec."""
    return median(encoder_speeds(reference, candidate))


def encoder_speeds(reference: Build, candidate: Build, fewest: int = speed.FEWEST_ROUNDS) -> list[float]:
    """The same by rounds. Each model gets the texts as its own tokenizer cuts them."""
    _, held_out = vectors.calibration_and_held_out(reference.spec.precision)
    given, other_given = (vectors.sample_requests(each.checkpoint, held_out) for each in (reference, candidate))
    with _encoder(reference) as plain, _encoder(candidate) as other:
        count = speed.texts_for_a_pass(plain, given)
        return speed.speed_ratios(lambda: plain.run(given[:count]), lambda: other.run(other_given[:count]), fewest)


def _encoder(built: Build) -> contextlib.closing[Encoder]:
    part = built.served_graph
    settings = directories.encoder_settings(built.spec, "cpu", [part])
    return contextlib.closing(open_encoder(settings, {key: part.path(name) for key, name in settings.files.items()}))


def decoder_speeds(reference: Build, candidate: Build, fewest: int = speed.FEWEST_ROUNDS) -> list[float]:
    """As `encoder_speeds`, of language models with the same tokens."""
    _, held_out = vectors.calibration_and_held_out(reference.spec.precision)
    count = min(speed.DECODE_ROWS, reference.spec.generation.slots)
    rows = perplexity.token_rows(reference.checkpoint, held_out, rows=count)
    encodes = reference.checkpoint.task == "seq2seq"
    with decoder(reference, len(rows)) as plain, decoder(candidate, len(rows)) as other:
        first, second = (
            speed.decoder_work(executor, built.spec.cache_lengths_on("cpu"), rows, encodes)
            for executor, built in ((plain, reference), (other, candidate))
        )
        return speed.speed_ratios(first, second, fewest)


def decoder(built: Build, rows: int) -> contextlib.closing[StepExecutor]:
    """What serves the build on this CPU, with a slot for each of `rows`."""
    part, settings = built.served_graph, generator.service_settings(built)
    files = {key: part.path(name) for key, name in settings.files.items()}
    return contextlib.closing(open_executor(settings.model_copy(update={"slots": rows}), files))


def _record(
    built: Build,
    processor: Processor,
    out: Path,
    chosen: CpuPrecision,
    candidates: tuple[PrecisionCandidate, ...],
    warning: str | None = None,
) -> PrecisionChoice:
    return PrecisionChoice(
        directory=out,
        files=(),
        asked=built.spec.precision.cpu,
        chosen=chosen,
        executor=built.spec.cpu_executor,
        processor=processor,
        candidates=candidates,
        warning=warning,
    )


def _stored(
    built: Build, processor: Processor, store: Store, run: Callable[[Path], PrecisionChoice]
) -> tuple[PrecisionChoice, bool]:
    """Everything from the checkpoint to the service decides, so all of it is in the key: a choice is not measured
    again on the same kind of CPU, nor is a refusal."""
    spec, checkpoint = built.spec, built.checkpoint
    return store.get_or_build(
        "precision",
        {
            "checkpoint": checkpoint.model_dump(mode="json", exclude={"source"}),
            "budget": spec.precision.model_dump(mode="json", exclude={"gpu", "calibration_texts"}),
            "texts": corpus.corpus_key(spec.precision.calibration_texts),
            "tensor": spec.parallel.tensor,
            "executor": spec.cpu_executor,
            "serving": spec.serving.model_dump(mode="json", include={"threads", "tokens_per_batch"}),
            "generation": [spec.generation.slots, spec.cache_lengths_on("cpu") if spec.generates else ()],
            "processor": processor.model_dump(mode="json"),
        },
        PrecisionChoice,
        run,
    )
