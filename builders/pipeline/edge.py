"""`trireme package`: a checked graph in the format of a runtime for small devices, converted and run by its maker's own
library, and held to the budget of the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from builders.artifacts import Checkpoint, FileRecord, OnnxGraph, Quality
from builders.edge.mnn import MNN
from builders.edge.openvino import OPENVINO
from builders.edge.target import EdgeTarget
from builders.edge.tflite import tflite
from builders.errors import InputError, QualityError
from builders.judging.vectors import (
    calibration_and_held_out,
    graph_outputs,
    measure,
    require_budget,
    sample_requests,
)
from builders.pipeline.one_file import beside, exported, read_recorded
from builders.spec import ModelSlice, PrecisionSlice
from runtime.encoding.encoder import Encoder
from runtime.record import Record

TargetName = Literal["openvino", "mnn", "tflite"]
_LENGTHS = 0.1  # that a vector's length may be off by, relative to fp32's: a cosine does not see it


class PackageRecord(Record):
    """What `OUTPUT.json` holds. `version` is the converter's; the quality names the runtime that judged. `length`: the
    tokens that each text is padded to, one text at a time; None: any batch, of any length."""

    target: str
    version: str
    model: ModelSlice
    source: FileRecord
    files: tuple[FileRecord, ...]
    quality: Quality
    length: int | None = None


def package(
    source: Path, target: TargetName, budget: PrecisionSlice, output: Path, litert_python: str | None = None
) -> PackageRecord:
    """`source`, of `trireme export` or `quantize`, to the files of a target. Quality is that of its runtime on this CPU
    against the graph in fp32, which is exported again where `source` is another.

    Raises InputError for a language model's graph or an output of another suffix, MachineError where the maker's
    library is not here, UnsupportedError with the reason for what it cannot convert, and QualityError over the budget;
    nothing is written then.
    """
    graph, model, checkpoint = read_recorded(source)
    if checkpoint.generation is not None:
        raise InputError(
            f"graph {source}", got=f"a graph of task {checkpoint.task}", expected="an encoder's",
            fix="use `trireme build`; OpenVINO reads its ONNX graphs as they are",
        )  # fmt: skip
    if litert_python is not None and target != "tflite":
        raise InputError(
            "--litert-python", got=f"an interpreter for --target {target}", expected="it for tflite alone",
            fix="remove it",
        )  # fmt: skip
    edge = {"openvino": OPENVINO, "mnn": MNN, "tflite": tflite(litert_python, checkpoint.max_length)}[target]
    if output.suffix != edge.suffix:
        raise InputError(
            "--output", got=str(output), expected=f"a name that ends in {edge.suffix}, as files for {target} do",
            fix=f"use {output.with_suffix(edge.suffix)}",
        )  # fmt: skip
    edge.require_precision(graph)
    files = [*(output.with_suffix(suffix) for suffix in edge.parts), output]  # after what it refers to
    with beside(output) as work, beside(output) as plain:
        version = edge.convert(graph, checkpoint, work / output.name)
        reference = graph if graph.precision == "fp32" else exported(checkpoint, "fp32", plain)
        quality = _judged(edge, work / output.name, reference, checkpoint, budget)
        record = PackageRecord(
            target=target,
            version=version,
            model=model,
            source=FileRecord.of(source),
            files=tuple(FileRecord.of(work / path.name) for path in reversed(files)),
            quality=quality,
            length=edge.length,
        )
        for path in files:
            (work / path.name).replace(path)
    output.with_name(f"{output.name}.json").write_text(record.model_dump_json(indent=2) + "\n")
    return record


def _judged(
    edge: EdgeTarget, file: Path, reference: OnnxGraph, checkpoint: Checkpoint, budget: PrecisionSlice
) -> Quality:
    _, held_out = calibration_and_held_out(budget)
    requests = sample_requests(checkpoint, held_out)
    executor = edge.open(file, checkpoint)
    found = np.concatenate(Encoder(executor, 1024, checkpoint.max_length).run(requests))
    expected = graph_outputs(reference.file_path, requests, checkpoint)
    quality = measure(expected, found, checkpoint.task, executor.description)
    what = f"{edge.name} package of {checkpoint.source}"
    require_budget(quality, budget, what)
    if checkpoint.task == "embedding":
        ratios = np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        if float(np.abs(ratios - 1).max()) > _LENGTHS:
            raise QualityError(
                f"{what}: vectors are {ratios.min():.2f} to {ratios.max():.2f} times as long as those of fp32 "
                f"({executor.description}), within {_LENGTHS:.0%} expected; the converter gets an operator wrong"
            )
    return quality
