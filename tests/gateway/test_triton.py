"""The gateway before real Tritons: clients that people have, and what ends a Triton sent through the door."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
from tokenizers import Tokenizer
from tritonclient import http as triton_http
from tritonclient.utils import InferenceServerException

from builders.judging import corpus
from builders.pipeline import Build
from runtime.channel import connect, infer_input
from runtime.client import stream
from runtime.server.launch import TritonServer
from tests import generators
from tests.conftest import wait_until
from tests.gateway.asking import exchange_raw, gateway_ports, post_json, running
from tests.gateway.conftest import CHANGES, LONGEST
from tests.gateway.killers import killers

pytestmark = pytest.mark.triton

TEXTS = corpus.texts(None, 70)


@pytest.fixture(scope="module")
def ports(server: TritonServer) -> Iterator[dict[str, int]]:
    options = ("--grpc-port", "0", "--repository", str(server.repository))
    with gateway_ports("minilm", server.ports.http, server.ports.metrics, *options) as found:
        yield found


@pytest.fixture(scope="module")
def port(ports: dict[str, int]) -> int:
    return ports["gateway"]


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_vectors_are_those_of_triton(client: openai.OpenAI, server: TritonServer, minilm: Build) -> None:
    """More texts than one batch; base64, which this client asks for by itself, and numbers."""
    direct = _triton_vectors(server.http_address, TEXTS[:64])
    coded = client.embeddings.create(model="minilm", input=TEXTS, extra_body={"truncate": True})  # two are longer
    plain = client.embeddings.create(model="minilm", input=TEXTS[0], encoding_format="float")
    assert len(coded.data) == 70
    got = np.array([item.embedding for item in coded.data], np.float32)
    assert np.allclose(got[:64], direct, atol=0.02)  # batches of other sizes differ in bf16
    assert np.allclose(np.array(plain.data[0].embedding), got[0], atol=0.02)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 2
    assert [model.id for model in client.models.list().data] == ["minilm"]


def _triton_vectors(address: str, texts: list[str], binary: bool = True) -> np.ndarray:
    with triton_http.InferenceServerClient(address) as triton:
        item = triton_http.InferInput("text", [len(texts), 1], "BYTES")
        item.set_data_from_numpy(np.array([[text.encode()] for text in texts], np.object_), binary_data=binary)
        outputs = [triton_http.InferRequestedOutput("embedding", binary_data=binary)]
        return np.asarray(triton.infer("minilm", [item], outputs=outputs).as_numpy("embedding"))


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_own_client_gets_the_same_through_the_door(port: int, server: TritonServer, binary: bool) -> None:
    through = _triton_vectors(f"127.0.0.1:{port}", TEXTS[:8], binary)
    assert np.array_equal(through, _triton_vectors(server.http_address, TEXTS[:8], binary))


def test_tritons_own_client_asks_about_the_model(port: int, server: TritonServer) -> None:
    with (
        triton_http.InferenceServerClient(f"127.0.0.1:{port}") as door,
        triton_http.InferenceServerClient(server.http_address) as triton,
    ):
        assert door.is_server_live()
        assert door.is_server_ready()
        assert door.is_model_ready("minilm")
        assert not door.is_model_ready("minilm-encoder")
        assert door.get_model_metadata("minilm") == triton.get_model_metadata("minilm")
        shown, whole = door.get_model_config("minilm", "1"), triton.get_model_config("minilm")
        assert set(shown) == {"name", "platform", "max_batch_size", "input", "output", "model_transaction_policy"}
        assert "minilm-encoder" not in str(shown)
        for side in ("input", "output"):
            assert [{**own, **told} for told, own in zip(shown[side], whole[side], strict=True)] == whole[side]
        for forbidden in (
            door.get_model_repository_index, door.get_system_shared_memory_status, door.get_trace_settings,
            door.get_log_settings, lambda: door.unload_model("minilm"), lambda: door.get_inference_statistics("minilm"),
        ):  # fmt: skip
            with pytest.raises(InferenceServerException, match="no such path"):
                forbidden()


@pytest.mark.parametrize(
    ("texts", "said"),
    [(["fine", ""], "input[1] is empty"), ([" \n"], "input[0] is empty")],
)
def test_what_the_model_refuses_is_the_callers_fault(client: openai.OpenAI, texts: list[str], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="minilm", input=texts)
    assert said in caught.value.message


def test_a_text_that_is_too_long_is_cut_only_where_that_is_asked(client: openai.OpenAI) -> None:
    words = "word " * 2000
    with pytest.raises(openai.BadRequestError, match="prompt_name is 'of nobody'") as strange:
        client.embeddings.create(model="minilm", input="x", extra_body={"prompt_name": "of nobody"})
    assert strange.value.body["param"] == "prompt_name"  # type: ignore[index]
    with pytest.raises(openai.APIStatusError, match=r"input\[1\] has more tokens than the model takes") as caught:
        client.embeddings.create(model="minilm", input=["short", words])
    assert (caught.value.status_code, caught.value.body["param"]) == (413, "input")  # type: ignore[index]
    cut = client.embeddings.create(model="minilm", input=words, extra_body={"truncate": True})
    assert len(cut.data[0].embedding) == 384
    assert cut.usage.prompt_tokens == 256


def test_many_at_once_get_their_own(client: openai.OpenAI) -> None:
    def vector(text: str) -> np.ndarray:
        made = client.embeddings.create(model="minilm", input=text, extra_body={"truncate": True})
        return np.array(made.data[0].embedding)

    alone = [vector(text) for text in TEXTS[:16]]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(vector, TEXTS[:16]))
    assert all(float(one @ other) > 0.999 for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v2/models/minilm/infer", "/metrics"])
def test_what_ends_a_triton_does_not_reach_it(
    port: int, server: TritonServer, client: openai.OpenAI, path: str
) -> None:
    pid = server.pid
    for name, parts in killers(path).items():
        answer = exchange_raw(port, *parts)
        assert not answer or answer.startswith(b"HTTP/1.1 4"), (name, answer[:200])
    server.require_alive()
    assert server.pid == pid
    assert len(client.embeddings.create(model="minilm", input="still here").data[0].embedding) == 384


def test_tritons_grpc_client_gets_the_same_through_the_door(ports: dict[str, int], server: TritonServer) -> None:
    """The client as it is, compressed and in a stream too; and what it cannot do here."""
    rows = infer_input("text", np.array([[text.encode()] for text in TEXTS[:8]], np.object_))
    with connect(f"127.0.0.1:{ports['grpc']}") as door, connect(server.grpc_address) as triton:
        direct = triton.infer("minilm", [rows]).as_numpy("embedding")
        assert np.array_equal(door.infer("minilm", [rows], request_id="mine").as_numpy("embedding"), direct)
        for algorithm in ("gzip", "deflate"):
            through = door.infer(
                "minilm", [rows], model_version="1", compression_algorithm=algorithm, timeout=9_000_000
            )
            assert np.array_equal(through.as_numpy("embedding"), direct)
        assert door.is_server_live()
        assert door.is_server_ready()
        assert door.is_model_ready("minilm")
        assert door.get_model_metadata("minilm") == triton.get_model_metadata("minilm")
        answers: SimpleQueue[Any] = SimpleQueue()
        door.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(5):
            door.async_stream_infer("minilm", [rows], request_id=str(number), enable_empty_final_response=True)
        found = [answers.get(timeout=60) for _ in range(5)]
        door.stop_stream()
        assert [error for _, error in found] == [None] * 5
        assert [result.get_response().id for result, _ in found] == list("01234"), "in the order of the requests"
        assert all(np.allclose(result.as_numpy("embedding"), direct, atol=0.02) for result, _ in found)
        for forbidden in (
            door.get_model_repository_index, door.get_system_shared_memory_status, door.get_trace_settings,
            door.get_log_settings, lambda: door.unload_model("minilm"), lambda: door.get_inference_statistics("minilm"),
        ):  # fmt: skip
            with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
                forbidden()


def test_an_embedder_ranks_by_cosine_and_tells_its_tokens(port: int) -> None:
    texts = ["Bread is baked in an oven.", "A file is opened for reading."]
    status, ranks = post_json(port, "/rerank", {"query": "How do I open a file?", "texts": texts})
    assert (status, [one["index"] for one in ranks]) == (200, [1, 0])
    ask = {"model": "minilm", "text_1": "How do I open a file?", "text_2": texts}
    scores = [one["score"] for one in post_json(port, "/v1/score", ask)[1]["data"]]
    assert np.allclose(sorted(scores), sorted(one["score"] for one in ranks), atol=0.02)
    status, [tokens] = post_json(port, "/tokenize", {"inputs": "Open a file"})
    assert [token["text"] for token in tokens] == ["[CLS]", "open", "a", "file", "[SEP]"]
    assert [(token["start"], token["stop"]) for token in tokens[1:4]] == [(0, 4), (5, 6), (7, 11)]
    ids = [token["id"] for token in tokens]
    assert post_json(port, "/decode", {"ids": ids})[1] == ["open a file"]
    assert post_json(port, "/detokenize", {"model": "minilm", "tokens": ids})[1] == {
        "prompt": "[CLS] open a file [SEP]"
    }
    assert post_json(port, "/decode", {"ids": [10**9]})[0] == 400
    long = {"query": "x", "texts": ["fine", "word " * 2000]}
    assert "texts[1] has more" in post_json(port, "/rerank", long)[1]["error"]
    assert post_json(port, "/rerank", {**long, "truncate": True})[0] == 200


def test_metrics_are_on_one_page(port: int, client: openai.OpenAI) -> None:
    client.embeddings.create(model="minilm", input="counted")
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode()
    assert 'trireme_gateway_requests_total{route="/v1/embeddings",status="200"}' in page
    assert "nv_inference_count{" in page
    assert "trireme_model_info{" in page


@pytest.fixture(scope="module")
def chat(text_ports: dict[str, int]) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{text_ports['gateway']}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_a_completion_is_what_triton_gives(chat: openai.OpenAI, generator: TritonServer) -> None:
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 7}
    direct = list(stream(generator.grpc_address, "tiny-lm", "open a file", options))
    whole = chat.completions.create(model="tiny-lm", prompt="open a file", max_tokens=12, seed=7)
    assert whole.choices[0].text == "".join(chunk.text for chunk in direct)
    assert whole.choices[0].finish_reason == direct[-1].finish == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (direct[-1].prompt_tokens, 12)
    events = list(
        chat.completions.create(
            model="tiny-lm", prompt="open a file", max_tokens=12, seed=7, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
    assert events[-1].usage == whole.usage


def test_a_stop_word_ends_a_completion(chat: openai.OpenAI) -> None:
    ask = {"model": "tiny-lm", "prompt": "open a file", "max_tokens": 30, "temperature": 0}
    whole = chat.completions.create(**ask).choices[0].text
    stopped = chat.completions.create(**ask, stop=whole[6:9]).choices[0]
    assert stopped.text == whole[: whole.index(whole[6:9])]
    assert stopped.finish_reason == "stop"


def test_a_chat_is_the_templates_text_and_begins_once(chat: openai.OpenAI, generator: TritonServer) -> None:
    text = "<s>system: be brief user: hi "
    options = {"max_tokens": 10, "add_special_tokens": False}
    direct = list(stream(generator.grpc_address, "tiny-lm", text, options))
    ask = {
        "model": "tiny-lm", "max_tokens": 10, "temperature": 0,
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    }  # fmt: skip
    whole = chat.chat.completions.create(**ask)
    assert whole.choices[0].message.content == "".join(chunk.text for chunk in direct)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == direct[-1].prompt_tokens
    events = list(chat.chat.completions.create(**ask, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole.choices[0].message.content
    assert events[-1].choices[0].finish_reason == "length"


def test_log_probabilities_are_those_of_transformers(chat: openai.OpenAI, llama: Build) -> None:
    """As lm-evaluation-harness asks for them: the prompt's own, and whether each token was the likeliest."""
    prompts = ["open a file", "sort a list of numbers, then read it again"]
    got = chat.completions.create(
        model="tiny-lm", prompt=prompts, max_tokens=1, temperature=0, logprobs=5, echo=True, seed=1
    )
    assert llama.entry is not None
    fast = Tokenizer.from_file(str(llama.entry.repository / "tiny-lm" / "1" / "tokenizer.json"))
    model = generators.make_generator("llama", **CHANGES)
    for prompt, choice in zip(prompts, got.choices, strict=True):
        told, ids = choice.logprobs, fast.encode(prompt).ids
        assert told is not None
        logits = generators.eager_logits(model, input_ids=ids).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert told.tokens is not None
        assert told.token_logprobs is not None
        assert told.top_logprobs is not None
        assert told.token_logprobs[0] is None
        expected = [exact[place, token] for place, token in enumerate(ids[1:])]
        assert told.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=5e-3)
        assert (
            max(told.top_logprobs[-1].values()) == told.token_logprobs[-1] == pytest.approx(exact[-1].max(), abs=5e-3)
        )
        assert choice.text.startswith(prompt)
        assert "".join(told.tokens[1 : len(ids)]) == prompt
    scored = chat.completions.create(model="tiny-lm", prompt=prompts[0], max_tokens=0, logprobs=0, echo=True)
    assert got.choices[0].logprobs is not None
    assert scored.choices[0].logprobs is not None
    first = got.choices[0].logprobs.token_logprobs
    assert first is not None
    assert scored.choices[0].logprobs.token_logprobs == first[:-1]
    assert scored.choices[0].finish_reason == "length"


def test_several_choices_share_their_prompt(chat: openai.OpenAI) -> None:
    ask = {"model": "tiny-lm", "prompt": "a prompt that nobody has sent", "max_tokens": 6, "seed": 5, "n": 2}
    whole = chat.completions.create(**ask)
    texts = [choice.text for choice in whole.choices]
    streamed = ["", ""]
    for event in chat.completions.create(**ask, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    again = chat.completions.create(**{**ask, "n": 1})
    assert streamed == texts
    assert texts[0] == again.choices[0].text != texts[1]
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}, "mode": {"enum": ["read", "write"]}, "at": {"enum": [1, 2, 30]}},
    "required": ["open", "mode", "at"],
    "additionalProperties": False,
}
USER: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "open a file"}]


def test_answers_keep_to_a_schema_beside_others(chat: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "file", "schema": SCHEMA, "strict": True}}

    def ask(number: int) -> openai.types.chat.ChatCompletion:
        return chat.chat.completions.create(
            model="tiny-lm", messages=USER, seed=number, max_tokens=60,
            response_format=form if number % 2 else openai.NOT_GIVEN,
        )  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, range(4)))
    for number, answer in enumerate(together):
        if number % 2:
            assert answer.choices[0].finish_reason == "stop"
            jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)
    assert ask(1).choices[0].message.content == together[1].choices[0].message.content
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}
    with pytest.raises(openai.BadRequestError, match=r"response_format: .*Invalid type: objekt"):
        chat.chat.completions.create(model="tiny-lm", messages=USER, response_format=bad)


def test_a_tool_is_called(chat: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("open", "close")]
    whole = chat.chat.completions.create(model="tiny-lm", messages=USER, tools=tools, tool_choice="required", seed=3)
    calls = whole.choices[0].message.tool_calls
    assert calls is not None
    assert whole.choices[0].finish_reason == "tool_calls"
    jsonschema.validate(json.loads(calls[0].function.arguments), SCHEMA)
    named = {"type": "function", "function": {"name": "close"}}
    with chat.chat.completions.stream(
        model="tiny-lm", messages=USER, tools=tools, tool_choice=named, seed=3
    ) as stream_of_it:  # the client's own reading of a stream
        final = stream_of_it.get_final_completion().choices[0].message.tool_calls
    assert final is not None
    assert final[0].function.name == "close"
    jsonschema.validate(json.loads(final[0].function.arguments), SCHEMA)


LONG = {"model": "tiny-lm", "prompt": "x", "max_tokens": LONGEST - 8, "extra_body": {"min_tokens": LONGEST - 8}}


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_slot(chat: openai.OpenAI, generator: TritonServer, streamed: bool) -> None:
    if streamed:
        events = chat.completions.create(**LONG, stream=True)
        next(events)
        events.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            chat.with_options(timeout=1.0).completions.create(**LONG)
    assert wait_until(lambda: running(generator) == 0, 30)


def test_a_full_queue_is_429_and_says_when_to_come_again(chat: openai.OpenAI, generator: TritonServer) -> None:
    """Two run and two wait: of eight more, all are refused while those run."""
    held = [chat.completions.create(**LONG, stream=True) for _ in range(2)]
    for one in held:
        next(one)
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(chat.completions.create, model="tiny-lm", prompt="x", max_tokens=1) for _ in range(10)]
        assert wait_until(lambda: sum(one.done() for one in asked) >= 8, 60)
        for one in held:
            one.close()
        refused = [error for one in asked if (error := one.exception(60)) is not None]
    assert len(refused) == 8
    for error in refused:
        assert isinstance(error, openai.RateLimitError), error
        assert error.response.headers["retry-after"] == "1"
    assert wait_until(lambda: running(generator) == 0, 30)


def test_what_ends_a_triton_does_not_reach_a_generator(chat: openai.OpenAI, generator: TritonServer) -> None:
    port, pid = int(str(chat.base_url.port)), generator.pid
    for path in ("/v1/completions", "/v1/chat/completions"):
        for name, parts in killers(path).items():
            answer = exchange_raw(port, *parts)
            assert not answer or answer.startswith(b"HTTP/1.1 4"), (name, answer[:200])
    generator.require_alive()
    assert generator.pid == pid
    assert chat.completions.create(model="tiny-lm", prompt="x", max_tokens=2).usage is not None
