"""Commands about a running service: start it, measure it, draw what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from runtime.server.gateway_process import FeedbackOptions

from builders.commands.options import DEFAULT_BUILD, BuildDir, JsonFlag, SpecArgument, fail
from builders.errors import InputError


def serve(
    spec: SpecArgument,
    build_dir: BuildDir = DEFAULT_BUILD,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8002,
    gateway_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="OpenAI's API and KServe's over a gateway that may face a network; 0: any"),
    ] = None,
    gateway_address: Annotated[
        str, typer.Option(help="where the gateway listens; others than loopback ask for keys")
    ] = ("127.0.0.1"),
    api_keys_file: Annotated[Path | None, typer.Option(help="of the gateway: name:sha256 a line")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="the gateway answers anybody on any address")] = False,
    gateway_grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="of the gateway: KServe over gRPC as well; 0: any")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="of the gateway, both ports: certificate chain in PEM")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its key, in PEM")] = None,
    control_secret_file: Annotated[
        Path | None, typer.Option(help="of the gateway: opens /control/versions to who sends what is in it")
    ] = None,
    model_control: Annotated[
        bool,
        typer.Option(
            "--model-control",
            help="who sends the control secret may load versions; Triton takes it as an argument, which every user of "
            "this machine can read",
        ),
    ] = False,
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics", help="of the gateway: a generator's figures under vLLM's names as well")
    ] = False,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(help="of the gateway: a span for each request goes to this collector, by OTLP over HTTP"),
    ] = None,
    feedback_database: Annotated[
        str | None,
        typer.Option(
            help="of the gateway: POST /v1/feedback goes there; sqlite:////path/to/feedback.db, postgresql://…"
        ),
    ] = None,
    sample_share: Annotated[
        float, typer.Option(min=0, max=1, help="of answers whose texts go into that database as well")
    ] = 0.0,
    sample_redact: Annotated[
        str | None, typer.Option(help="module:function; what it makes of a text is kept instead")
    ] = None,
    ready_timeout_s: Annotated[float, typer.Option(min=1)] = 120,
    as_json: JsonFlag = False,
) -> None:
    """Builds what is missing and serves it on loopback. Ctrl-C or SIGTERM drains."""
    from builders import pipeline
    from builders.commands import show
    from builders.commands.championed import load_championed
    from runtime.secrets_file import read_secret
    from runtime.server.gateway_process import Doorway
    from runtime.server.launch import Exposure, Ports
    from runtime.server.serve import serve_repository

    asked: dict[str, Any] = {
        "grpc_port": gateway_grpc_port, "keys_file": api_keys_file, "no_auth": no_auth, "tls_cert": tls_cert,
        "tls_key": tls_key, "control_secret_file": control_secret_file, "vllm_metrics": vllm_metrics,
        "otlp_endpoint": otlp_endpoint,
        "feedback": _feedback(feedback_database, sample_share, sample_redact),
    }  # fmt: skip
    doorway = None
    if gateway_port is not None:
        doorway = Doorway(gateway_port, gateway_address, **asked)
        doorway.require_closed()
    elif any(value not in (None, False) for value in asked.values()):
        raise InputError(
            "--gateway-grpc-port, --api-keys-file, --no-auth, --tls-cert, --tls-key, --control-secret-file, "
            "--vllm-metrics, --otlp-endpoint, --feedback-database",
            got="no --gateway-port", expected="a gateway, which these are about", fix="give --gateway-port",
        )  # fmt: skip
    if model_control and control_secret_file is None:
        raise InputError(
            "--model-control", got="no --control-secret-file", expected="the secret that opens it",
            fix="give --control-secret-file",
        )  # fmt: skip
    secret = read_secret(control_secret_file) if model_control and control_secret_file is not None else None
    found = load_championed(spec, build_dir, alone=not model_control)
    with show.build_progress(quiet=as_json) as report:
        built = pipeline.build(found, "cpu", build_dir, "repository", report)
    assert built.entry is not None
    free = Ports.free()
    ports = Ports(http_port or free.http, grpc_port or free.grpc, metrics_port or free.metrics)
    exposure = Exposure(control_secret=secret)
    serve_repository(built.entry.repository, ports, ready_timeout_s, as_json, exposure, doorway=doorway)


def _feedback(database: str | None, share: float, redact: str | None) -> FeedbackOptions | None:
    """Raises InputError for samples without a database."""
    from runtime.server.gateway_process import FeedbackOptions

    if database is not None:
        return FeedbackOptions("online.doorway", database, share, redact)
    if share or redact is not None:
        raise InputError(
            "--sample-share, --sample-redact", got="no --feedback-database", expected="where samples go",
            fix="give --feedback-database",
        )  # fmt: skip
    return None


def loadtest(
    spec: SpecArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="report to write: FILE.json, and FILE.html beside it")],
    grpc: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8001",
    http: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8000",
    metrics: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8002",
    gateway: Annotated[
        str | None, typer.Option(help="host:port; requests over HTTP go there, and Triton's ports are asked for counts")
    ] = None,
    gateway_grpc: Annotated[str | None, typer.Option(help="host:port; the same for gRPC")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="holds the key that the gateway asks for")] = None,
    protocol: Annotated[Literal["grpc", "http", "both"], typer.Option()] = "grpc",
    users: Annotated[int, typer.Option(min=1)] = 16,
    duration_s: Annotated[int, typer.Option(min=3)] = 30,
    warm_up_s: Annotated[int, typer.Option(min=0, help="does not count")] = 5,
    shape: Annotated[Literal["constant", "steps"], typer.Option(help="steps: a ramp that finds the knee")] = "constant",
    steps: Annotated[
        int | None, typer.Option(min=2, max=50, help="of the ramp, each for 5 s or more; default: 5")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="requests/s, started whatever the answers do; default: users wait")
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option(min=0.1, help="of a whole answer; default: 10, a generator's 60")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="UTF-8, one text a line; default: docstrings")] = None,
    texts_per_request: Annotated[int | None, typer.Option(min=1, help="encoders; default: 1")] = None,
    seed: Annotated[int, typer.Option(help="the same seed draws the same texts, lengths and moments")] = 0,
    processes: Annotated[
        int,
        typer.Option(min=1, help="load generators, which share the users; more where one core cannot make the load"),
    ] = 1,
    prompt_words: Annotated[str | None, typer.Option(help="generators: 64, or 16-128; default: what fits")] = None,
    output_tokens: Annotated[str | None, typer.Option(help="generators: 64, or 16-128; default: what fits")] = None,
    cancel_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="generators: of requests that their client leaves early")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures a running service with Locust. Exit 1 when the spec's SLO is missed, or the test was stopped: Ctrl-C and
    SIGTERM end it early, with a report of what was measured.
    """
    from builders.commands import show
    from builders.commands.load_plan import LoadRequest, measure, require_json_name
    from builders.spec import load_spec
    from loadtest.drive.stopping import Stop
    from loadtest.report.summary import render_text

    found = load_spec(spec)
    require_json_name(output)
    request = LoadRequest(
        grpc=grpc, http=http, metrics=metrics, protocol=protocol, shape=shape, users=users, duration_s=duration_s,
        warm_up_s=warm_up_s, texts=texts, rate_per_s=rate, timeout_s=timeout_s, prompt_words=prompt_words,
        output_tokens=output_tokens, cancel_share=cancel_share, texts_per_request=texts_per_request, steps=steps,
        seed=seed, processes=processes, gateway=gateway, gateway_grpc=gateway_grpc, api_key_file=api_key_file,
    )  # fmt: skip
    with Stop() as stop, show.load_progress(quiet=as_json) as progress:
        report = measure(found, request, output, progress, stop)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print(f"{render_text(report)}\nreport: {output.with_suffix('.html')}")
    faults = []
    if report.stopped is not None:
        measured, planned = report.stopped.measured_s, report.stopped.planned_s
        faults.append(f"the load test was stopped: the report is of {measured} of {planned} s")
    missed = [one.said for one in report.slo or () if not one.met]
    if missed:
        faults.append("the SLO is missed. " + " ".join(missed))
    if faults:
        fail("; ".join(faults), 1)


def report(
    current: Annotated[Path, typer.Argument(help="report A.json")],
    baseline: Annotated[Path | None, typer.Argument(help="report B.json to compare with")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="HTML file to write; default: A.html, or A-vs-B.html")
    ] = None,
) -> None:
    """Draws a load report, or compares two: A with B, which is the baseline."""
    from loadtest.report.page import render_html
    from loadtest.report.record import read_report
    from loadtest.report.summary import render_comparison, render_text

    found = read_report(current)
    other = read_report(baseline) if baseline else None
    name = current.stem if baseline is None else f"{current.stem}-vs-{baseline.stem}"
    target = output or current.with_name(f"{name}.html")
    if target.suffix != ".html":
        raise InputError("--output", got=target, expected="a file that ends in .html", fix="choose such a name")
    target.write_text(render_html(found, other), encoding="utf-8")
    shown = render_text(found) if other is None else render_comparison(found, other)
    print(f"{shown}\nreport: {target}")
