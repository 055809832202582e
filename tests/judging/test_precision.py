"""`precision.cpu: auto` is decided by figures: what is worth a try, what is taken, what is said of the rest."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders.artifacts import PrecisionCandidate, Processor, Quality
from builders.errors import QualityError
from builders.judging.precision import AS_FAST, WIDEST_FIRST, candidates, decide, warning
from builders.judging.speed import ROUNDS, decoder_work, speed_ratios
from builders.store.processor import read_processor, this_processor
from runtime.step import Batch, Copy, Logits, Row, Tokens

OLD = "model name\t: AMD EPYC 7571\nflags\t\t: fpu sse4_2 avx avx2 fma\nflags\t\t: second core\n"
NEW = "model name\t: Xeon\nflags\t\t: avx avx2 avx512_vnni avx512_bf16 amx_int8\n"
CLIENT = "model name\t: Core\nflags\t\t: avx2 avx_vnni\n"
FIGURES = Quality(mean_cosine=0.999, worst_cosine=0.99, max_abs_difference=0.1, texts=9, executor="E")


def _processor(text: str, *capabilities: str) -> Processor:
    return read_processor(text, ("FP32", "INT8", *capabilities), 2)


@pytest.mark.parametrize(
    ("processor", "executor", "tried"),
    [
        (_processor(OLD), "openvino", ["fp32"]),
        (_processor(NEW, "BF16"), "openvino", ["int8", "bf16", "fp32"]),
        (_processor(CLIENT), "openvino", ["int8", "fp32"]),
        (_processor(NEW, "BF16"), "onnxruntime", ["fp32"]),  # ranks too
        (_processor("", "BF16"), "openvino", ["bf16", "fp32"]),
    ],
)
def test_what_cannot_pay_is_not_tried_and_says_why(processor: Processor, executor: str, tried: list[str]) -> None:
    names, left_out = candidates(False, executor, processor)  # type: ignore[arg-type]
    assert names == tried
    known = {"int8", "bf16", "fp32", *(["dynamic_int8"] if executor == "onnxruntime" else [])}
    assert {item.precision for item in left_out} == known - set(tried)
    assert all(item.reason.startswith("not tried: ") and item.speed is None for item in left_out)
    if not processor.multiplies_bytes and executor == "openvino":
        assert any("no VNNI" in item.reason for item in left_out)


def test_fewer_bytes_are_tried_for_generators_on_any_cpu() -> None:
    for text in (OLD, NEW):
        assert candidates(True, "openvino", _processor(text)) == (["w8", "w4", "fp32"], [])


def test_the_processor_is_read_as_it_stands() -> None:
    found = _processor(OLD)
    assert (found.name, found.flags, found.multiplies_bytes, found.has_bfloat16) == (
        "AMD EPYC 7571", ("avx", "avx2"), False, False,
    )  # fmt: skip
    assert _processor(CLIENT).multiplies_bytes
    assert this_processor().capabilities  # whatever this machine is


def _measured(**speeds: float) -> list[PrecisionCandidate]:
    return [PrecisionCandidate(precision=name, speed=speed, quality=FIGURES) for name, speed in speeds.items()]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({"fp32": 1.0, "bf16": 1.8, "int8": 2.4}, "int8"),
        ({"fp32": 1.0, "bf16": 2.4, "int8": 2.4 * (1 + AS_FAST / 2)}, "bf16"),  # as fast: the wider one
        ({"fp32": 1.0, "bf16": 0.05, "int8": 0.69}, "fp32"),  # bf16 emulated, int8 without VNNI
        ({"fp32": 1.0, "w8": 1.5, "w4": 1.9}, "w4"),
        ({"fp32": 1.0}, "fp32"),
    ],
)
def test_the_fastest_is_taken_and_the_wider_of_two_as_fast(speeds: dict[str, float], chosen: str) -> None:
    for order in permutations(_measured(**speeds)):
        taken, judged = decide(order, "m")
        assert taken == chosen
        assert [item.precision for item in judged] == [item.precision for item in order]
        assert all(item.reason for item in judged)
        assert [item.precision for item in judged if item.reason.startswith("taken")] == [chosen]


def test_one_that_was_refused_is_never_taken_however_fast() -> None:
    refused = PrecisionCandidate(
        precision="int8", speed=9.0, quality=FIGURES, reason="refused: mean cosine 0.9964 (budget 0.998)"
    )
    taken, judged = decide([refused, *_measured(fp32=1.0)], "m")
    assert taken == "fp32"
    assert judged[0] == refused
    with pytest.raises(QualityError, match=r"no precision of m is within the budget: int8: .* mean cosine 0\.9964"):
        decide([refused], "m")


@given(st.lists(st.tuples(st.sampled_from(WIDEST_FIRST), st.floats(0.01, 100)), min_size=1, unique_by=lambda x: x[0]))
def test_nothing_much_faster_is_ever_passed_over(speeds: list[tuple[str, float]]) -> None:
    taken, _ = decide(_measured(**dict(speeds)), "m")
    assert dict(speeds)[taken] >= max(dict(speeds).values()) * (1 - AS_FAST)


def test_a_precision_asked_for_by_name_is_warned_about_where_it_does_not_pay() -> None:
    (int8,) = _measured(int8=0.69)
    said = warning(int8, _processor(OLD))
    assert said is not None
    assert "int8 is slower than fp32 on AMD EPYC 7571: 0.69 of its speed" in said
    (bf16,) = _measured(bf16=1.0)
    assert "has no bf16" in (warning(bf16, _processor(OLD)) or "")
    for fine in _measured(int8=1.4, bf16=1.0, w8=0.97):
        assert warning(fine, _processor(NEW, "BF16")) is None


class _Time:
    """A clock that work moves on; the machine gets three times slower half-way."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def work(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds * (3 if len(self.calls) > 6 else 1)


def test_speed_is_a_ratio_of_runs_by_turns() -> None:
    time = _Time()
    ratios = speed_ratios(lambda: time.work("a", 0.4), lambda: time.work("b", 0.1), clock=lambda: time.now)
    assert ratios == pytest.approx([4] * ROUNDS)
    assert time.calls[2:] == ["a", "b", "b", "a"] * (ROUNDS // 2) + ["a", "b"] * (ROUNDS % 2)


def test_slow_work_gets_fewer_rounds() -> None:
    time = _Time()
    speed_ratios(lambda: time.work("a", 60), lambda: time.work("b", 30), clock=lambda: time.now)
    assert len(time.calls) == 8


class _Recorder:
    """Says what a decoder was asked for, and keeps the promises of `StepExecutor` to it."""

    vocabulary, stages, call_cost = 7, 1, 0

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.filled: dict[Row, int] = {}
        self.encoded: list[tuple[Row, int]] = []

    def run(self, batches: list[Batch]) -> list[Logits]:
        for batch in batches:
            assert len(batch.input_ids) == 1 or batch.input_ids.shape[1] == 1
            for row, past in zip(batch.rows, batch.write_indices.tolist(), strict=True):
                assert past == 0 or past == self.filled[Row(batch.pool, row)]
                self.filled[Row(batch.pool, row)] = past + batch.input_ids.shape[1]
        self.batches += batches
        return [np.zeros((len(batch.input_ids), self.vocabulary), np.float32) for batch in batches]

    def copy(self, copies: list[Copy]) -> None: ...

    def encode(self, row: Row, source: Tokens) -> None:
        self.encoded.append((row, len(source)))

    def lost(self) -> bool:
        return False

    def reset(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("shape", [(8, 128), (3, 16), (1, 8)])
def test_decoders_are_timed_on_prompts_of_mixed_length_and_steps_together(shape: tuple[int, int]) -> None:
    rows: NDArray[np.int64] = np.arange(shape[0] * shape[1]).reshape(shape)
    executor = _Recorder()
    decoder_work(executor, (16, 128), rows, encodes=True)()  # type: ignore[arg-type]
    prompts, steps = executor.batches[: shape[0]], executor.batches[shape[0] :]
    lengths = [batch.input_ids.shape[1] for batch in prompts]
    assert lengths == sorted(set(lengths))
    assert [length for _, length in executor.encoded] == lengths
    assert steps
    assert all(batch.input_ids.shape == (shape[0], 1) for batch in steps)
    assert max(executor.filled.values()) <= shape[1]
    assert (steps[-1].input_ids[:, 0] == rows[np.arange(shape[0]), steps[-1].write_indices]).all()
