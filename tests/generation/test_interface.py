"""What the Triton model takes and gives, and what a request means that leaves things out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders.repository.generator_config import generator_config
from runtime.errors import BadRequest
from runtime.generation.interface import INPUTS, OUTPUTS, read_request
from runtime.generation.metrics import Histogram
from runtime.generation.request import Limits, Request, SamplingParams, Update, coalesce
from runtime.model_config import to_pbtxt

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
    [({}, 0.0), ({"top_p": 0.9}, 1.0), ({"top_k": 5}, 1.0), ({"min_p": 0.1}, 1.0),
     ({"random_seed": 3}, 0.0), ({"top_k": 0, "top_p": 1.0, "min_p": 0.0, "random_seed": 3}, 0.0),
     ({"top_k": 5, "temperature": 0.0}, 0.0), ({"temperature": 0.5}, 0.5),
     ({"repetition_penalty": 1.1}, 0.0)],
)  # fmt: skip
def test_what_asks_for_chance_gets_temperature_1(given: dict[str, Any], temperature: float) -> None:
    assert _read(**given).temperature == temperature


def test_empty_tensors_say_nothing() -> None:
    tensors = {"input_ids": np.array([[4, 5]], np.int32), "stop_words": np.empty((1, 0), np.object_)}
    asked = read_request(tensors)
    assert asked.ids is not None
    assert (asked.ids.tolist(), asked.params.stop) == ([4, 5], ())


# What the published clients of TensorRT-LLM's models send beside the prompt and `max_tokens`.
NEUTRAL: dict[str, Any] = {
    "bad_words": [b""], "stop_words": [b""], "end_id": [2], "pad_id": [2], "beam_width": [1],
    "num_return_sequences": [1], "length_penalty": [1.0], "num_draft_tokens": [0], "use_draft_logits": [False],
    "return_context_logits": [False], "return_generation_logits": [False], "return_perf_metrics": [False],
    "embedding_bias_words": [b""], "embedding_bias_weights": [0.0], "exclude_input_in_output": [True],
    "repetition_penalty": [1.0], "presence_penalty": [0.0], "frequency_penalty": [0.0], "top_k": [0], "top_p": [1.0],
    "min_length": [0], "min_tokens": [0], "return_log_probs": [False], "stream": [False],
}  # fmt: skip


def test_what_published_clients_send_changes_nothing() -> None:
    asked = read_request({"text_input": TEXT, **{name: np.array([value]) for name, value in NEUTRAL.items()}})
    assert asked.params == SamplingParams(stop_token_ids=(2,))
    assert asked.params.plain
    assert (asked.echo, asked.stream, asked.special_tokens) == (False, False, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bad_words", b"x"), ("beam_width", 2), ("num_return_sequences", 3), ("length_penalty", 0.5), ("end_id", -1),
     ("embedding_bias_words", b"x"), ("return_context_logits", True), ("return_generation_logits", True)],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=f"^{name} is "):
        _read(**{name: value})


def test_what_is_told_of_tokens_and_what_holds_them() -> None:
    given = {
        "return_log_probs": [True], "top_log_probs": [3], "return_prompt_log_probs": [True],
        "logit_bias_ids": [5, 6], "logit_bias_values": [1.5, -2.0], "max_tokens": [0],
        "guided_decoding_guide_type": [b"json_schema"], "guided_decoding_guide": [b'{"type": "object"}'],
    }  # fmt: skip
    asked = read_request({"text_input": TEXT, **{name: np.array([value]) for name, value in given.items()}})
    assert asked.params == SamplingParams(
        max_tokens=0, logprobs=True, top_logprobs=3, prompt_logprobs=True, logit_bias=((5, 1.5), (6, -2.0))
    )
    assert (asked.details, asked.schema) == (True, '{"type": "object"}')
    assert read_request({"text_input": TEXT, "guided_decoding_guide_type": np.array([[b"json"]])}).schema == "{}"
    assert not read_request({"text_input": TEXT, "return_log_probs": np.array([[True]])}).details


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"logit_bias_ids": 5}, "logit_bias_ids has 1 tokens and logit_bias_values 0 values"),
        ({"guided_decoding_guide_type": b"regex"}, "is 'regex'; built here are json, json_schema, marked_json"),
        ({"guided_decoding_guide_type": b"json_schema"}, "send both"),
        ({"guided_decoding_guide": b"{}"}, "send both"),
        ({"top_log_probs": 2}, "top_log_probs is 2; expected return_log_probs"),
        ({"return_log_probs": True, "top_log_probs": 21}, "top_log_probs is 21; expected 0 to 20"),
    ],
)  # fmt: skip
def test_what_is_told_of_tokens_has_its_bounds(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        _read(**given)


def test_older_and_newer_names_of_one_input() -> None:
    assert _read(min_tokens=3, seed=5) == _read(min_length=3, random_seed=5)
    with pytest.raises(BadRequest, match="random_seed is 1 and seed is 2; they are one thing"):
        _read(random_seed=1, seed=2)


def test_seeds_have_64_bits() -> None:
    tensors = {"text_input": TEXT, "random_seed": np.array([[(1 << 64) - 1]], np.uint64)}
    assert read_request(tensors).params.seed == (1 << 64) - 1


@pytest.mark.parametrize(
    ("given", "echo"),
    [({}, False), ({"exclude_input_in_output": True}, False), ({"exclude_input_in_output": False}, True),
     ({"exclude_input_in_output": False, "stream": True}, False)],
)  # fmt: skip
def test_the_prompt_comes_back_where_that_is_asked(given: dict[str, bool], echo: bool) -> None:
    assert read_request({"text_input": TEXT, **{name: np.array([[on]]) for name, on in given.items()}}).echo == echo


def test_tritons_own_parameters_are_no_ones_mistake() -> None:
    asked = read_request({"text_input": TEXT}, {"id": "7", "priority": 1, "timeout": 5_000, "model": "tiny"})
    assert (asked.text, asked.timeout_s) == ("a text", 0.005)
    assert read_request({"text_input": TEXT}, {"timeout": 0}).timeout_s is None
    assert read_request({"text_input": TEXT}, {"cache_salt": "ann"}).params.cache_salt == "ann"
    with pytest.raises(BadRequest, match="cache_salt is no text"):
        read_request({"text_input": TEXT}, {"cache_salt": 3})
    with pytest.raises(BadRequest, match="timeout is 'soon'; expected a whole number of microseconds"):
        read_request({"text_input": TEXT}, {"timeout": "soon"})


@pytest.mark.parametrize(("min_tokens", "room"), [(0, 16), (10, 16), (40, 40), (512, 512)])
def test_the_default_of_max_tokens_gives_way_to_min_length(min_tokens: int, room: int) -> None:
    request = Request(1, np.array([5]), SamplingParams(min_tokens=min_tokens))
    assert Limits(400, 512, 16).room(request) == room


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
