"""The CLI `trireme`: parse, call, print. The only place that turns errors into exit codes.

Exit codes: 0 done; 1 a check failed, with the figures; 2 the user's input is wrong, with what to do.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from builders.errors import InputError, TriremeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a transformer checkpoint to a Triton deployment, each step checked by numbers.",
)

PlatformName = Literal["cpu", "gpu"]
SpecArgument = Annotated[str, typer.Argument(help="spec file, or the name of a preset (minilm)")]
BuildDir = Annotated[Path, typer.Option(help="where all output goes")]
PlatformOption = Annotated[PlatformName, typer.Option(help="cpu: OpenVINO or ONNX Runtime; gpu: TensorRT engines")]
JsonFlag = Annotated[bool, typer.Option("--json", help="print the result as JSON, for programs")]
DEFAULT_BUILD = Path("build")


@app.command()
def build(
    spec: SpecArgument,
    platform: PlatformOption = "cpu",
    until: Annotated[
        Literal["checkpoint", "export", "quantize", "qualify", "engine", "repository"],
        typer.Option(help="stop after this stage"),
    ] = "repository",
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """The whole way to a Triton model repository. What has not changed is not built again."""
    from builders import pipeline, present
    from builders.spec import load_spec

    with present.build_progress(quiet=as_json) as report:
        built = pipeline.build(load_spec(spec), platform, build_dir, until, report)
    if as_json:
        print(json.dumps(present.build_json(built), indent=2))
    else:
        present.print_build(built)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="packaged:all-MiniLM-L6-v2, a folder, or a Hugging Face id")],
    output: Annotated[Path, typer.Option("-o", "--output", help="ONNX file to write")],
    task: Annotated[Literal["embedding", "classification", "reranking"], typer.Option()] = "embedding",
    precision: Annotated[Literal["fp32", "fp16"], typer.Option()] = "fp32",
    pooling: Annotated[Literal["mean", "cls"] | None, typer.Option(help="default: the checkpoint's own")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="tokens")] = 256,
    as_json: JsonFlag = False,
) -> None:
    """One checkpoint to one checked ONNX graph; OUTPUT.json beside it says what it is."""
    from builders import single
    from builders.spec import ModelSlice

    with _status(f"export {model} to {precision}", as_json):
        found = ModelSlice(source=model, task=task, pooling=pooling, max_length=max_length)
        graph = single.export(found, precision, output)
    _print_graph(output, graph.quality.worst_cosine, graph.bytes, "the checkpoint", as_json)


@app.command()
def quantize(
    graph: Annotated[Path, typer.Argument(help="ONNX file written by `trireme export`, fp32 or fp16")],
    output: Annotated[Path, typer.Option("-o", "--output", help="ONNX file to write")],
    scheme: Annotated[Literal["int8"], typer.Option()] = "int8",
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 file, one text a line")] = None,
    min_mean_cosine: Annotated[float, typer.Option(min=0, max=1)] = 0.998,
    min_worst_cosine: Annotated[float, typer.Option(min=0, max=1)] = 0.98,
    as_json: JsonFlag = False,
) -> None:
    """One graph to INT8 with explicit QDQ, refused when it misses the quality budget."""
    from builders import single
    from builders.spec import PrecisionSlice

    budget = PrecisionSlice(
        min_mean_cosine=min_mean_cosine, min_worst_cosine=min_worst_cosine, calibration_texts=calibration
    )
    with _status(f"quantize {graph} to {scheme}", as_json):
        result = single.quantize(graph, budget, output)
    _print_graph(output, result.quality.worst_cosine, result.bytes, str(graph), as_json)


@app.command()
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
    from builders import single

    with _status(f"build {target} with {flavour}", as_json):
        record = single.engine(graph, flavour, target, batch, length, output)
    if as_json:
        print(record.model_dump_json(indent=2))
    else:
        print(f"{output}: {record.file.bytes / 1e6:.1f} MB, {record.build_seconds} s")


@app.command()
def shard(
    graph: Annotated[Path, typer.Argument(help="ONNX file of a transformer, from any exporter")],
    output: Annotated[Path, typer.Option("-o", "--output", help="new folder for stage{s}.rank{r}.onnx")],
    tensor_parallel: Annotated[int, typer.Option(min=1, help="ranks that share each layer")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="stages that follow each other")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Shares a graph out to ranks. `trireme verify` then proves the ranks equal to the whole."""
    from builders import present
    from builders.partition.shard import partition_graph

    with _status(f"shard {graph} for {tensor_parallel} x {pipeline_parallel} ranks", as_json):
        partition = partition_graph(graph, tensor_parallel, pipeline_parallel, output)
    print(partition.model_dump_json(indent=2) if as_json else present.partition_text(partition))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="folder that `trireme shard` wrote")],
    against: Annotated[Path, typer.Option(help="the graph that was sharded")],
    as_json: JsonFlag = False,
) -> None:
    """Runs every rank as a process on this CPU and compares with the whole graph. Exit 1 on any doubt."""
    from builders import present
    from builders.partition.verify import verify_partition

    with _status(f"run the ranks of {directory}", as_json):
        found = verify_partition(directory, against)
    print(found.model_dump_json(indent=2) if as_json else present.verify_text(found))


@app.command()
def serve(
    spec: SpecArgument,
    build_dir: BuildDir = DEFAULT_BUILD,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8002,
    ready_timeout_s: Annotated[float, typer.Option(min=1)] = 120,
    as_json: JsonFlag = False,
) -> None:
    """Builds what is missing and serves it on loopback. Ctrl-C or SIGTERM drains."""
    from builders import pipeline, present
    from builders.spec import load_spec
    from runtime.serve import serve_repository
    from runtime.triton import Ports

    with present.build_progress(quiet=as_json) as report:
        built = pipeline.build(load_spec(spec), "cpu", build_dir, "repository", report)
    assert built.entry is not None
    free = Ports.free()
    ports = Ports(http_port or free.http, grpc_port or free.grpc, metrics_port or free.metrics)
    serve_repository(built.entry.repository, ports, ready_timeout_s, as_json)


@app.command()
def loadtest(
    spec: SpecArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="report to write: FILE.json, and FILE.html beside it")],
    grpc: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8001",
    http: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8000",
    metrics: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8002",
    protocol: Annotated[Literal["grpc", "http", "both"], typer.Option()] = "grpc",
    users: Annotated[int, typer.Option(min=1)] = 16,
    duration_s: Annotated[int, typer.Option(min=3)] = 30,
    shape: Annotated[Literal["constant", "steps"], typer.Option(help="steps: a ramp that finds the knee")] = "constant",
    texts: Annotated[Path | None, typer.Option(help="UTF-8, one text a line; default: docstrings")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures a running service with Locust. Exit 1 when the spec's SLO is missed."""
    from builders import present
    from builders.load import LoadRequest, measure, require_json_name
    from builders.spec import load_spec
    from loadtest.report import check_slo, render_text

    found = load_spec(spec)
    require_json_name(output)
    request = LoadRequest(grpc, http, metrics, protocol, shape, users, duration_s, texts)
    with present.load_progress(quiet=as_json) as progress:
        report = measure(found, request, output, progress)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print(f"{render_text(report)}\nreport: {output.with_suffix('.html')}")
    missed = check_slo(report, found.slo)
    if missed:
        _fail("the SLO is missed. " + " ".join(missed), 1)


@app.command()
def report(
    current: Annotated[Path, typer.Argument(help="report A.json")],
    baseline: Annotated[Path | None, typer.Argument(help="report B.json to compare with")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="HTML file to write")] = None,
) -> None:
    """Draws a load report, or compares two."""
    from loadtest.report import read_report, render_html, render_text

    found = read_report(current)
    other = read_report(baseline) if baseline else None
    target = output or current.with_suffix(".html")
    if target.suffix != ".html":
        raise InputError("--output", got=target, expected="a file that ends in .html", fix="choose such a name")
    target.write_text(render_html(found, other), encoding="utf-8")
    print(f"{render_text(found)}\nreport: {target}")


def _status(message: str, quiet: bool):  # type: ignore[no-untyped-def]  # rich is imported late
    from rich.console import Console

    return Console(stderr=True, quiet=quiet).status(message)


def _print_graph(output: Path, worst_cosine: float, size: int, reference: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": str(output), "bytes": size, "worst_cosine": worst_cosine}))
    else:
        print(f"{output}: {size / 1e6:.1f} MB, worst cosine to {reference} {worst_cosine:.6f}")


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def run(command: Callable[[], object]) -> None:
    """Runs a command and turns errors into exit codes. Anything else is a fault of ours, and shows its stack.

    SIGTERM ends a command as Ctrl-C does, so that whatever it started is stopped; `serve` drains instead.
    """
    from loadtest.errors import LoadTestError
    from runtime.errors import ServingError

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        command()
    except (TriremeError, ServingError, LoadTestError) as error:
        _fail(str(error), error.exit_code)
    except OSError as error:  # a path of the user's that cannot be read or written
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", InputError.exit_code)


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
