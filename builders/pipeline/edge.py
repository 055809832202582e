"""`trireme package`: a checked graph in the format of a runtime for small devices, converted and run by its maker's own
library, and held to the budget of the graph.

OpenVINO's is the intermediate representation: OUTPUT.xml with its weights in OUTPUT.bin.
"""

from __future__ import annotations

import os
from pathlib import Path

from builders.artifacts import Checkpoint, FileRecord, OnnxGraph, Quality
from builders.errors import InputError, UnsupportedError
from builders.judging.vectors import (
    calibration_and_held_out,
    graph_outputs,
    measure,
    require_budget,
    sample_requests,
)
from builders.pipeline.one_file import beside, exported, read_recorded
from builders.spec import ModelSlice, PrecisionSlice
from runtime.record import Record

SUFFIX = ".xml"


class PackageRecord(Record):
    """What `OUTPUT.xml.json` holds. `version` is the converter's, and the runtime's that judged."""

    target: str
    version: str
    model: ModelSlice
    source: FileRecord
    files: tuple[FileRecord, ...]
    quality: Quality


def package(source: Path, budget: PrecisionSlice, output: Path) -> PackageRecord:
    """`source`, of `trireme export` or `quantize`, to OpenVINO's files. Quality is that of OpenVINO on this CPU against
    the graph in fp32, which is exported again where `source` is another.

    Raises InputError for a language model's graph or an output of another suffix, UnsupportedError with the reason for
    what OpenVINO cannot convert, and QualityError over the budget; nothing is written then.
    """
    graph, model, checkpoint = read_recorded(source)
    if checkpoint.generation is not None:
        raise InputError(
            f"graph {source}", got=f"a graph of task {checkpoint.task}", expected="an encoder's",
            fix="use `trireme build`; OpenVINO reads its ONNX graphs as they are",
        )  # fmt: skip
    if output.suffix != SUFFIX:
        raise InputError(
            "--output", got=str(output), expected=f"a name that ends in {SUFFIX}, as OpenVINO's files do",
            fix=f"use {output.with_suffix(SUFFIX)}",
        )  # fmt: skip
    weights = output.with_suffix(".bin")
    with beside(output) as work, beside(output) as plain:
        version = _converted(graph.file_path, work / output.name)
        reference = graph if graph.precision == "fp32" else exported(checkpoint, "fp32", plain)
        quality = _judged(work / output.name, reference, checkpoint, budget)
        require_budget(quality, budget, f"OpenVINO package of {checkpoint.source}")
        record = PackageRecord(
            target="openvino",
            version=version,
            model=model,
            source=FileRecord.of(source),
            files=tuple(FileRecord.of(work / path.name) for path in (output, weights)),
            quality=quality,
        )
        (work / weights.name).replace(weights)
        (work / output.name).replace(output)  # after what it refers to
    output.with_name(f"{output.name}.json").write_text(record.model_dump_json(indent=2) + "\n")
    return record


def _converted(source: Path, target: Path) -> str:
    """Weights and arithmetic as they are: the quantised stay so, and nothing is rounded to fp16."""
    import openvino
    from openvino.frontend import GeneralFailure, NotImplementedFailure, OpConversionFailure, OpValidationFailure

    failures = (GeneralFailure, NotImplementedFailure, OpConversionFailure, OpValidationFailure, RuntimeError)
    try:
        openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)
    except failures as error:  # an operator that it does not know, or a shape that it does not see
        raise UnsupportedError(
            f"graph {source}", got=f"OpenVINO's converter says: {error}", expected="a graph that it converts",
            fix="use the ONNX graph itself",
        ) from error  # fmt: skip
    return str(openvino.__version__).split("-")[0]


def _judged(file: Path, reference: OnnxGraph, checkpoint: Checkpoint, budget: PrecisionSlice) -> Quality:
    import numpy as np

    from runtime.encoding.encoder import Encoder
    from runtime.encoding.executor.openvino import OpenVinoExecutor

    _, held_out = calibration_and_held_out(budget)
    requests = sample_requests(checkpoint, held_out)
    executor = OpenVinoExecutor(file, threads=os.cpu_count() or 1, bfloat16=False)
    found = np.concatenate(Encoder(executor, 1024, checkpoint.max_length).run(requests))
    expected = graph_outputs(reference.file_path, requests, checkpoint)
    return measure(expected, found, checkpoint.task, executor.description)
