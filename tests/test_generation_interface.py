"""What the Triton model takes and gives, and what a request means that leaves things out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders.repository.config import to_pbtxt
from builders.repository.generation import generator_config
from runtime.errors import BadRequest
from runtime.generation.interface import INPUTS, OUTPUTS, read_request
from runtime.generation.metrics import Histogram
from runtime.generation.request import SamplingParams, Update, coalesce

TEXT = np.array([[b"a text"]], np.object_)


def _read(**tensors: Any) -> SamplingParams:
    return read_request({"text_input": TEXT, **{name: np.array([[value]]) for name, value in tensors.items()}}).params


def test_a_prompt_alone_is_greedy() -> None:
    asked = read_request({"text_input": TEXT})
    assert (asked.text, asked.ids, asked.stream) == ("a text", None, False)
    assert asked.params == SamplingParams()
    assert asked.params.plain


@pytest.mark.parametrize(
    ("given", "temperature"),
    [({}, 0.0), ({"top_p": 0.9}, 1.0), ({"random_seed": 3}, 1.0), ({"top_k": 5, "temperature": 0.0}, 0.0),
     ({"repetition_penalty": 1.1}, 0.0)],
)  # fmt: skip
def test_what_asks_for_chance_gets_temperature_1(given: dict[str, Any], temperature: float) -> None:
    assert _read(**given).temperature == temperature


def test_empty_tensors_say_nothing() -> None:
    tensors = {"input_ids": np.array([[4, 5]], np.int32), "stop_words": np.empty((1, 0), np.object_)}
    asked = read_request(tensors)
    assert asked.ids is not None
    assert (asked.ids.tolist(), asked.params.stop) == ([4, 5], ())


@pytest.mark.parametrize(
    ("name", "said"), [("max_token", "did you mean max_tokens"), ("zzz", "unknown parameter zzz$")]
)
def test_unknown_parameters(name: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        read_request({"text_input": TEXT}, {name: 1})


def test_the_configuration_is_decoupled_and_all_inputs_are_optional() -> None:
    config = generator_config("story", "KIND_GPU")
    text = to_pbtxt(config)
    assert config.model_transaction_policy.decoupled
    assert [item.name for item in config.input] == [tensor.name for tensor in INPUTS]
    assert [item.name for item in config.output] == [tensor.name for tensor in OUTPUTS]
    assert all(item.optional for item in config.input)
    assert "kind: KIND_GPU" in text
    assert "dynamic_batching" not in text


def test_updates_of_one_request_become_one() -> None:
    came = [Update(1, (4,), "a"), Update(2, (9,), "x"), Update(1, (5,), "b", (-0.5,)), Update(1, (), "", (), "stop")]
    assert coalesce(came) == {1: Update(1, (4, 5), "ab", (-0.5,), "stop"), 2: Update(2, (9,), "x")}


def test_histograms_count_as_prometheus_does() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.add(value)
    assert (histogram.counts, histogram.cumulative, histogram.total) == ([2, 1, 1], [2, 3, 4], 12.0)
