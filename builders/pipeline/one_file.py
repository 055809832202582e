"""One stage on one file: `trireme export`, `quantize` and `engine`, without a spec.

Each writes `OUTPUT.json` beside its output. That of a graph names the checkpoint too, and the next command reads it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from builders.artifacts import Checkpoint, FileRecord, OnnxGraph, file_digest
from builders.checkpoint import load_checkpoint
from builders.errors import InputError
from builders.graph import GRAPH_FILE
from builders.judging import corpus
from builders.judging.perplexity import ENCODER_FILE
from builders.judging.vectors import HELD_OUT_TEXTS, calibration_and_held_out
from builders.quantize.forms import FORMS
from builders.spec import Flavour, ModelSlice, PrecisionSlice, ProfileSlice, Range
from runtime.record import Record

Scheme = Literal["int8", "dynamic_int8", "fp8", "w8", "w4"]
_ENCODER_SCHEMES_OF_FP32 = ("dynamic_int8", "w8", "w4")  # DynamicQuantizeLinear reads no other type
DECODER_FILE = "decoder.onnx"  # of an encoder-decoder, as its export names it


class Sidecar(Record):
    """What `graph.onnx.json` holds."""

    model: ModelSlice
    graph: OnnxGraph


def export(model: ModelSlice, precision: Literal["fp32", "fp16"], output: Path) -> tuple[OnnxGraph, Checkpoint]:
    """Any task's graph; that of an encoder-decoder's encoder lies beside it, as `encoder_beside` names it."""
    checkpoint = load_checkpoint(model)
    with beside(output) as work:
        return _publish(exported(checkpoint, precision, work), model, output), checkpoint


def exported(checkpoint: Checkpoint, precision: Literal["fp32", "fp16"], work: Path) -> OnnxGraph:
    if checkpoint.generation is None:
        from builders.export.encoder import export_encoder

        return export_encoder(checkpoint, precision, corpus.texts(None, HELD_OUT_TEXTS), work)
    _, held_out = calibration_and_held_out(PrecisionSlice())
    if checkpoint.task == "seq2seq":
        from builders.export.seq2seq import export_seq2seq

        return export_seq2seq(checkpoint, precision, held_out, work)
    from builders.export.decoder import export_decoder

    return export_decoder(checkpoint, precision, held_out, work)


def quantize(source: Path, scheme: Scheme | None, budget: PrecisionSlice, output: Path) -> OnnxGraph:
    """The given graph is source and reference at once. Raises QualityError with the figures."""
    graph, model, checkpoint = read_recorded(source)
    chosen = scheme or ("int8" if checkpoint.generation is None else "w8")
    if graph.precision not in ("fp32", "fp16"):
        raise InputError(
            f"graph {source}", got=f"a graph in {graph.precision}", expected="fp32 or fp16",
            fix="give the graph it was made of",
        )  # fmt: skip
    if chosen in FORMS and checkpoint.generation is not None:
        raise InputError(
            f"--scheme for {source}", got=f"{chosen} with a graph of task {checkpoint.task}",
            expected="w8 or w4, weights alone, for language models", fix="choose one of these",
        )  # fmt: skip
    if graph.precision != "fp32" and chosen in _ENCODER_SCHEMES_OF_FP32 and checkpoint.generation is None:
        raise InputError(
            f"graph {source}", got=f"a graph in {graph.precision} for --scheme {chosen}",
            expected="fp32", fix="export it in fp32",
        )  # fmt: skip
    calibration, held_out = calibration_and_held_out(budget)
    with beside(output) as work, beside(output) as staged:
        given = _staged(graph, checkpoint, staged)
        if chosen not in ("w8", "w4"):
            from builders.quantize.int8 import quantize_linears

            form = FORMS[chosen]
            result = quantize_linears(given, given, checkpoint, budget, calibration, held_out, work, form=form)
        elif checkpoint.generation is None:
            from builders.quantize.encoder_weights import quantize_encoder_weights

            result = quantize_encoder_weights(given, checkpoint, chosen, budget, calibration, held_out, work)
        else:
            from builders.quantize.weight_only import quantize_weights

            ratio = budget.max_perplexity_ratio
            result = quantize_weights(given, given, checkpoint, chosen, ratio, calibration, held_out, work)
        return _publish(result, model, output)


def _staged(graph: OnnxGraph, checkpoint: Checkpoint, work: Path) -> OnnxGraph:
    """The graph under the names that the stages know, whatever the user called its files."""
    file = DECODER_FILE if checkpoint.task == "seq2seq" else GRAPH_FILE
    (work / file).symlink_to(graph.file_path.resolve())
    if checkpoint.task == "seq2seq":
        (work / ENCODER_FILE).symlink_to(encoder_beside(graph.file_path).resolve())
    return graph.model_copy(update={"directory": work, "file": file})


def encoder_beside(decoder: Path) -> Path:
    """`t5.onnx` is a decoder, `t5.encoder.onnx` what it reads from."""
    return decoder.with_name(f"{decoder.stem}.encoder{decoder.suffix}")


class EngineRecord(Record):
    """What `model.plan.json` holds."""

    file: FileRecord
    flavour: Flavour
    version: str
    target: str
    profile: ProfileSlice
    layers: int
    build_seconds: float
    source: FileRecord


def engine(source: Path, flavour: Flavour, target: str, batch: str, length: str, output: Path) -> EngineRecord:
    """Any ONNX file to one plan file, with its record beside it."""
    from builders.engine.tensorrt import compile_plan
    from builders.graph import describe

    _require_file(source)
    profile = ProfileSlice(batch=_range("--batch", batch), length=_range("--length", length))
    compiled = compile_plan(source, flavour, target, (profile,), describe(source)[0])
    with beside(output) as work:
        (work / output.name).write_bytes(compiled.plan)
        record = EngineRecord(
            file=FileRecord.of(work / output.name),
            flavour=flavour,
            version=compiled.version,
            target=target,
            profile=profile,
            layers=compiled.layers,
            build_seconds=round(compiled.seconds, 2),
            source=FileRecord.of(source),
        )
        (work / output.name).replace(output)
    output.with_name(f"{output.name}.json").write_text(record.model_dump_json(indent=2) + "\n")
    return record


def _range(option: str, text: str) -> Range:
    try:
        low, usual, high = (int(part) for part in text.split(":"))
        return Range(min=low, opt=usual, max=high)
    except ValueError as error:
        raise InputError(option, got=text, expected="min:opt:max, rising", fix=f"{option} 1:8:32") from error


def read_recorded(source: Path) -> tuple[OnnxGraph, ModelSlice, Checkpoint]:
    _require_file(source)
    sidecar = source.with_name(f"{source.name}.json")
    try:
        data = json.loads(sidecar.read_text())
        data["graph"]["directory"] = source.parent
        found = Sidecar.model_validate(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{sidecar}",
            got="no record of the checkpoint",
            expected="the record that `trireme export` writes; calibration needs the checkpoint's tokenizer",
            fix="export the graph again with this release",
        ) from error
    for item in found.graph.files:
        path = source.parent / item.name
        if path.is_file() and file_digest(path) == item.sha256:
            continue
        raise InputError(
            f"graph {path}",
            got="another file than its record describes" if path.is_file() else "no such file",
            expected=f"the graph that was exported with {sidecar.name}",
            fix="export the graph again",
        )
    return found.graph, found.model, load_checkpoint(found.model)


def _require_file(source: Path) -> None:
    if not source.is_file():
        raise InputError(f"graph {source}", got="no such file", expected="an ONNX file", fix="check the path")


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A scratch folder on the same disk as `output`."""
    if not output.parent.is_dir():
        raise InputError(f"output {output}", got="no such folder", expected="a folder that exists", fix="create it")
    work = Path(tempfile.mkdtemp(prefix=".trireme-", dir=output.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(graph: OnnxGraph, model: ModelSlice, output: Path) -> OnnxGraph:
    """Moves the graph, or both of an encoder-decoder, to its place; its record last."""
    targets = {graph.file: output, ENCODER_FILE: encoder_beside(output)}
    if any(file.name not in targets for file in graph.files):
        raise InputError(
            f"model {model.source}",
            got=f"{graph.bytes / 1e9:.1f} GB of weights, in a file of their own",
            expected="at most 1 GiB for a single output file",
            fix="use `trireme build`, whose store keeps both files together",
        )
    for file in graph.files:
        graph.path(file.name).replace(targets[file.name])
    files = tuple(FileRecord.of(targets[file.name]) for file in graph.files)
    moved = graph.model_copy(update={"directory": output.parent, "file": output.name, "files": files})
    record = Sidecar(model=model, graph=moved)
    output.with_name(f"{output.name}.json").write_text(record.model_dump_json(indent=2) + "\n")
    return moved
