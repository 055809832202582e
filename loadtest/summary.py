"""The report as a few lines for a terminal."""

from __future__ import annotations

from loadtest.figures import Distribution, Figures, StreamFigures, knee_of
from loadtest.report import LoadReport
from loadtest.server import UNKNOWN


def render(report: LoadReport) -> str:
    lines = [*_heading(report), *figures_lines(report.figures)]
    lines += _server(report) + _processor(report) + _steps(report)
    return "\n".join(lines + [f"  note: {note}" for note in report.notes])


def figures_lines(seen: Figures) -> list[str]:
    lines = _encoder(seen) if seen.stream is None else _generator(seen, seen.stream)
    lines.append(
        f"  errors      {seen.failed} of {seen.ended}"
        + "".join(f"   {kind} {count}" for kind, count in seen.errors.items())
    )
    if seen.stream is not None and seen.stream.cancelled:
        lines.append(f"  cancelled   {seen.stream.cancelled} by their clients, as asked")
    if seen.tokens_per_text is not None:
        cut = f"   truncated {seen.truncated_share:.1%}" if seen.truncated_share is not None else ""
        lines.append(f"  tokens      {seen.tokens_per_text:.4g} a text{cut}")
    return lines


def _heading(report: LoadReport) -> list[str]:
    load, identity = report.load, report.identity
    what = f"{load.texts_per_request} text(s) a request" if load.stream is None else str(load.stream)
    return [
        f"{identity.model} version {identity.version} ({identity.precision}), weights {identity.digest[:16]}",
        f"{load.level(load.users)}, {load.protocol}, {load.shape}, {load.duration_s} s after {load.warm_up_s} s of "
        f"warm-up, {what}",
    ]


def _encoder(seen: Figures) -> list[str]:
    return [
        f"  throughput  {seen.texts_per_s:9.4g} texts/s   {seen.requests_per_s:.4g} requests/s",
        f"  latency     {_latency(seen)}",
    ]


def _generator(seen: Figures, stream: StreamFigures) -> list[str]:
    grouped = "" if stream.tokens_per_response is None else f"   {stream.tokens_per_response:.3g} tokens a response"
    return [
        f"  output      {stream.output_tokens_per_s:9.4g} tokens/s   {seen.requests_per_s:.4g} requests/s   "
        f"prompts {stream.prompt_tokens_per_s:.4g} tokens/s",
        f"  first token {_spread(stream.first_token)}",
        f"  gaps        {_spread(stream.gap)}{grouped}",
        f"  largest gap {_spread(stream.largest_gap)}",
        f"  a token     {_spread(stream.per_token)}",
        f"  whole       {_latency(seen)}",
    ]


def _latency(seen: Figures) -> str:
    return f"p50 {_ms(seen.p50_ms)}   p95 {_ms(seen.p95_ms)}   p99 {_ms(seen.p99_ms)}   max {_ms(seen.max_ms)}"


def _spread(seen: Distribution) -> str:
    return f"p50 {_ms(seen.p50_ms)}   p90 {_ms(seen.p90_ms)}   p99 {_ms(seen.p99_ms)}   max {_ms(seen.max_ms)}"


def _server(report: LoadReport) -> list[str]:
    inside = report.generator
    if inside is not None:
        reused = inside.reused_tokens / max(1, inside.prompt_tokens)
        per_step = "-" if inside.tokens_per_step is None else f"{inside.tokens_per_step:.3g}"
        return [
            f"  in Triton   {per_step} tokens a step of {_ms(inside.step_ms)}, the model {_ms(inside.executor_ms)}   "
            f"first token {_ms(inside.first_token_ms)}",
            f"              gaps {_ms(inside.gap_ms)}   {reused:.0%} of prompt tokens from the cache",
        ]
    lines = []
    for model in report.models:
        batch = "" if model.mean_batch is None else f"   mean batch {model.mean_batch:.3g} in {_ms(model.compute_ms)}"
        lines.append(f"  in Triton   {model.model}: {_ms(model.request_ms)}   queue {_ms(model.queue_ms)}{batch}")
    return lines


def _processor(report: LoadReport) -> list[str]:
    seen, cores = report.processor, report.machine.cores
    late = "" if seen.client_late_p99_ms is None else f", late by p99 {_ms(seen.client_late_p99_ms)}"
    server = UNKNOWN if seen.server_share is None else f"{seen.server_share * cores:.2f} of {cores} cores"
    return [f"  CPU         client {seen.client_cores:.2f} cores{late}   server {server}"]


def _steps(report: LoadReport) -> list[str]:
    if not report.steps:
        return []
    lines = []
    for step in report.steps:
        stream, p95 = step.figures.stream, step.figures.p95_ms
        unit = "texts/s" if stream is None else "tokens/s"
        shown = f"p95 {_ms(p95)}" if stream is None else f"first token p99 {_ms(stream.first_token.p99_ms)}"
        lines.append(f"  {report.load.level(step.users):>14}  {step.figures.throughput_per_s:9.4g} {unit}   {shown}")
    knee = knee_of(report.steps)
    lines.append(f"  knee at {report.load.level(knee.users)}" if knee else "  no knee: nothing was answered")
    return lines


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ms"
