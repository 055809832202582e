"""The tensors of the Triton model, and how a request is read from them.

Names, types and shapes are those of TensorRT-LLM's models; `input_ids`, `stop_token_ids`, `forced_ids`, `min_p`,
`add_special_tokens`, `logit_bias_ids`, `logit_bias_values`, `top_log_probs`, `return_prompt_log_probs` and the outputs
beside `text_output`, `output_log_probs` and `cum_log_probs` are more. Every input has a batch dimension of 1 in front.
All are optional but one of `text_input` and `input_ids`. Defaults: `max_tokens` from the model's settings, or as many
as `forced_ids`; everything else off. Without a temperature the likeliest token is taken, unless `top_k`, `top_p` or
`min_p` asks for a choice: then the temperature is 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadRequest
from runtime.generation.marked import MarkedJson
from runtime.generation.request import SamplingParams, Tokens


class Tensor(NamedTuple):
    """As `config.pbtxt` has it: -1 is any number, the batch dimension is not written."""

    name: str
    data_type: str
    size: int


class Unbuilt(NamedTuple):
    """An input of TensorRT-LLM's models that is taken where it asks for nothing, which published clients do."""

    tensor: Tensor
    nothing: tuple[Any, ...]


UNBUILT = (
    Unbuilt(Tensor("bad_words", "TYPE_STRING", -1), (b"",)),
    Unbuilt(Tensor("beam_width", "TYPE_INT32", 1), (1,)),
    Unbuilt(Tensor("num_return_sequences", "TYPE_INT32", 1), (1,)),
    Unbuilt(Tensor("length_penalty", "TYPE_FP32", 1), (1.0, 0.0)),  # of beams
    Unbuilt(Tensor("embedding_bias_words", "TYPE_STRING", -1), (b"",)),
    Unbuilt(Tensor("embedding_bias_weights", "TYPE_FP32", -1), (0.0,)),
    Unbuilt(Tensor("num_draft_tokens", "TYPE_INT32", 1), (0,)),
    Unbuilt(Tensor("use_draft_logits", "TYPE_BOOL", 1), (False,)),
    Unbuilt(Tensor("return_context_logits", "TYPE_BOOL", 1), (False,)),
    Unbuilt(Tensor("return_generation_logits", "TYPE_BOOL", 1), (False,)),
    Unbuilt(Tensor("return_perf_metrics", "TYPE_BOOL", 1), (False,)),
)
INPUTS = (
    Tensor("text_input", "TYPE_STRING", 1),
    Tensor("input_ids", "TYPE_INT32", -1),
    Tensor("max_tokens", "TYPE_INT32", 1),
    Tensor("min_length", "TYPE_INT32", 1),
    Tensor("min_tokens", "TYPE_INT32", 1),
    Tensor("stop_words", "TYPE_STRING", -1),
    Tensor("stop_token_ids", "TYPE_INT32", -1),
    Tensor("temperature", "TYPE_FP32", 1),
    Tensor("top_k", "TYPE_INT32", 1),
    Tensor("top_p", "TYPE_FP32", 1),
    Tensor("min_p", "TYPE_FP32", 1),
    Tensor("repetition_penalty", "TYPE_FP32", 1),
    Tensor("presence_penalty", "TYPE_FP32", 1),
    Tensor("frequency_penalty", "TYPE_FP32", 1),
    Tensor("random_seed", "TYPE_UINT64", 1),
    Tensor("seed", "TYPE_UINT64", 1),
    Tensor("end_id", "TYPE_INT32", 1),
    Tensor("pad_id", "TYPE_INT32", 1),
    Tensor("forced_ids", "TYPE_INT32", -1),
    Tensor("logit_bias_ids", "TYPE_INT32", -1),
    Tensor("logit_bias_values", "TYPE_FP32", -1),
    Tensor("guided_decoding_guide_type", "TYPE_STRING", 1),
    Tensor("guided_decoding_guide", "TYPE_STRING", 1),
    Tensor("return_log_probs", "TYPE_BOOL", 1),
    Tensor("top_log_probs", "TYPE_INT32", 1),
    Tensor("return_prompt_log_probs", "TYPE_BOOL", 1),
    Tensor("exclude_input_in_output", "TYPE_BOOL", 1),
    Tensor("add_special_tokens", "TYPE_BOOL", 1),
    Tensor("stream", "TYPE_BOOL", 1),
    *(item.tensor for item in UNBUILT),
)
# A streamed response holds what is new; the last four come with the last response alone. Details are JSON (see
# `token_texts`): of the output where `top_log_probs` was given, of the prompt with `return_prompt_log_probs`.
OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", 1),
    Tensor("output_ids", "TYPE_INT32", -1),
    Tensor("output_log_probs", "TYPE_FP32", -1),
    Tensor("cum_log_probs", "TYPE_FP32", 1),
    Tensor("output_details", "TYPE_STRING", 1),
    Tensor("prompt_details", "TYPE_STRING", 1),
    Tensor("prompt_tokens", "TYPE_INT32", 1),
    Tensor("cached_tokens", "TYPE_INT32", 1),
    Tensor("completion_tokens", "TYPE_INT32", 1),
    Tensor("finish_reason", "TYPE_STRING", 1),
)
# The environment variable in which the launcher gives a server's models a fresh secret id. A request that bears it is
# the launcher's own probe: it is answered as any other, not counted as a request, and not kept.
PROBE_ID_VARIABLE = "TRIREME_PROBE_ID"
# An error in a stream has no gRPC status, so its text begins with it. (Triton gives one to clients that send the header
# `triton_grpc_error`, but Triton 2.51 crashes on it once in some dozens of errors.)
STATUSES = frozenset({"INVALID_ARGUMENT", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "CANCELLED"})
# Triton's own fields and, as some clients have it, the model's name: over HTTP they arrive as parameters. Of these only
# `timeout` is left to do. The last is the gateway's, which takes it from nobody.
_KIND, _MARKED = "guided_decoding_guide_type", "marked_json"
_GUIDES = ("json", "json_schema", _MARKED)
_TRITONS = frozenset({"id", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "model"})
CACHE_SALT = "cache_salt"
_SALT_CHARACTERS = 128


@dataclass(frozen=True, eq=False)
class Asked:
    """A request as it came. Exactly one of `text` and `ids` is set.

    special_tokens   whether the tokenizer puts its own in front of `text` and behind it
    echo             whether the answer's text begins with the prompt's
    timeout_s        the request's own
    schema           of the JSON that the output is to be
    details          whether `output_details` are wanted
    """

    text: str | None
    ids: Tokens | None
    params: SamplingParams
    stream: bool
    special_tokens: bool = True
    echo: bool = False
    timeout_s: float | None = None
    schema: str | MarkedJson | None = None
    details: bool = False


def read_request(tensors: Mapping[str, NDArray[Any]], parameters: Mapping[str, Any] = MappingProxyType({})) -> Asked:
    """`tensors` by name, absent ones left out; `parameters` came beside them.

    Raises BadRequest that says what is wrong with which of them.
    """
    for name in parameters:
        if name not in _TRITONS and name != CACHE_SALT:
            near = difflib.get_close_matches(name, [tensor.name for tensor in INPUTS], 1)
            raise BadRequest(f"unknown parameter {name}" + (f"; did you mean {near[0]}?" if near else ""))
    given = {
        name: array.ravel() for name, array in tensors.items() if array.size or name in ("text_input", "input_ids")
    }
    _require_nothing(given)
    if ("text_input" in given) == ("input_ids" in given):
        raise BadRequest("send one of text_input and input_ids")
    text = _text(given["text_input"], "text_input")[0] if "text_input" in given else None
    if text == "":
        raise BadRequest("text_input is empty; send at least one character")
    ids = None if text is not None else given["input_ids"].astype(np.int64)
    stream = bool(_number(given, "stream", False))
    params = _sampling(given, _salt(parameters.get(CACHE_SALT, "")))
    return Asked(
        text,
        ids,
        params,
        stream,
        special_tokens=bool(_number(given, "add_special_tokens", True)),
        # TensorRT-LLM's streams leave the prompt out, whatever is asked.
        echo=not stream and not _number(given, "exclude_input_in_output", True),
        timeout_s=_timeout(parameters.get("timeout", 0)),
        schema=_schema(given),
        details="top_log_probs" in given and params.logprobs,
    )


def _salt(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _SALT_CHARACTERS:
        raise BadRequest(f"{CACHE_SALT} is no text of at most {_SALT_CHARACTERS} characters")
    return value


def _sampling(given: Mapping[str, NDArray[Any]], salt: str) -> SamplingParams:
    top_k, top_p, min_p = (_number(given, name, off) for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)))
    ends = [given[name].tolist() for name in ("stop_token_ids", "end_id") if name in given]
    if _number(given, "end_id", 0) < 0:
        raise BadRequest("end_id is negative; send a token id, or min_length to go on past the end of the text")
    forced = tuple(given["forced_ids"].tolist()) if "forced_ids" in given else ()
    return SamplingParams(
        forced=forced,
        max_tokens=_number(given, "max_tokens", len(forced) or None),
        min_tokens=_either(given, "min_length", "min_tokens") or 0,
        temperature=_number(given, "temperature", 1.0 if top_k > 0 or top_p < 1.0 or min_p > 0.0 else 0.0),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=_number(given, "repetition_penalty", 1.0),
        presence_penalty=_number(given, "presence_penalty", 0.0),
        frequency_penalty=_number(given, "frequency_penalty", 0.0),
        seed=_either(given, "random_seed", "seed"),
        # Clients that want none send an empty one.
        stop=tuple(word for word in _text(given["stop_words"], "stop_words") if word) if "stop_words" in given else (),
        stop_token_ids=tuple(token for tokens in ends for token in tokens),
        logit_bias=_biases(given),
        logprobs=bool(_number(given, "return_log_probs", False)),
        top_logprobs=_number(given, "top_log_probs", 0),
        prompt_logprobs=bool(_number(given, "return_prompt_log_probs", False)),
        cache_salt=salt,
    )


def _biases(given: Mapping[str, NDArray[Any]]) -> tuple[tuple[int, float], ...]:
    ids, values = (given[name].tolist() if name in given else [] for name in ("logit_bias_ids", "logit_bias_values"))
    if len(ids) != len(values):
        raise BadRequest(f"logit_bias_ids has {len(ids)} tokens and logit_bias_values {len(values)} values; pair them")
    return tuple(zip(ids, values, strict=True))


def _schema(given: Mapping[str, NDArray[Any]]) -> str | MarkedJson | None:
    """Of guided decoding, by the names of TensorRT-LLM's models: any JSON, or that of a schema. A text that may become
    such is more."""
    kind = _first(given, _KIND)
    guide = _first(given, "guided_decoding_guide")
    if kind not in ("", *_GUIDES):
        raise BadRequest(f"guided_decoding_guide_type is {kind[:40]!r}; built here are {', '.join(_GUIDES)}")
    if bool(guide) != (kind in ("json_schema", _MARKED)):
        raise BadRequest(
            "guided_decoding_guide is the schema of guided_decoding_guide_type json_schema or marked_json; send both"
        )
    if kind == _MARKED:
        return MarkedJson.read(guide)
    return "{}" if kind == "json" else guide or None


def _first(given: Mapping[str, NDArray[Any]], name: str) -> str:
    return _text(given[name], name)[0] if name in given else ""


def _timeout(microseconds: Any) -> float | None:
    """In seconds; none for 0, as everywhere in Triton."""
    if isinstance(microseconds, bool) or not isinstance(microseconds, int) or microseconds < 0:
        raise BadRequest(f"timeout is {microseconds!r}; expected a whole number of microseconds")
    return microseconds / 1e6 or None


def _require_nothing(given: Mapping[str, NDArray[Any]]) -> None:
    for (name, _, _), nothing in UNBUILT:
        for value in given[name].tolist() if name in given else ():
            if value not in nothing:
                off = "empty" if nothing == (b"",) else f"as {nothing[0]}"
                got = repr(value.decode(errors="replace")) if isinstance(value, bytes) else value
                raise BadRequest(f"{name} is {got}, which is not built here; leave it out or send it {off}")


def _either(given: Mapping[str, NDArray[Any]], name: str, other: str) -> Any:
    """The older and the newer name of the same input."""
    value, same = _number(given, name, None), _number(given, other, None)
    if value is not None and same is not None and value != same:
        raise BadRequest(f"{name} is {value} and {other} is {same}; they are one thing: send one of them")
    return same if value is None else value


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
