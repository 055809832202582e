"""A load test of a spec's service: texts, plan, report files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from builders import corpus
from builders.errors import InputError
from builders.spec import DeploymentSpec
from loadtest.report import LoadReport, render_html
from loadtest.run import LoadPlan, Progress, run_load

DOCSTRINGS = 2000


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
    texts: Path | None = None


def measure(
    spec: DeploymentSpec, request: LoadRequest, output: Path, on_progress: Callable[[Progress], None]
) -> LoadReport:
    """Runs the load and writes `output` (JSON) and the page beside it."""
    require_json_name(output)
    with tempfile.TemporaryDirectory(prefix="trireme-texts-") as folder:
        texts = request.texts or _docstrings(Path(folder))
        report = run_load(_plan(spec, request, texts), spec_name=spec.name, on_progress=on_progress)
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


def _plan(spec: DeploymentSpec, request: LoadRequest, texts: Path) -> LoadPlan:
    try:
        return LoadPlan(
            model=spec.name,
            texts_file=texts,
            grpc_address=request.grpc,
            http_address=request.http,
            metrics_address=request.metrics,
            protocol=request.protocol,
            shape=request.shape,
            users=request.users,
            duration_s=request.duration_s,
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise InputError(
            f"load test: {fault['loc'][0]}", got=repr(fault["input"]), expected=fault["msg"], fix="correct the option"
        ) from error


def _docstrings(folder: Path) -> Path:
    """Texts that neither calibrated nor judged the model come last in the corpus; load takes a mix of all."""
    file = folder / "docstrings.txt"
    file.write_text("\n".join(corpus.texts(None, DOCSTRINGS)) + "\n", encoding="utf-8")
    return file
