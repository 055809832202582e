"""Commands that end in files: the whole way, and each stage alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from builders.commands.options import DEFAULT_BUILD, BuildDir, JsonFlag, PlatformOption, SpecArgument, status

if TYPE_CHECKING:
    from builders.artifacts import Checkpoint, OnnxGraph


def build(
    spec: SpecArgument,
    platform: PlatformOption = "cpu",
    until: Annotated[
        Literal[
            "checkpoint", "compress", "precision", "export", "quantize", "partition", "qualify", "engine", "repository"
        ],
        typer.Option(help="stop after this stage"),
    ] = "repository",
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """The whole way to a Triton model repository. What has not changed is not built again."""
    from builders import pipeline
    from builders.commands import show
    from builders.commands.championed import load_championed

    with show.build_progress(quiet=as_json) as report:
        built = pipeline.build(load_championed(spec, build_dir), platform, build_dir, until, report)
    if as_json:
        print(json.dumps(show.build_json(built), indent=2))
    else:
        show.print_build(built)


def export(
    model: Annotated[str, typer.Argument(help="packaged:all-MiniLM-L6-v2, a folder, or a Hugging Face id")],
    output: Annotated[Path, typer.Option("-o", "--output", help="ONNX file to write")],
    task: Annotated[
        Literal["embedding", "classification", "reranking", "generation", "seq2seq"], typer.Option()
    ] = "embedding",
    precision: Annotated[Literal["fp32", "fp16"], typer.Option()] = "fp32",
    pooling: Annotated[
        Literal["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean"] | None,
        typer.Option(help="default: the checkpoint's own"),
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="tokens")] = 256,
    as_json: JsonFlag = False,
) -> None:
    """One checkpoint to one checked ONNX graph; OUTPUT.json beside it says what it is.

    Of an encoder-decoder, OUTPUT is the decoder, and OUTPUT with `.encoder` before its suffix the encoder.
    """
    from builders.pipeline import one_file
    from builders.spec import ModelSlice

    with status(f"export {model} to {precision}", as_json):
        found = ModelSlice(source=model, task=task, pooling=pooling, max_length=max_length)
        graph, checkpoint = one_file.export(found, precision, output)
    _print_graph(output, graph, as_json, checkpoint)


def quantize(
    graph: Annotated[Path, typer.Argument(help="ONNX file written by `trireme export`, fp32 or fp16")],
    output: Annotated[Path, typer.Option("-o", "--output", help="ONNX file to write")],
    scheme: Annotated[
        Literal["int8", "dynamic_int8", "fp8", "w8", "w4"] | None,
        typer.Option(
            help="encoders: int8 (default), dynamic_int8 for ONNX Runtime, fp8 for GPUs; weights alone: w8 (language "
            "models' default), w4"
        ),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 file, one text a line")] = None,
    min_mean_cosine: Annotated[float, typer.Option(min=0, max=1, help="encoders")] = 0.998,
    min_worst_cosine: Annotated[float, typer.Option(min=0, max=1, help="encoders")] = 0.98,
    max_logit_error: Annotated[float, typer.Option(min=0, help="classification, reranking: of the spread")] = 0.2,
    max_perplexity_ratio: Annotated[float, typer.Option(min=1, help="w8, w4")] = 1.03,
    as_json: JsonFlag = False,
) -> None:
    """One graph to INT8 or FP8, or to weights in 8 or 4 bits; refused when it misses the quality budget."""
    from builders.pipeline import one_file
    from builders.spec import PrecisionSlice

    budget = PrecisionSlice(
        min_mean_cosine=min_mean_cosine,
        min_worst_cosine=min_worst_cosine,
        max_logit_error=max_logit_error,
        max_perplexity_ratio=max_perplexity_ratio,
        calibration_texts=calibration,
    )
    with status(f"quantize {graph}", as_json):
        result = one_file.quantize(graph, scheme, budget, output)
    _print_graph(output, result, as_json)


def package(
    graph: Annotated[Path, typer.Argument(help="ONNX file of an encoder, written by `trireme export` or `quantize`")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="file to write, ending in .xml (weights go to .bin), .mnn or .tflite")
    ],
    target: Annotated[Literal["openvino", "mnn", "tflite"], typer.Option(help="whose format")],
    litert_python: Annotated[
        str | None, typer.Option(help="tflite: a Python that has litert-torch, in an environment of its own")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 file, one text a line; its end judges")] = None,
    min_mean_cosine: Annotated[float, typer.Option(min=0, max=1)] = 0.998,
    min_worst_cosine: Annotated[float, typer.Option(min=0, max=1)] = 0.98,
    max_logit_error: Annotated[float, typer.Option(min=0, help="classification, reranking: of the spread")] = 0.2,
    as_json: JsonFlag = False,
) -> None:
    """One graph to files of OpenVINO, MNN or LiteRT, by the maker's converter, judged by the maker's runtime.

    OUTPUT.json has the figures.
    """
    from builders.pipeline import edge
    from builders.spec import PrecisionSlice

    budget = PrecisionSlice(
        min_mean_cosine=min_mean_cosine,
        min_worst_cosine=min_worst_cosine,
        max_logit_error=max_logit_error,
        calibration_texts=calibration,
    )
    with status(f"package {graph} for {target}", as_json):
        record = edge.package(graph, target, budget, output, litert_python)
    if as_json:
        print(record.model_dump_json(indent=2))
        return
    size = sum(file.bytes for file in record.files)
    print(f"{output}: {size / 1e6:.1f} MB with its weights, {record.quality.summary}")


def engine(
    graph: Annotated[Path, typer.Argument(help="ONNX file")],
    output: Annotated[Path, typer.Option("-o", "--output", help="plan file to write")],
    target: Annotated[str, typer.Option(help="streaming-multiprocessor version, such as sm89")],
    flavour: Annotated[Literal["tensorrt", "tensorrt-rtx"], typer.Option()] = "tensorrt-rtx",
    batch: Annotated[str, typer.Option(help="min:opt:max sequences")] = "1:8:32",
    length: Annotated[str, typer.Option(help="min:opt:max tokens")] = "1:64:256",
    as_json: JsonFlag = False,
) -> None:
    """One ONNX file to one TensorRT engine; OUTPUT.json beside it says what it is."""
    from builders.pipeline import one_file

    with status(f"build {target} with {flavour}", as_json):
        record = one_file.engine(graph, flavour, target, batch, length, output)
    if as_json:
        print(record.model_dump_json(indent=2))
    else:
        print(f"{output}: {record.file.bytes / 1e6:.1f} MB, {record.build_seconds} s")


def _print_graph(output: Path, graph: OnnxGraph, as_json: bool, checkpoint: Checkpoint | None = None) -> None:
    before = _before_tokenising(checkpoint)
    if as_json:
        facts = {"file": str(output), "bytes": graph.bytes, "quality": graph.quality.model_dump()}
        print(json.dumps({**facts, **before}))
        return
    print(f"{output}: {graph.bytes / 1e6:.1f} MB, {graph.judged}")
    if before.get("prompt"):
        print(f"the graph takes ids: put {before['prompt']!r} before each text, as the checkpoint's default prompt")
    if before.get("lower_case"):
        print("the graph takes ids: lower-case each text, as the checkpoint's do_lower_case says")


def _before_tokenising(checkpoint: Checkpoint | None) -> dict[str, str | bool]:
    """What a service does to a text, and who uses a graph alone must do."""
    if checkpoint is None:
        return {}
    prompts = checkpoint.prompts
    prompt = prompts.texts.get(prompts.default or "", "") if prompts is not None else ""
    return {"prompt": prompt, "lower_case": checkpoint.lower_case}
