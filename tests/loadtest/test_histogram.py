"""Properties of what is recorded: percentiles within the stated error, merging without loss, bounded size."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.seen.histogram import GROWTH, LARGEST_MS, PERCENTILE_ERROR, SMALLEST_MS, LatencyHistogram, union
from loadtest.seen.recording import MAX_EXAMPLE, Cell, Trace
from loadtest.shapes import MAX_INTERVALS, interval_for

latencies = st.lists(st.floats(SMALLEST_MS, LARGEST_MS), min_size=1, max_size=200)
percents = st.sampled_from([0.1, 1, 50, 90, 95, 99, 99.9, 100])


def _of(values: list[float]) -> LatencyHistogram:
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(latencies, percents)
def test_percentile_is_the_nearest_rank_within_the_stated_error(values: list[float], percent: float) -> None:
    rank = max(1, math.ceil(percent * len(values) / 100 - 1e-9))
    exact = sorted(values)[rank - 1]
    got = _of(values).percentile(percent)
    assert got == pytest.approx(exact, rel=PERCENTILE_ERROR + 1e-9)


@given(latencies)
def test_ends_are_exact(values: list[float]) -> None:
    histogram = _of(values)
    assert histogram.percentile(100) == pytest.approx(max(values), rel=PERCENTILE_ERROR + 1e-9)
    assert (histogram.min_ms, histogram.max_ms, histogram.count) == (min(values), max(values), len(values))
    assert histogram.mean_ms == pytest.approx(math.fsum(values) / len(values))


@given(st.lists(latencies, max_size=5))
def test_merging_is_the_same_as_recording_together(parts: list[list[float]]) -> None:
    merged, together = union(_of(part) for part in parts), _of([value for part in parts for value in part])
    assert merged.counts == together.counts
    assert (merged.min_ms, merged.max_ms) == (together.min_ms, together.max_ms)
    assert merged.sum_ms == pytest.approx(together.sum_ms)


@given(st.lists(st.floats(0, math.inf), max_size=50))
def test_size_is_bounded_whatever_comes(values: list[float]) -> None:
    histogram = _of(values)
    highest = math.ceil(math.log(LARGEST_MS / SMALLEST_MS) / math.log(GROWTH))
    assert all(0 <= bucket <= highest for bucket in histogram.counts)
    assert histogram.count == len(values)


def test_nothing_recorded_has_no_percentile() -> None:
    assert LatencyHistogram().percentile(95) is None
    assert LatencyHistogram().mean_ms is None


events = st.lists(
    st.tuples(st.sampled_from(["grpc", "http"]), st.floats(1000, 1020), st.floats(0.1, 9000), st.booleans()),
    max_size=60,
)


def _trace(recorded: list[tuple[str, float, float, bool]]) -> Trace:
    trace = Trace()
    for protocol, started_at, latency_ms, good in recorded:
        if good:
            trace.answered(protocol, started_at, latency_ms, texts=2, tokens=9, truncated=1)
        else:
            trace.failed(protocol, started_at, "UNAVAILABLE", "m")
    return trace


@given(events, st.integers(0, 60))
def test_reports_of_two_workers_add_up_to_one_trace(recorded: list[tuple[str, float, float, bool]], cut: int) -> None:
    master = Trace()
    for part in (recorded[:cut], recorded[cut:]):
        master.merge(Trace.from_json(_trace(part).take().to_json()))
    whole = _trace(recorded)
    assert master.cells.keys() == whole.cells.keys()
    for protocol, cells in whole.cells.items():
        assert master.cells[protocol].keys() == cells.keys()
        for key, cell in cells.items():
            assert master.cells[protocol][key].latency.counts == cell.latency.counts
            assert master.cells[protocol][key].errors == cell.errors
            assert master.cells[protocol][key].answered == cell.answered


def test_take_leaves_nothing_to_send_twice() -> None:
    trace = _trace([("grpc", 1000.0, 5.0, True)])
    assert trace.take().cells
    assert trace.take().cells == {}


def test_a_late_answer_is_a_latency_of_its_start_and_throughput_of_its_end() -> None:
    trace = _trace([("grpc", 1000.2, 3000.0, True)])
    cells = trace.cells["grpc"]
    assert (cells[1000].latency.count, cells[1000].answered) == (1, 0)
    assert (cells[1003].latency.count, cells[1003].answered) == (0, 1)


def test_users_of_two_processes_add_up() -> None:
    one, other = Trace(), Trace()
    for trace, users in ((one, 3), (other, 4)):
        trace.sample_users(1000.5, users)
        trace.sample_users(1000.9, 99)  # the first sample of an interval stands
    one.merge(other)
    assert one.users == {1000: 7}


def test_messages_and_intervals_are_bounded() -> None:
    trace = Trace()
    for number in range(1000):
        trace.failed("grpc", 1000.0, "INTERNAL", f"{number} " + "x" * 10_000)
    assert len(trace.examples["INTERNAL"]) == MAX_EXAMPLE
    assert trace.cells == {"grpc": {1000: Cell(errors={"INTERNAL": 1000})}}
    for duration_s in (1, 60, 1800, 1801, 86_400):
        assert duration_s / interval_for(duration_s) <= MAX_INTERVALS
