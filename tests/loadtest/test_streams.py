"""Load of a generator, without one: prompts, what a stream says, what is recorded of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.errors import LoadInputError
from loadtest.requests.interface import RequestError
from loadtest.requests.prompts import Lengths, Prompt, StreamLoad, draw_prompt, longest_prompts, parse_lengths
from loadtest.requests.streaming import Piece, Stream, follow
from loadtest.seen.figures import Counted, figures_of, merged
from loadtest.seen.recording import Trace

START = 1_000_000.0
TEXTS = ("one", "two words", "three words here", "a text of five words")
lengths = st.tuples(st.integers(1, 60), st.integers(0, 60)).map(lambda pair: Lengths(low=pair[0], high=sum(pair)))


@given(st.integers(), lengths, lengths, st.sampled_from([0.0, 0.5, 1.0]))
def test_prompts_have_the_lengths_that_were_asked_for(seed: int, words: Lengths, tokens: Lengths, share: float) -> None:
    load = StreamLoad(prompt_words=words, output_tokens=tokens, cancel_share=share)
    drawn = [draw_prompt(random.Random(seed), TEXTS, load) for _ in range(2)]
    assert drawn[0] == drawn[1]
    prompt = drawn[0]
    assert words.low <= len(prompt.text.split()) <= words.high
    assert tokens.low <= prompt.output_tokens <= tokens.high
    if prompt.leave_after is not None:
        assert share > 0
        assert 1 <= prompt.leave_after <= max(1, prompt.output_tokens // 2)
    assert share < 1 or prompt.leave_after is not None
    for longest in longest_prompts(TEXTS, load):
        assert (len(longest.text.split()), longest.output_tokens) == (words.high, tokens.high)


def test_texts_are_sent_whole_where_no_length_is_asked_for() -> None:
    load = StreamLoad()
    assert {draw_prompt(random.Random(seed), TEXTS, load).text for seed in range(40)} == set(TEXTS)
    assert TEXTS[-1] in {prompt.text for prompt in longest_prompts(TEXTS, load)}


@pytest.mark.parametrize(("text", "low", "high"), [("64", 64, 64), (" 16-128 ", 16, 128), ("7-7", 7, 7)])
def test_lengths_are_read(text: str, low: int, high: int) -> None:
    assert parse_lengths(text, "--x") == Lengths(low=low, high=high)
    assert parse_lengths(str(Lengths(low=low, high=high)), "--x") == Lengths(low=low, high=high)


@pytest.mark.parametrize("text", ["", "0", "8-4", "-4", "4-", "a", "1.5", "4-8-9", "0-3"])
def test_lengths_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(LoadInputError, match="--x: got"):
        parse_lengths(text, "--x")


def _follow(pieces: Iterable[Piece], asked: Prompt) -> Stream:
    """A second passes with each look at the clock."""
    ticks = itertools.count(1)
    return follow(pieces, asked, lambda: float(next(ticks)))


def test_moments_and_counts_of_a_stream() -> None:
    stream = _follow([Piece(2), Piece(1), Piece(0, "length", 5, 3)], Prompt("x", 3))
    assert stream.arrivals == [(1.0, 2), (2.0, 1)]  # the last response has no token, so it is no arrival
    assert (stream.tokens, stream.prompt_tokens, stream.ended_s, stream.left, stream.error) == (3, 5, 3.0, False, None)


def test_a_client_leaves_after_its_tokens_and_reads_no_further() -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece(1)
        yield Piece(2)
        raise AssertionError("the client had left")

    stream = _follow(pieces(), Prompt("x", 9, leave_after=2))
    assert (stream.left, stream.asked, stream.tokens, stream.error) == (True, 9, 3, None)
    ended = _follow([Piece(9, "length", 1, 9)], Prompt("x", 9, leave_after=2))
    assert not ended.left  # the answer was over before the client could leave


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([], "without a finish reason"),
        ([Piece(3)], "without a finish reason"),
        ([Piece(2), Piece(0, "stop", 5, 2)], "3 were asked for"),
        ([Piece(2), Piece(1, "length", 5, 4)], "the server says 4"),
        ([Piece(3, "length", 0, 3)], "the prompt has 0 tokens"),
    ],
)
def test_a_stream_that_does_not_add_up_has_failed(pieces: list[Piece], said: str) -> None:
    error = _follow(pieces, Prompt("x", 3)).error
    assert error is not None
    assert error.kind == "BAD_OUTPUT"
    assert said in error.message


def test_what_came_before_a_failure_is_kept() -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece(2)
        raise RequestError("UNAVAILABLE", "gone")

    stream = _follow(pieces(), Prompt("x", 9))
    assert (stream.tokens, str(stream.error)) == (2, "UNAVAILABLE")


def _recorded(*streams: tuple[float, Stream]) -> Trace:
    trace = Trace(started_at=START)
    for started_at, stream in streams:
        trace.streamed("grpc", started_at, stream)
    return trace


def test_tokens_count_where_they_arrive_and_times_where_they_begin() -> None:
    stream = Stream([(0.5, 1), (0.9, 2), (1.5, 3)], ended_s=1.6, prompt_tokens=7)
    cells = _recorded((START, stream)).cells["grpc"]
    first, second = (cells[int(START) + late] for late in (0, 1))
    assert first.stream is not None
    assert second.stream is not None
    assert (first.stream.output_tokens, second.stream.output_tokens) == (3, 3)
    assert (first.stream.gap.count, second.stream.gap.count) == (2, 0)  # both gaps begin in the first second
    assert (first.latency.count, first.answered, second.answered) == (1, 0, 1)
    assert (first.stream.prompt_tokens, second.stream.prompt_tokens) == (0, 7)
    seen = figures_of(cells.values(), 2.0, Counted(stream=True)).stream
    assert seen is not None
    assert seen.first_token.p50_ms == pytest.approx(500)
    assert seen.gap.max_ms == pytest.approx(600)
    assert seen.largest_gap.p99_ms == pytest.approx(600)
    assert seen.gap.mean_ms == pytest.approx(500)
    assert seen.per_token.mean_ms == pytest.approx(1000 / 5)  # a second for the five tokens after the first response
    assert (seen.output_tokens_per_s, seen.tokens_per_response) == (3.0, 2.0)


moments = st.lists(st.tuples(st.floats(0.001, 20), st.integers(1, 9)), max_size=8).map(sorted)
streams = st.builds(
    Stream,
    arrivals=moments,
    ended_s=st.floats(20, 25),
    prompt_tokens=st.integers(1, 9),
    left=st.booleans(),
    error=st.sampled_from([None, None, RequestError("UNAVAILABLE", "full")]),
    asked=st.integers(0, 40),
)


@given(st.lists(st.tuples(st.floats(START, START + 30), streams), max_size=12), st.integers(0, 12))
def test_every_token_and_every_request_is_counted_once(seen: list[tuple[float, Stream]], cut: int) -> None:
    """By two workers that report to a master."""
    master = Trace()
    for part in (seen[:cut], seen[cut:]):
        master.merge(Trace.from_json(_recorded(*part).take().to_json()))
    whole = merged(cell for cells in master.cells.values() for cell in cells.values())
    every = [stream for _, stream in seen]
    good = [stream for stream in every if stream.error is None]
    failed = len(every) - len(good)
    left = sum(stream.left for stream in good)
    assert whole.errors == ({"UNAVAILABLE": failed} if failed else {})
    assert whole.answered == whole.latency.count == len(good) - left
    if whole.stream is None:
        assert not every
        return
    kept = sum(stream.tokens for stream in good)
    assert (whole.stream.output_tokens, whole.stream.lost_tokens) == (kept, sum(s.tokens for s in every) - kept)
    assert whole.stream.cancelled == left
    early = [stream for stream in every if stream.error is not None or stream.left]
    assert whole.stream.owed_tokens == sum(max(0, stream.asked - stream.tokens) for stream in early)
    assert whole.stream.prompt_tokens == sum(stream.prompt_tokens for stream in good if not stream.left)
    gaps = [late[0] - early[0] for s in good for early, late in itertools.pairwise(s.arrivals)]
    assert whole.stream.gap.count == len(gaps)
    assert whole.stream.first_token.count == sum(bool(stream.arrivals) for stream in good)
    assert whole.stream.largest_gap.count == whole.stream.per_token.count == sum(len(s.arrivals) > 1 for s in good)
    if gaps and max(gaps) > 0.001:
        assert whole.stream.gap.max_ms == pytest.approx(max(gaps) * 1000)
