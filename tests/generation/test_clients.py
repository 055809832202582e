"""Requests as the published clients of TensorRT-LLM's Triton models make them, to a real Triton."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc as triton_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from runtime.errors import BadRequest
from runtime.generation.interface import read_request
from runtime.generation.opening import TextTokenizer
from runtime.server.launch import TritonServer
from runtime.server.supervise import ready_server
from tests.generation.setup import VOCABULARY, write_repository, write_tokenizer

pytest_plugins = ("tests.generation.fixtures",)

PROMPT = "open a file"
LONGEST = 512


@pytest.fixture(scope="module")
def server(decoder_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    settings = {"executor": "openvino", "capacities": (LONGEST,), "max_length": LONGEST, "end_ids": ()}
    root = write_repository(tmp_path_factory.mktemp("repository"), decoder_graph, **settings)
    with ready_server(root) as running:
        yield running


def _stream(server: TritonServer, arrays: dict[str, Any], outputs: tuple[str, ...] = (), **options: Any) -> list[Any]:
    """As `end_to_end_grpc_client.py` asks: a stream, closed after one request. Raises what the server said."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    inputs = []
    for name, array in arrays.items():
        item = triton_grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        item.set_data_from_numpy(array)
        inputs.append(item)
    wanted = [triton_grpc.InferRequestedOutput(name) for name in outputs] or None
    with triton_grpc.InferenceServerClient(server.grpc_address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("tiny", inputs, outputs=wanted, **options)
        client.stop_stream()
    results = []
    while not answers.empty():
        result, error = answers.get()
        if error is not None:
            raise error
        results.append(result)
    return results


def _end_to_end(**changes: Any) -> dict[str, Any]:
    """The tensors of `end_to_end_grpc_client.py` with its defaults, but that it samples at temperature 1."""
    arrays = {
        "text_input": np.array([[PROMPT]]).astype(object),
        "max_tokens": np.ones((1, 1), np.int32) * 12,
        "stream": np.array([[False]]),
        "beam_width": np.array([[1]], np.int32),
        "temperature": np.array([[0.0]], np.float32),
        "exclude_input_in_output": np.array([[True]]),
    }
    return arrays | changes


def _generate(server: TritonServer, body: dict[str, Any], path: str = "generate") -> tuple[int, str]:
    # curl's own content type, which the published examples leave as it is
    request = urllib.request.Request(
        f"http://{server.http_address}/v2/models/tiny/{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.triton
def test_the_grpc_client(server: TritonServer) -> None:
    outputs = ("text_output", "cum_log_probs", "output_log_probs")
    logprobs = {"return_log_probs": np.array([[True]])}
    (whole,) = _stream(server, _end_to_end(**logprobs), outputs)
    text = whole.as_numpy("text_output")[0].decode("utf-8")  # as the client reads it
    assert text
    assert whole.as_numpy("cum_log_probs")[0][0] == pytest.approx(whole.as_numpy("output_log_probs").sum(), rel=1e-4)

    parts = _stream(server, _end_to_end(stream=np.array([[True]])), ("text_output",))
    assert "".join(part.as_numpy("text_output")[0].decode("utf-8") for part in parts) == text

    extra = {
        "num_return_sequences": np.array([[1]], np.int32),
        "end_id": np.array([[2]], np.int32),
        "pad_id": np.array([[2]], np.int32),
        "random_seed": np.array([[7]], np.uint64),
        "repetition_penalty": np.array([[1.0]], np.float32),
        "exclude_input_in_output": np.array([[False]]),
    }
    (echoed,) = _stream(server, _end_to_end(**extra), ("text_output",), request_id="7")
    assert echoed.as_numpy("text_output")[0].decode("utf-8") == PROMPT + text

    with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT: bad_words is 'x', which is not built here"):
        _stream(server, _end_to_end(bad_words=np.array([["x"]], dtype=object)))


@pytest.mark.triton
def test_the_examples_of_the_generate_endpoint(server: TritonServer) -> None:
    asked = {"text_input": PROMPT, "max_tokens": 12}
    status, body = _generate(server, asked)
    text = json.loads(body)["text_output"]
    assert status == 200
    for more in (
        {"bad_words": "", "stop_words": ""},
        {"bad_words": [], "stop_words": [], "pad_id": 2, "end_id": 2},
        {"text_input": [PROMPT], "max_tokens": [12], "min_length": [12], "exclude_input_in_output": [True]},
        {"id": "42", "beam_width": 1, "length_penalty": 1.0, "random_seed": 7, "top_k": 0, "top_p": 1.0},
    ):
        status, body = _generate(server, asked | more)
        assert (status, json.loads(body).get("text_output")) == (200, text), body
    status, body = _generate(server, asked | {"stream": True}, "generate_stream")
    parts = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]
    assert "".join(part["text_output"] for part in parts) == text


@pytest.mark.triton
def test_tokens_of_a_stop_word_are_neither_sent_nor_counted(server: TritonServer) -> None:
    whole = json.loads(_generate(server, {"text_input": PROMPT, "max_tokens": 30})[1])
    stop = whole["text_output"][6:9]
    cut = whole["text_output"].index(stop)
    answer = json.loads(_generate(server, {"text_input": PROMPT, "max_tokens": 30, "stop_words": [stop]})[1])
    assert answer["text_output"] == whole["text_output"][:cut]
    assert answer["output_ids"] == whole["output_ids"][: len(answer["output_ids"])]
    assert answer["completion_tokens"] == len(answer["output_ids"]) < 30


@pytest.mark.triton
def test_tritons_own_fields(server: TritonServer) -> None:
    (answer,) = _stream(server, _end_to_end(), request_id="a-1", priority=2, timeout=60_000_000)
    assert answer.get_response().id == "a-1"
    late = _end_to_end(max_tokens=np.array([[LONGEST - 20]], np.int32))
    with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED: the request's time ran out"):
        _stream(server, late, timeout=1)
    body = {"text_input": PROMPT, "max_tokens": LONGEST - 20, "priority": 1}
    assert "DEADLINE_EXCEEDED: the request's time ran out" in _generate(server, body | {"timeout": 1})[1]
    assert _generate(server, body | {"max_tokens": 2, "timeout": 60_000_000})[0] == 200


@pytest.mark.triton
def test_a_large_prompt_is_refused_by_its_length(server: TritonServer) -> None:
    for text in ("a file " * 150_000, " " * 1_000_000 + "x"):
        with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT: text_input has \d+ characters"):
            _stream(server, _end_to_end(text_input=np.array([[text]], object)))


def test_a_prompt_that_brings_its_own_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    file = write_tokenizer(tmp_path / "tokenizer.json")
    fast = Tokenizer.from_file(str(file))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(file))
    tokenizer = TextTokenizer(file, VOCABULARY, 64)

    def prompt(text: str, **tensors: Any) -> list[int]:
        given = {"text_input": np.array([[text.encode()]], object)}
        return tokenizer.prompt(read_request({**given, **tensors})).tolist()

    assert prompt("open")[0] == 1
    assert prompt("<s>open") == [1, *prompt("open")]
    assert prompt("<s>open", add_special_tokens=np.array([[False]])) == prompt("open")
    with pytest.raises(BadRequest, match=r"text_input has 7000 characters, which are too many: .* at most 64 tokens"):
        prompt("a file " * 1000)
