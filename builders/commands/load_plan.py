"""A load test of a spec's service: texts, plan, report files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from builders.errors import InputError
from builders.judging import corpus
from builders.spec import DeploymentSpec
from loadtest.drive.run import run_load
from loadtest.drive.stopping import Stop
from loadtest.plan import LoadPlan, RunProgress, ThroughGateway
from loadtest.report.page import render_html
from loadtest.report.record import LoadReport
from loadtest.report.slo import judge
from loadtest.requests.prompts import Lengths, StreamLoad, parse_lengths

DOCSTRINGS = 2000
TIMEOUT_S, GENERATION_TIMEOUT_S = 10.0, 60.0


@dataclass(frozen=True)
class LoadRequest:
    """What the command line asks for; addresses are `host:port`."""

    grpc: str
    http: str
    metrics: str
    protocol: Literal["grpc", "http", "both"] = "grpc"
    shape: Literal["constant", "steps"] = "constant"
    users: int = 16
    duration_s: int = 30
    warm_up_s: int = 5
    texts: Path | None = None
    rate_per_s: float | None = None  # none: closed loop
    texts_per_request: int | None = None  # none: 1; read for encoders alone
    steps: int | None = None  # none: 5; read for the shape `steps` alone
    seed: int = 0
    processes: int = 1
    timeout_s: float | None = None  # none: 10 s, and 60 s for a generator
    prompt_words: str | None = None  # this and the next two are read for generators alone
    output_tokens: str | None = None
    cancel_share: float | None = None
    gateway: str | None = None  # this and the next: of a gateway, where requests go instead of to the server's ports
    gateway_grpc: str | None = None
    api_key_file: Path | None = None


def measure(
    spec: DeploymentSpec,
    request: LoadRequest,
    output: Path,
    on_progress: Callable[[RunProgress], None],
    stop: Stop | None = None,
) -> LoadReport:
    """Runs the load, holds it to the spec's limits, and writes `output` (JSON) and the page beside it."""
    require_json_name(output)
    with tempfile.TemporaryDirectory(prefix="trireme-texts-") as folder:
        texts = request.texts or _docstrings(Path(folder))
        report = run_load(plan_of(spec, request, texts), spec_name=spec.name, on_progress=on_progress, stop=stop)
    report = report.model_copy(update={"slo": judge(report, spec.slo)})
    report.save(output)
    output.with_suffix(".html").write_text(render_html(report), encoding="utf-8")
    return report


def require_json_name(output: Path) -> None:
    """Before the run, because it would be a pity to find out after it."""
    if output.suffix != ".json" or not output.parent.is_dir():
        raise InputError(
            f"output {output}",
            got="no such folder" if output.suffix == ".json" else f"the ending {output.suffix!r}",
            expected="FILE.json in a folder that exists; FILE.html is written beside it",
            fix="choose such a name",
        )


def _require_read_options(spec: DeploymentSpec, request: LoadRequest) -> None:
    """An option that this load does not read must not look as if it did something."""
    ramp, streams, texts = "--shape steps", "a model that streams text", "an encoder; prompts are sent one by one"
    for option, value, read, expected in (
        ("--steps", request.steps, request.shape == "steps", ramp),
        ("--texts-per-request", request.texts_per_request, not spec.generates, texts),
        ("--prompt-words", request.prompt_words, spec.generates, streams),
        ("--output-tokens", request.output_tokens, spec.generates, streams),
        ("--cancel-share", request.cancel_share, spec.generates, streams),
    ):
        if value is not None and not read:
            given = f"--shape {request.shape}" if expected == ramp else f"model.task={spec.model.task}"
            got, fix = f"{value}, which says nothing with {given}", f"leave {option} out, or use it with {expected}"
            raise InputError(option, got=got, expected=expected, fix=fix)


def plan_of(spec: DeploymentSpec, request: LoadRequest, texts: Path) -> LoadPlan:
    _require_read_options(spec, request)
    given = {"steps": request.steps, "texts_per_request": request.texts_per_request}
    try:
        return LoadPlan(
            model=spec.name,
            texts_file=texts,
            grpc_address=request.grpc,
            http_address=request.http,
            metrics_address=request.metrics,
            gateway=_door(request),
            protocol=request.protocol,
            shape=request.shape,
            users=request.users,
            duration_s=request.duration_s,
            warm_up_s=request.warm_up_s,
            rate_per_s=request.rate_per_s,
            request_timeout_s=request.timeout_s or (GENERATION_TIMEOUT_S if spec.generates else TIMEOUT_S),
            stream=_stream_load(spec, request),
            seed=request.seed,
            processes=request.processes,
            **{name: value for name, value in given.items() if value is not None},
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise InputError(
            f"load test: {fault['loc'][0]}", got=repr(fault["input"]), expected=fault["msg"], fix="correct the option"
        ) from error


def _door(request: LoadRequest) -> ThroughGateway | None:
    if request.gateway is not None or request.gateway_grpc is not None:
        return ThroughGateway(
            http_address=request.gateway, grpc_address=request.gateway_grpc, key_file=request.api_key_file
        )  # fmt: skip
    if request.api_key_file is not None:
        raise InputError(
            "--api-key-file", got="no gateway, and Triton's own ports ask for no key", expected="a gateway that does",
            fix="give --gateway or --gateway-grpc as well, or leave it out",
        )  # fmt: skip
    return None


def _stream_load(spec: DeploymentSpec, request: LoadRequest) -> StreamLoad | None:
    """By default, what fits the model: docstrings cut to a length, a user's own texts as they are."""
    if not spec.generates:
        return None
    tokens, words = min(128, spec.model.max_length // 4), min(128, spec.model.max_length // 16)  # 12 tokens a word fit
    by_default = None if request.texts else Lengths(low=max(1, words // 8), high=words)
    return StreamLoad(
        prompt_words=parse_lengths(request.prompt_words, "--prompt-words") if request.prompt_words else by_default,
        output_tokens=parse_lengths(request.output_tokens, "--output-tokens")
        if request.output_tokens
        else Lengths(low=max(1, tokens // 4), high=tokens),
        cancel_share=request.cancel_share or 0.0,
    )


def _docstrings(folder: Path) -> Path:
    """Texts that neither calibrated nor judged the model come last in the corpus; load takes a mix of all."""
    file = folder / "docstrings.txt"
    file.write_text("\n".join(corpus.texts(None, DOCSTRINGS)) + "\n", encoding="utf-8")
    return file
