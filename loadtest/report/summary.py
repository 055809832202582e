"""The report as a few lines for a terminal."""

from __future__ import annotations

from loadtest.report.record import LoadReport
from loadtest.report.rows import few_of, lines_of, number, pair_rows, span
from loadtest.seen.figures import Distribution, Figures, StreamFigures, WithFailures, knee_of
from loadtest.seen.proof import proof_text
from loadtest.seen.server import UNKNOWN


def render_text(report: LoadReport) -> str:
    lines = [*_heading(report), *figures_lines(report.figures)]
    lines += _ledger(report) + _server(report) + _processor(report) + _steps(report) + _slo(report)
    return "\n".join(lines + [f"  note: {note}" for note in report.notes])


def render_comparison(report: LoadReport, baseline: LoadReport) -> str:
    """Both runs, and each figure of both with its 95 % interval."""
    lines = ["now:", *_heading(report), "baseline:", *_heading(baseline)]
    table = [("", "now", "", "baseline", "", "ratio", "")]
    for row in pair_rows(report, baseline):
        label = f"{row.label}{', ' if row.line.unit else ''}{row.line.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        now, before = ((number(row.value), span(row.interval)), (number(row.baseline), span(row.baseline_interval)))
        table.append((label, *now, *before, ratio, row.verdict))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for label, *cells, verdict in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
        lines.append(f"  {label.ljust(widths[0])}  {'  '.join(padded)}  {verdict}".rstrip())
    lines.append("  beside each figure: its 95 % interval; noise: the two overlap; same: they differ by 10 % at most")
    notes = [f"  note: now: {note}" for note in report.notes] + [f"  note: baseline: {n}" for n in baseline.notes]
    return "\n".join([*lines, *notes])


def figures_lines(seen: Figures) -> list[str]:
    lines = _encoder(seen) if seen.stream is None else _generator(seen, seen.stream)
    lines.append(
        f"  errors      {seen.failed} of {seen.ended}"
        + "".join(f"   {kind} {count}" for kind, count in seen.errors.items())
    )
    lines += _failures_late(seen) + _few(seen)
    if seen.stream is not None and seen.stream.cancelled:
        lines.append(f"  cancelled   {seen.stream.cancelled} by their clients, as asked")
    if seen.tokens_per_text is not None:
        cut = f"   truncated {seen.truncated_share:.1%}" if seen.truncated_share is not None else ""
        lines.append(f"  tokens      {seen.tokens_per_text:.4g} a text{cut}")
    return lines


def _heading(report: LoadReport) -> list[str]:
    load, identity = report.load, report.identity
    partial = []
    if report.stopped is not None:
        part = report.stopped
        partial.append(
            f"PARTIAL: stopped after {part.measured_s} of {part.planned_s} s; {part.under_way} requests that were "
            "under way are in no figure"
        )
    what = f"{load.texts_per_request} text(s) a request" if load.stream is None else str(load.stream)
    way = f"{load.protocol} through the gateway" if load.gateway else load.protocol
    return [
        f"{identity.model} version {identity.version} ({identity.precision}), weights {identity.digest[:16]}",
        f"proven on its machine: {proof_text(report.proof)}",
        f"{load.level(load.users)}, {way}, {load.shape}, {load.duration_s} s after {load.warm_up_s} s of "
        f"warm-up, {what}",
        *partial,
    ]


def _failures_late(seen: Figures) -> list[str]:
    """Percentiles over all requests, where they differ from those of the answers."""
    if not seen.failed or seen.all_requests is None:
        return []
    named: list[tuple[str, WithFailures | None]] = [("", seen.all_requests)]
    if seen.stream is not None:
        named = [
            ("first token ", seen.stream.all_first_tokens),
            ("gaps ", seen.stream.all_gaps),
            ("inter-token ", seen.stream.all_inter_tokens),
            ("whole ", seen.all_requests),
        ]
    parts = [(name, of) for name, of in named if of is not None]
    shown = "   ".join(f"{name}p95 {_late(of, of.p95_ms)}   p99 {_late(of, of.p99_ms)}" for name, of in parts)
    return [f"  with {seen.failed} failures as late as can be: {shown}"]


def _late(seen: WithFailures, value: float | None) -> str:
    return "failed" if value is None and seen.failed else _ms(value)


def _few(seen: Figures) -> list[str]:
    few = few_of(seen)
    lines = [line for line in lines_of(seen) if line.key in few and (seen.failed or not line.failures_late)]
    said = [f"{line.label} has {few[line.key].seen} of {few[line.key].needed}" for line in lines]
    return [f"  too few samples for 99 % confidence: {'; '.join(said)}"] if said else []


def _ledger(report: LoadReport) -> list[str]:
    seen = report.requests
    if seen is None:
        return []
    parts = [f"{seen.answered} answered", f"{sum(seen.failed.values())} failed"]
    parts += [f"{seen.left} left"] if seen.left else []
    line = f"  whole run   {seen.started} requests started = {' + '.join(parts)} + {seen.under_way} under way"
    if seen.server_succeeded is None:
        return [line]
    twice = " (Triton counts those of an ensemble twice)" if seen.server_failed else ""
    server = f"the server counts {seen.server_succeeded} answered and {seen.server_failed} failed{twice}"
    return [line, f"              {server}, up to {seen.probes} of its own probes among them"]


def _slo(report: LoadReport) -> list[str]:
    return [
        f"  SLO {'met   ' if one.met else 'MISSED'}  {one.name}: {one.said}{f' ({one.thin})' if one.thin else ''}"
        for one in report.slo or ()
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
        *([f"  inter-token {_spread(stream.inter_token)}"] if stream.inter_token is not None else []),
        f"  a stream's mean a token  {_spread(stream.per_token)}",
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
