"""KServe's inference, parsed and built again, over a model server of a few lines."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.gateway.asking import FakeTriton, Got, door_of, get, post

PATH = "/v2/models/m/infer"
TEXT = {"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": [["a"], ["bc"]]}


def _infer(triton: FakeTriton, **changes: Any) -> Got:
    return post(door_of(triton), PATH, {"inputs": [TEXT], **changes})


def _binary(triton: FakeTriton, header: dict[str, Any], data: bytes, length: int | None = None) -> Got:
    text = json.dumps(header).encode()
    size = str(len(text) if length is None else length)
    return post(door_of(triton), PATH, text + data, {"inference-header-content-length": size})


def test_json_in_and_out() -> None:
    triton = FakeTriton()
    got = _infer(triton, id="mine", parameters={"prompt_name": "query"}, outputs=[{"name": "embedding"}]).json
    assert (got["model_name"], got["model_version"], got["id"]) == ("m", "3", "mine")
    assert got["outputs"][0] == {"name": "embedding", "datatype": "FP32", "shape": [2, 2], "data": [0.0, 1.0, 2.0, 3.0]}
    inputs, outputs, request_id, parameters = triton.asked[0]
    assert inputs[0].data == b"\x01\0\0\0a\x02\0\0\0bc"
    assert (outputs, parameters) == (["embedding"], {"prompt_name": "query"})
    assert request_id != "mine", "the server is told our id"


def test_binary_in_and_out() -> None:
    data = b"\x01\0\0\0a\x02\0\0\0bc"
    item = {"name": "text", "shape": [2, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    got = _binary(FakeTriton(), {"inputs": [item], "parameters": {"binary_data_output": True}}, data)
    length = int(got.headers["inference-header-content-length"])
    header = json.loads(got.body[:length])
    assert [out["parameters"]["binary_data_size"] for out in header["outputs"]] == [16, 8]
    assert np.frombuffer(got.body[length : length + 16], np.float32).tolist() == [0.0, 1.0, 2.0, 3.0]


def _tensor(datatype: str, shape: list[int], data: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}]}


@pytest.mark.parametrize(
    ("datatype", "data", "want"),
    [
        ("INT32", [1, [-2]], None),
        ("INT32", [1, -2], np.array([1, -2], np.int32)),
        ("INT32", [[1], [-2]], np.array([1, -2], np.int32)),
        ("INT8", [1, 128], None),
        ("UINT64", [0, 2**64 - 1], np.array([0, 2**64 - 1], np.uint64)),
        ("UINT8", [-1, 2], None),
        ("INT64", [1.5, 2], None),
        ("FP32", [1, 2.5], np.array([1, 2.5], np.float32)),
        ("BOOL", [True, False], np.array([True, False])),
        ("BOOL", [1, 0], None),
        ("FP32", ["1", "2"], None),
        ("FP32", [1, 2, 3], None),
        ("BYTES", [1, 2], None),
        ("BF16", [1, 2], None),
        ("FP32", [{}, []], None),
    ],
)
def test_json_tensors_fit_or_are_refused(datatype: str, data: Any, want: Any) -> None:
    triton = FakeTriton()
    got = post(door_of(triton), PATH, _tensor(datatype, [2], data))
    if want is None:
        assert got.status == 400
        assert not triton.asked
    else:
        assert triton.asked[0][0][0].data == want.tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"shared_memory_region": "x"}},
        {"parameters": {"sequence_id": 5}},
        {"parameters": {"timeout": "soon"}},
        {"inputs": [{**TEXT, "parameters": {"shared_memory_region": "x", "shared_memory_byte_size": 4}}]},
        {"inputs": [{**TEXT, "parameters": {"binary_data_size": 4}}]},
        {"inputs": [{**TEXT, "shape": [-2, 1]}]},
        {"inputs": [{**TEXT, "shape": [2] * 17}]},
        {"inputs": [{key: value for key, value in TEXT.items() if key != "data"}]},
        {"inputs": []},
        {"outputs": [{"name": "embedding", "parameters": {"classification": 3}}]},
        {"outputs": [{"name": "embedding", "parameters": {"shared_memory_region": "x"}}]},
        {"model": "m"},
    ],
)
def test_what_a_request_cannot_have(changes: dict[str, Any]) -> None:
    triton = FakeTriton()
    assert _infer(triton, **changes).status == 400
    assert not triton.asked


@pytest.mark.parametrize(
    ("size", "shape", "data", "length"),
    [
        (5, [1, 1], b"\x01\0\0\0", None),  # shorter than it says
        (4, [1, 1], b"\x01\0\0\0a", None),  # longer
        (5, [1, 1], b"\x09\0\0\0a", None),  # an element that ends beyond
        (5, [2, 1], b"\x01\0\0\0a", None),  # one where two are said
        (10, [1, 1], b"\x01\0\0\0a\x01\0\0\0b", None),
        (-1, [1, 1], b"", None),
        (1 << 40, [1, 1], b"", None),
        (5, [1, 1], b"\x01\0\0\0a", 1 << 40),
        (5, [1 << 31, 1 << 31], b"\x01\0\0\0a", None),
    ],
)
def test_binary_sizes_are_of_the_body(size: int, shape: list[int], data: bytes, length: int | None) -> None:
    triton = FakeTriton()
    item = {"name": "text", "shape": shape, "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    assert _binary(triton, {"inputs": [item]}, data, length).status == 400
    assert not triton.asked


def test_a_generator_is_not_for_one_answer() -> None:
    assert "use /v1/completions" in _infer(FakeTriton(generates=True)).json["error"]


def test_the_servers_own_page_stands_where_kserves_description_has_it_too() -> None:
    door = door_of(FakeTriton())
    assert get(door, "/v2/").json == get(door, "/v2").json
    assert get(door, "/v2/models/").status == 404
