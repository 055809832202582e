"""Regrouping rows across requests never mixes up whose vector is whose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.encoding.encoder import Encoder, require_numpy_1
from runtime.errors import BadEnvironment
from runtime.graph import Tensors


class SumExecutor:
    """Each row's vector is the sum of its real tokens: enough to recognise it."""

    description = "sum"
    lanes = 1

    def __init__(self) -> None:
        self.tokens = 0

    def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[np.ndarray]:  # type: ignore[type-arg]
        self.tokens = max([self.tokens, *(batch["input_ids"].size for batch in batches if len(batch["input_ids"]) > 1)])
        return [
            (batch["input_ids"] * batch["attention_mask"]).sum(axis=1, keepdims=True).astype(np.float32)
            for batch in batches
        ]


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=8), st.integers(16, 256))
def test_every_request_gets_its_own_rows(requests: list[list[int]], tokens_per_batch: int) -> None:
    generator = np.random.default_rng(len(requests))
    feeds, expected = [], []
    for sizes in requests:
        longest = max(sizes)
        mask = (np.arange(longest) < np.array(sizes)[:, None]).astype(np.int64)
        ids = generator.integers(1, 1000, mask.shape)
        feeds.append({"input_ids": ids, "attention_mask": mask})
        expected.append((ids * mask).sum(axis=1, keepdims=True).astype(np.float32))
    executor = SumExecutor()
    for got, want in zip(Encoder(executor, tokens_per_batch, 40).run(feeds), expected, strict=True):
        assert np.array_equal(got, want)
    assert executor.tokens <= tokens_per_batch


def test_warm_up_runs_each_length() -> None:
    seen = []

    class Recorder(SumExecutor):
        def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[np.ndarray]:  # type: ignore[type-arg]
            seen.extend(batch["input_ids"].shape for batch in batches)
            return super().run_all(batches, wide)

    Encoder(Recorder(), 512, 64).warm_up(["input_ids", "attention_mask"], [16, 64])
    assert seen == [(1, 16), (1, 64)]


def test_a_fit_times_the_machine_and_the_rows_still_come_back_to_their_owners() -> None:
    class Lanes(SumExecutor):
        lanes = 2

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[int, int]] = []

        def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[np.ndarray]:  # type: ignore[type-arg]
            self.calls.append((len(batches), wide))
            return super().run_all(batches, wide)

    executor = Lanes()
    encoder = Encoder(executor, 128, 64)
    costs = encoder.fit(["input_ids", "attention_mask"], 30.0)
    assert costs.lanes == 2
    assert costs.wide is not None
    assert set(executor.calls) == {(2, 0), (1, 1)}  # every lane at work, then one part with all cores
    assert costs.lane.tokens == (16, 32, 64, 128)
    feeds = [
        {"input_ids": np.full((1, n), n), "attention_mask": np.ones((1, n), np.int64)} for n in (3, 60, 17, 60, 1, 9)
    ]
    assert [float(rows[0, 0]) for rows in encoder.run(feeds)] == [9.0, 3600.0, 289.0, 3600.0, 1.0, 81.0]
    executor.calls.clear()
    assert encoder.fit(["input_ids", "attention_mask"], 30.0, shared=True).wide is None
    assert set(executor.calls) == {(2, 0)}  # where another instance computes too, no part has all cores


def test_numpy_2_is_refused_before_it_corrupts_anything() -> None:
    require_numpy_1()
    with pytest.raises(BadEnvironment, match="install numpy<2"):
        require_numpy_1("2.1.0")
