"""Whether a load test showed what it must: each limit, what was seen, and a sentence for what was missed."""

from __future__ import annotations

from typing import Protocol

from loadtest.report.record import Judgement, LoadReport
from loadtest.seen.figures import WithFailures
from loadtest.seen.histogram import samples_for


class SloLimits(Protocol):
    """What a load test must show. The spec's slice `slo` has these, and so can any record."""

    @property
    def p95_latency_ms(self) -> float | None: ...
    @property
    def min_throughput_per_s(self) -> float | None: ...
    @property
    def max_error_rate(self) -> float: ...
    @property
    def p99_first_token_ms(self) -> float | None: ...
    @property
    def p99_response_gap_ms(self) -> float | None: ...
    @property
    def p99_inter_token_ms(self) -> float | None: ...
    @property
    def min_output_tokens_per_s(self) -> float | None: ...


def judge(report: LoadReport, limits: SloLimits) -> tuple[Judgement, ...]:
    """Every limit that is set, in the spec's words. Latencies are judged over all requests, and a failed one counts as
    later than any answer. Throughput is in texts, a generator's in requests; its latency is that of a whole answer.

    For the shape `steps` the whole ramp is judged, its last plateau included.
    """
    seen, stream = report.figures, report.figures.stream
    judged = [_answered(report)]
    if limits.p95_latency_ms is not None:
        judged.append(_time("p95_latency_ms", "p95 latency", 95, seen.all_requests, limits.p95_latency_ms))
    if limits.min_throughput_per_s is not None:
        unit = "texts/s" if stream is None else "requests/s"
        judged.append(_rate("min_throughput_per_s", "Throughput", seen.texts_per_s, limits.min_throughput_per_s, unit))
    if stream is not None:
        for name, what, all_of in (
            ("p99_first_token_ms", "p99 of the time to the first token", stream.all_first_tokens),
            ("p99_response_gap_ms", "p99 of the gaps between responses", stream.all_gaps),
            ("p99_inter_token_ms", "p99 of the time a token", stream.all_inter_tokens),
        ):
            limit = getattr(limits, name)
            if limit is not None:
                judged.append(_time(name, what, 99, all_of, limit))
        if limits.min_output_tokens_per_s is not None:
            least = limits.min_output_tokens_per_s
            judged.append(_rate("min_output_tokens_per_s", "Output", stream.output_tokens_per_s, least, "tokens/s"))
    return (*judged, _errors(report, limits.max_error_rate))


def check_slo(report: LoadReport, limits: SloLimits) -> list[str]:
    """One sentence for each limit that was missed; empty: all were met."""
    return [one.said for one in judge(report, limits) if not one.met]


def _answered(report: LoadReport) -> Judgement:
    seen, seconds = report.figures, report.measured_s
    ends = round(seen.requests_per_s * seconds)
    if seen.stream is not None and seen.stream.output_tokens:
        ends = max(1, ends)  # answers may be longer than the window: their tokens came in it
    said = f"{ends} requests were answered in {seconds} s."
    if not ends and seen.ended == seen.failed:
        said = f"No request was answered in {seconds} s; {seen.failed} failed."
    elif not ends:
        wait = "" if seen.p50_ms is None else f"answers took {seen.p50_ms / 1000:.3g} s (p50)"
        said = (
            f"No request was answered within the {seconds} measured seconds: {report.load.level(report.load.users)} "
            f"are more than the server, or the load generator, gets through; {wait}. "
            f"Use fewer users, or measure several times as long as an answer takes."
        )
    return Judgement(name="answered", bound="at least", limit=1, seen=ends, met=ends > 0, said=said)


def _time(name: str, what: str, percent: int, seen: WithFailures | None, limit_ms: float) -> Judgement:
    value = None if seen is None else seen.p95_ms if percent == 95 else seen.p99_ms
    met = value is not None and value <= limit_ms
    late = "" if seen is None or not seen.failed else " over all requests (failures count as late)"
    if seen is None or not seen.count:
        said = f"{what} is unknown, because nothing was seen; the limit is {limit_ms:g} ms."
    elif value is None:
        said = (
            f"{what}{late} is later than any answer, because {seen.failed / seen.count:.1%} failed; "
            f"the limit is {limit_ms:g} ms."
        )
    elif met:
        said = f"{what}{late} is {value:.4g} ms, within the limit of {limit_ms:g} ms."
    else:
        said = f"{what}{late} is {value:.4g} ms, which is {value / limit_ms:.2f} times the limit of {limit_ms:g} ms."
    thin = (
        "" if seen is None or seen.count >= samples_for(percent) else f"of {seen.count}; {samples_for(percent)} needed"
    )
    return Judgement(name=name, bound="at most", limit=limit_ms, seen=value, met=met, said=said, thin=thin)


def _rate(name: str, what: str, seen: float, least: float, unit: str) -> Judgement:
    met = seen >= least
    said = f"{what} is {seen:.4g} {unit}, which is {seen / least:.2f} times the required {least:g} {unit}."
    return Judgement(name=name, bound="at least", limit=least, seen=seen, met=met, said=said)


def _errors(report: LoadReport, limit: float) -> Judgement:
    seen = report.figures
    kinds = ", ".join(f"{count} {kind}" for kind, count in seen.errors.items())
    met = seen.error_rate <= limit
    said = (
        f"Error rate is {seen.error_rate:.4%} ({seen.failed} of {seen.ended} requests{': ' if kinds else ''}{kinds}), "
        f"{'within' if met else 'over'} the limit of {limit:.4%}."
    )
    return Judgement(name="max_error_rate", bound="at most", limit=limit, seen=seen.error_rate, met=met, said=said)
