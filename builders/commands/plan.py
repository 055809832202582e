"""`trireme plan`: how many GPUs a spec needs, and how they share the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from builders.commands.options import JsonFlag, SpecArgument
from builders.errors import CheckError, InputError

if TYPE_CHECKING:
    from builders.planning.gpus import Gpu
    from builders.planning.plan import Candidate, ExpectedLoad
    from builders.planning.report import PlanReport
    from builders.spec import DeploymentSpec

_WEIGHT_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "fp8": 8, "w8": 8, "w4": 4.5}  # w4: and an fp16 scale for 32 weights


def plan(
    spec: SpecArgument,
    gpu: Annotated[
        list[str] | None, typer.Option(help="GPU type, several times if need be; default: every one")
    ] = None,
    max_gpus: Annotated[int, typer.Option(min=1, max=64, help="of one type, all replicas together")] = 8,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="at one time; default: generation.slots, or serving.max_batch_size")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="default: what model.max_length leaves")] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="decoders only; default: generation.default_max_tokens")
    ] = None,
    max_first_token_ms: Annotated[
        float | None, typer.Option(min=0, help="encoders: the whole answer; default: slo.p95_latency_ms of an encoder")
    ] = None,
    max_between_tokens_ms: Annotated[float | None, typer.Option(min=0, help="decoders only")] = None,
    min_tokens_per_s: Annotated[
        float | None, typer.Option(min=0, help="of all replicas; read by an encoder, made by a decoder")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="HTML file with the partition maps")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Memory, traffic and time for each layout on each GPU: arithmetic, no download of weights, no GPU.

    Exit 1 when no layout does on any of the GPU types.
    """
    from builders.checkpoint import load_config
    from builders.pipeline.compress import planned
    from builders.planning.report import report_page, report_plan
    from builders.planning.transformer import model_from_config
    from builders.spec import load_spec

    if output is not None and output.suffix != ".html":
        raise InputError("--output", got=output, expected="a file that ends in .html", fix="choose such a name")
    found = load_spec(spec)
    gpus = _gpus(gpu or [])
    config = load_config(found.model)
    model = model_from_config(config, weight_bits=_WEIGHT_BITS[found.precision.gpu])
    sizes, not_counted = planned(found, config)
    model = model.model_copy(update=sizes)
    load = _load(
        found,
        model.generates,
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_first_token_ms=max_first_token_ms,
        max_between_tokens_ms=max_between_tokens_ms,
        min_tokens_per_s=min_tokens_per_s,
    )
    result = report_plan(found.name, model, gpus, load, max_gpus, not_counted)
    if output is not None:
        output.write_text(report_page(result), encoding="utf-8")
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        _print(result, output)
    if not any(choice.best for choice in result.choices):
        raise CheckError(f"no layout of up to {max_gpus} GPUs does; the nearest: {'; '.join(_misses(result))}")


def _gpus(names: list[str]) -> tuple[Gpu, ...]:
    from builders.planning.gpus import GPUS

    known = {name.lower(): each for name, each in GPUS.items()}
    unknown = [name for name in names if name.lower() not in known]
    if unknown:
        raise InputError(
            f"--gpu {unknown[0]}", got="a GPU type without figures", expected=", ".join(GPUS), fix="choose one of these"
        )
    return tuple(known[name.lower()] for name in dict.fromkeys(names)) or tuple(GPUS.values())


def _load(spec: DeploymentSpec, generates: bool, **given: Any) -> ExpectedLoad:
    """What is not given comes from the spec."""
    from builders.planning.plan import ExpectedLoad

    for key in ("output_tokens", "max_between_tokens_ms"):
        if given[key] is not None and not generates:
            option = f"--{key.replace('_', '-')}"
            raise InputError(
                option, got=str(given[key]), expected="a decoder; this model is an encoder", fix="leave it out"
            )
    made = (given["output_tokens"] or spec.generation.default_max_tokens) if generates else 0
    given["output_tokens"] = made
    given["prompt_tokens"] = given["prompt_tokens"] or max(spec.model.max_length - made, 1)
    given["sequences"] = given["sequences"] or (spec.generation.slots if generates else spec.serving.max_batch_size)
    if given["max_first_token_ms"] is None and not generates:
        given["max_first_token_ms"] = spec.slo.p95_latency_ms
    return ExpectedLoad(**given)


def _print(result: PlanReport, output: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from builders.planning.report import layout_rows

    console = Console()
    console.print(f"{result.name}: {result.summary}", highlight=False)
    table = Table()
    for heading in result.heads:
        table.add_column(heading, justify="left" if heading in ("GPU", "layout", "verdict") else "right")
    for row in layout_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print("a roofline at fractions of the peaks: compare with it, then measure", style="dim")
    if output is not None:
        console.print(f"map: {output}", highlight=False, soft_wrap=True)


def _misses(result: PlanReport) -> list[str]:
    return [f"{choice.gpu.name}: {_reason(choice.nearest)}" for choice in result.choices]


def _reason(found: Candidate) -> str:
    return f"{found.gpus} x ({found.tensor} x {found.pipeline}): {found.reasons[0]}"
