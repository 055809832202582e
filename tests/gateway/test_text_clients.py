"""TensorRT-LLM's way to ask for text, and Triton's gRPC client, through the door before a real Triton."""

from __future__ import annotations

import urllib.request
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from runtime.channel import connect, infer_input
from runtime.client import stream
from runtime.errors import InputError
from runtime.server.launch import TritonServer
from tests.conftest import wait_until
from tests.gateway.asking import post_events, post_json, running
from tests.gateway.conftest import LONGEST

pytestmark = pytest.mark.triton

GENERATE = "/v2/models/tiny-lm/generate"
PROMPT = {"text_input": "open a file", "max_tokens": 12, "temperature": 1.0, "random_seed": 7}


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"stop_words": ""}, {"return_log_probs": True, "id": "mine"}, {"exclude_input_in_output": False},
        {"parameters": {"top_k": 3}}, {"text_input": None, "input_ids": [5, 6, 7], "exclude_input_in_output": False},
    ],
)  # fmt: skip
def test_generate_is_what_triton_gives(
    text_ports: dict[str, int], generator: TritonServer, changes: dict[str, Any]
) -> None:
    asked = {name: value for name, value in {**PROMPT, **changes}.items() if value is not None}
    status, through = post_json(text_ports["gateway"], GENERATE, asked)
    direct = post_json(generator.ports.http, GENERATE, asked)[1]
    direct["cached_tokens"] = through["cached_tokens"]  # the second to ask finds what the first has left
    assert (status, through) == (200, direct)
    assert through.get("id") == changes.get("id")


def test_generate_stream_is_what_triton_gives(text_ports: dict[str, int], generator: TritonServer) -> None:
    asked = {**PROMPT, "stream": True}
    both = [post_events(port, f"{GENERATE}_stream", asked) for port in (generator.ports.http, text_ports["gateway"])]
    direct, through = both
    assert len(through) > 1
    for name in ("text_output", "output_ids"):
        assert _joined(through, name) == _joined(direct, name)
    last = [
        {name: value for name, value in one[-1].items() if name not in ("text_output", "output_ids")} for one in both
    ]
    assert last[0] == last[1]  # but for where the pieces begin
    [whole] = post_events(text_ports["gateway"], f"{GENERATE}_stream", PROMPT)
    assert whole == post_json(generator.ports.http, GENERATE, PROMPT)[1]


def _joined(events: list[dict[str, Any]], name: str) -> list[Any]:
    parts = [event[name] if isinstance(event[name], list) else [event[name]] for event in events]
    return [one for part in parts for one in ("".join(part) if name == "text_output" else part)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_tokens": "many"}, "max_tokens is not INT32"), ({"tempreature": 1}, "did you mean temperature"),
        ({"max_tokens": 1 << 31}, "out of its range"), ({"sequence_id": 5}, "unknown field sequence_id"),
        ({"temperature": -1}, "temperature is -1"), ({"beam_width": 4}, "beam_width is 4"),
        ({"model": "x"}, "no model"),
        ({"parameters": {"max_tokens": 3}}, "stands in the body and in its parameters"),
    ],
)  # fmt: skip
def test_what_generate_does_not_take(text_ports: dict[str, int], changes: dict[str, Any], said: str) -> None:
    status, told = post_json(text_ports["gateway"], GENERATE, {**PROMPT, **changes})
    assert status in (400, 404)
    assert said in told["error"]


def test_a_generators_grpc_client_streams_through_the_door(text_ports: dict[str, int], generator: TritonServer) -> None:
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 7}
    door = f"127.0.0.1:{text_ports['grpc']}"
    direct, through = (list(stream(one, "tiny-lm", "open a file", options)) for one in (generator.grpc_address, door))
    assert "".join(chunk.text for chunk in through) == "".join(chunk.text for chunk in direct)
    assert [token for chunk in through for token in chunk.tokens] == [
        token for chunk in direct for token in chunk.tokens
    ]
    assert through[-1] == replace(direct[-1], text=through[-1].text, tokens=through[-1].tokens)
    with pytest.raises(InputError, match="temperature is -1"):
        list(stream(door, "tiny-lm", "x", {"temperature": -1.0}))
    with connect(door) as client:
        config = client.get_model_config("tiny-lm", as_json=True)["config"]
        assert config["model_transaction_policy"] == {"decoupled": True}
        assert {item["name"] for item in config["input"] if item.get("optional")} >= {"max_tokens", "temperature"}
        assert str(generator.repository) not in str(config)
    with connect(door) as client, pytest.raises(InferenceServerException, match="use ModelStreamInfer"):
        client.infer("tiny-lm", [infer_input("text_input", np.array([[b"x"]], np.object_))])


def test_a_grpc_client_that_leaves_frees_its_slot(text_ports: dict[str, int], generator: TritonServer) -> None:
    options = {"max_tokens": LONGEST - 8, "min_length": LONGEST - 8}
    pieces = stream(f"127.0.0.1:{text_ports['grpc']}", "tiny-lm", "x", options)
    next(pieces)
    pieces.close()
    assert wait_until(lambda: running(generator) == 0, 30)


@pytest.mark.parametrize("path", [GENERATE, f"{GENERATE}_stream"])
def test_a_generate_client_that_leaves_frees_its_slot(
    text_ports: dict[str, int], generator: TritonServer, path: str
) -> None:
    asked = {"text_input": "x", "max_tokens": LONGEST - 8, "min_length": LONGEST - 8}
    with pytest.raises(TimeoutError):
        post_json(text_ports["gateway"], path, {**asked, "stream": False}, timeout_s=1.0)
    assert wait_until(lambda: running(generator) == 0, 30)


def test_a_generators_figures_have_vllms_names_too(text_ports: dict[str, int]) -> None:
    url = f"http://127.0.0.1:{text_ports['gateway']}/metrics"
    page = urllib.request.urlopen(url, timeout=20).read().decode()
    figures = {line.partition(" ")[0]: line.partition(" ")[2] for line in page.splitlines() if not line.startswith("#")}
    label = '{model_name="tiny-lm"}'
    assert float(figures[f"vllm:num_requests_running{label}"]) == 0
    assert float(figures[f"vllm:generation_tokens_total{label}"]) > 0
    assert float(figures[f"vllm:time_to_first_token_seconds_count{label}"]) > 0
    own = 'trireme_gateway_version_requests_total{version="1",role="served"}'
    assert float(figures[own]) > 0
