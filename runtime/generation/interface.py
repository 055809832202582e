"""The tensors of the Triton model, and how a request is read from them.

Names, types and shapes are those of TensorRT-LLM's models; `input_ids`, `stop_token_ids`, `min_p` and the outputs
beside `text_output` and `output_log_probs` are more. Every shape has a batch dimension of 1 in front. All inputs are
optional but one of `text_input` and `input_ids`. Defaults: greedy, unless one of `top_k`, `top_p`, `min_p` and
`random_seed` is given, which makes the temperature 1; `max_tokens` from the model's settings; everything else off.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadRequest
from runtime.generation.request import SamplingParams, Tokens


class Tensor(NamedTuple):
    """As `config.pbtxt` has it: -1 is any number, the batch dimension is not written."""

    name: str
    data_type: str
    size: int


INPUTS = (
    Tensor("text_input", "TYPE_STRING", 1),
    Tensor("input_ids", "TYPE_INT32", -1),
    Tensor("max_tokens", "TYPE_INT32", 1),
    Tensor("min_length", "TYPE_INT32", 1),
    Tensor("stop_words", "TYPE_STRING", -1),
    Tensor("stop_token_ids", "TYPE_INT32", -1),
    Tensor("temperature", "TYPE_FP32", 1),
    Tensor("top_k", "TYPE_INT32", 1),
    Tensor("top_p", "TYPE_FP32", 1),
    Tensor("min_p", "TYPE_FP32", 1),
    Tensor("repetition_penalty", "TYPE_FP32", 1),
    Tensor("presence_penalty", "TYPE_FP32", 1),
    Tensor("frequency_penalty", "TYPE_FP32", 1),
    Tensor("random_seed", "TYPE_INT64", 1),
    Tensor("return_log_probs", "TYPE_BOOL", 1),
    Tensor("stream", "TYPE_BOOL", 1),
)
# A streamed response holds what is new; the last three come with the last response alone.
OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", 1),
    Tensor("output_ids", "TYPE_INT32", -1),
    Tensor("output_log_probs", "TYPE_FP32", -1),
    Tensor("prompt_tokens", "TYPE_INT32", 1),
    Tensor("completion_tokens", "TYPE_INT32", 1),
    Tensor("finish_reason", "TYPE_STRING", 1),
)
# The environment variable in which the launcher gives a server's models a fresh secret id. A request that bears it is
# the launcher's own probe: it is answered as any other, not counted as a request, and not kept.
PROBE_ID_VARIABLE = "TRIREME_PROBE_ID"
# An error in a stream has no gRPC status, so its text begins with it. (Triton gives one to clients that send the header
# `triton_grpc_error`, but Triton 2.51 crashes on it once in some dozens of errors.)
STATUSES = frozenset({"INVALID_ARGUMENT", "UNAVAILABLE", "INTERNAL", "CANCELLED"})
_SAMPLING = ("top_k", "top_p", "min_p", "random_seed")


@dataclass(frozen=True, eq=False)
class Asked:
    """A request as it came. Exactly one of `text` and `ids` is set."""

    text: str | None
    ids: Tokens | None
    params: SamplingParams
    stream: bool


def read_request(tensors: Mapping[str, NDArray[Any]], parameters: Collection[str] = ()) -> Asked:
    """`tensors` by name, absent ones left out; `parameters` are names that came beside them, which nothing reads.

    Raises BadRequest that says what is wrong with which of them.
    """
    for name in parameters:
        near = difflib.get_close_matches(name, [tensor.name for tensor in INPUTS], 1)
        raise BadRequest(f"unknown parameter {name}" + (f"; did you mean {near[0]}?" if near else ""))
    given = {
        name: array.ravel() for name, array in tensors.items() if array.size or name in ("text_input", "input_ids")
    }
    if ("text_input" in given) == ("input_ids" in given):
        raise BadRequest("send one of text_input and input_ids")
    text = _text(given["text_input"], "text_input")[0] if "text_input" in given else None
    if text == "":
        raise BadRequest("text_input is empty; send at least one character")
    default = 1.0 if any(name in given for name in _SAMPLING) else 0.0
    params = SamplingParams(
        max_tokens=_number(given, "max_tokens", None),
        min_tokens=_number(given, "min_length", 0),
        temperature=_number(given, "temperature", default),
        top_k=_number(given, "top_k", 0),
        top_p=_number(given, "top_p", 1.0),
        min_p=_number(given, "min_p", 0.0),
        repetition_penalty=_number(given, "repetition_penalty", 1.0),
        presence_penalty=_number(given, "presence_penalty", 0.0),
        frequency_penalty=_number(given, "frequency_penalty", 0.0),
        seed=_number(given, "random_seed", None),
        stop=tuple(_text(given["stop_words"], "stop_words")) if "stop_words" in given else (),
        stop_token_ids=tuple(given["stop_token_ids"].tolist()) if "stop_token_ids" in given else (),
        logprobs=bool(_number(given, "return_log_probs", False)),
    )
    ids = None if text is not None else given["input_ids"].astype(np.int64)
    return Asked(text, ids, params, stream=bool(_number(given, "stream", False)))


def _number(given: Mapping[str, NDArray[Any]], name: str, default: Any) -> Any:
    return given[name][0].item() if name in given else default


def _text(raw: NDArray[Any], name: str) -> list[str]:
    texts = []
    for index, item in enumerate(raw):
        try:
            texts.append(bytes(item).decode())
        except UnicodeDecodeError as error:
            raise BadRequest(f"{name}[{index}]: byte {error.start} is not valid UTF-8; send UTF-8") from error
    return texts or [""]


def split_status(said: str) -> tuple[str, str]:
    """Status and text of an error in a stream; no status where it is not a generator's own."""
    status, _, text = said.partition(": ")
    return (status, text) if status in STATUSES else ("", said)
