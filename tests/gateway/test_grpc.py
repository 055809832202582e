"""The gRPC side over a model server of a few lines: who may ask, what a message may be, and what is no message."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from runtime.gateway.app import Doors
from runtime.gateway.grpc_kserve import read_infer
from runtime.gateway.keys import Keys
from runtime.gateway.limits import DoorLimits
from runtime.gateway.refused import Refused
from runtime.gateway.versions import Neighbour, Place
from tests.gateway.asking import FakeTriton, doors_of, get

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
KEYS = Keys({hashlib.sha256(b"right").digest(): "ann"})
Metadata = tuple[tuple[str, str], ...]


def _request(**changes: Any) -> Any:
    tensor = kserve.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[1, 1])
    return kserve.ModelInferRequest(
        **{"model_name": "m", "inputs": [tensor], "raw_input_contents": [b"\x01\0\0\0a"], **changes}
    )


async def _with(doors: Doors, work: Callable[[Any], Awaitable[Any]]) -> Any:
    server, port = await doors.grpc.open("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            return await asyncio.wait_for(work(channel), 60)
    finally:
        await server.stop(0)
        for file in doors.files:
            file.close()


def _ask(doors: Doors, message: bytes, metadata: Metadata = (), path: str = INFER) -> tuple[str, Any]:
    """The status, and the answer or what was said."""

    async def work(channel: Any) -> tuple[str, Any]:
        try:
            return "OK", await channel.unary_unary(path)(message, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details()

    found: tuple[str, Any] = asyncio.run(_with(doors, work))
    return found


def test_an_inference_and_its_line_of_log(tmp_path: Path) -> None:
    triton, trace = FakeTriton(), f"00-{'a' * 32}-{'b' * 16}-01"
    doors = doors_of(triton, log=tmp_path / "log", keys=KEYS)
    metadata = (("authorization", "Bearer right"), ("traceparent", trace))
    message = _request(id="mine", parameters={"prompt_name": kserve.InferParameter(string_param="query")})
    status, answer = _ask(doors, message.SerializeToString(), metadata)
    assert status == "OK"
    found = kserve.ModelInferResponse.FromString(answer)
    assert (found.id, found.model_version, found.outputs[0].shape[:]) == ("mine", "3", [1, 2])
    assert np.frombuffer(found.raw_output_contents[0], np.float32).tolist() == [0.0, 1.0]
    inputs, _, request_id, parameters = triton.asked[0]
    assert (inputs[0].data, parameters) == (b"\x01\0\0\0a", {"prompt_name": "query"})
    line = json.loads((tmp_path / "log").read_text())
    assert (line["id"], line["caller"], line["status"], line["trace"]) == (request_id, "ann", 200, trace)
    assert (line["route"], line["method"], line["address"]) == (INFER, "GRPC", "127.0.0.1")


@pytest.mark.parametrize("path", [INFER, STREAM, "/inference.GRPCInferenceService/ServerMetadata"])
def test_a_key_is_asked_before_the_message_is_read(path: str) -> None:
    triton = FakeTriton()
    for metadata in ((), (("authorization", "Bearer wrong"),)):
        status, said = _ask(doors_of(triton, keys=KEYS), b"\xff", metadata, path)  # which is no message
        assert (status, "key" in said) == ("UNAUTHENTICATED", True)
    live = "/inference.GRPCInferenceService/ServerLive"
    assert _ask(doors_of(triton, keys=KEYS), b"", (), live)[0] == "OK"


@pytest.mark.parametrize(
    "name",
    [
        "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
        "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "CudaSharedMemoryRegister", "TraceSetting",
        "LogSettings",
    ],
)  # fmt: skip
def test_what_is_not_of_the_eight_is_not_there(name: str) -> None:
    assert _ask(doors_of(FakeTriton()), b"", (), f"/inference.GRPCInferenceService/{name}")[0] == "UNIMPLEMENTED"


def test_a_configuration_is_the_same_over_both_protocols() -> None:
    doors = doors_of(FakeTriton(generates=True), keys=KEYS)
    message = kserve.ModelConfigRequest(name="m", version="3").SerializeToString()
    path, key = "/inference.GRPCInferenceService/ModelConfig", (("authorization", " Bearer right"),)
    status, answer = _ask(doors, message, key, path)
    assert status == "OK"
    config = MessageToDict(kserve.ModelConfigResponse.FromString(answer).config, preserving_proto_field_name=True)
    shown = get(doors.http, "/v2/models/m/config", {"authorization": "Bearer right"}).json
    assert config["model_transaction_policy"] == shown["model_transaction_policy"] == {"decoupled": True}
    assert [item["name"] for item in config["input"]] == [item["name"] for item in shown["input"]] == ["text", "stream"]
    assert shown["input"][0] == {
        "name": "text", "data_type": "TYPE_STRING", "dims": [1], "is_shape_tensor": False, "optional": False,
    }  # fmt: skip
    assert get(doors.http, "/v2/models/m/config").status == 401
    assert get(doors.http, "/v2/models/m/versions/9/config", {"authorization": "Bearer right"}).status == 404
    other = kserve.ModelConfigRequest(name="m-encoder").SerializeToString()
    assert _ask(doors, other, key, path)[0] == "NOT_FOUND"


def test_a_word_for_streams_is_taken_of_a_single_answer_too() -> None:
    """perf_analyzer sends it with every request."""
    empty = {"triton_enable_empty_final_response": kserve.InferParameter(bool_param=False)}
    assert _ask(doors_of(FakeTriton()), _request(parameters=empty).SerializeToString())[0] == "OK"


SHARED = {"shared_memory_region": kserve.InferParameter(string_param="x")}
TENSOR = kserve.ModelInferRequest.InferInputTensor
WRONG = {
    "shared memory": _request(inputs=[TENSOR(name="text", datatype="BYTES", shape=[1, 1], parameters=SHARED)]),
    "output in shared memory": _request(
        outputs=[kserve.ModelInferRequest.InferRequestedOutputTensor(name="embedding", parameters=SHARED)]
    ),
    "classification": _request(parameters={"classification": kserve.InferParameter(int64_param=3)}),
    "sequence": _request(parameters={"sequence_id": kserve.InferParameter(int64_param=3)}),
    "a parameter of nothing": _request(parameters={"timeout": kserve.InferParameter()}),
    "a negative shape": _request(inputs=[TENSOR(name="text", datatype="BYTES", shape=[-1, 1])]),
    "a huge shape": _request(inputs=[TENSOR(name="text", datatype="FP32", shape=[1 << 62, 1 << 62])]),
    "another shape": _request(inputs=[TENSOR(name="text", datatype="BYTES", shape=[2, 1])]),
    "no such type": _request(inputs=[TENSOR(name="text", datatype="BF17", shape=[1, 1])]),
    "too many contents": _request(raw_input_contents=[b"\x01\0\0\0a"] * 2),
    "no such output": _request(outputs=[kserve.ModelInferRequest.InferRequestedOutputTensor(name="secret")]),
    "nothing": kserve.ModelInferRequest(model_name="m"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_request_must_not_be(name: str) -> None:
    triton = FakeTriton()
    assert _ask(doors_of(triton), WRONG[name].SerializeToString())[0] == "INVALID_ARGUMENT"
    assert not triton.asked


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (gzip.compress(bytes(64 << 20), mtime=0), "RESOURCE_EXHAUSTED"),  # 64 kB that are 64 MB
        (gzip.compress(_request().SerializeToString(), mtime=0) * 2, "INVALID_ARGUMENT"),
        (gzip.compress(b"x" * 99, mtime=0)[:-9], "INVALID_ARGUMENT"), (b"\x1f\x8b", "INVALID_ARGUMENT"),
        (b"\x2a\x00" * 500_000, "INVALID_ARGUMENT"),  # 1 MB that are half a million tensors
        (b"\x2a\x80\x80\x3d" + b"\x22\x00" * 500_000, "INVALID_ARGUMENT"),  # as many parameters of one tensor
        (b"\x08\x01", "INVALID_ARGUMENT"), (b"\x0b\x0c", "INVALID_ARGUMENT"), (b"\x0a\x05ab", "INVALID_ARGUMENT"),
        (b"\x0a" + b"\xff" * 11, "INVALID_ARGUMENT"), (b"\x0a\x01\xff", "INVALID_ARGUMENT"),
        (b"\xf8\x07\x01", "INVALID_ARGUMENT"), (bytes(9 << 20), "RESOURCE_EXHAUSTED"),
    ],
)  # fmt: skip
def test_messages_that_are_none_or_too_large(message: bytes, status: str) -> None:
    triton = FakeTriton()
    assert _ask(doors_of(triton), message)[0] == status
    assert not triton.asked


@settings(max_examples=150)
@given(st.binary(max_size=80), st.integers(0, 200))
def test_whatever_comes_is_read_or_refused(junk: bytes, place: int) -> None:
    """Bytes alone, and put into a message that was whole."""
    whole = _request(parameters={"timeout": kserve.InferParameter(int64_param=1)}).SerializeToString()
    for data in (junk, whole[:place] + junk + whole[place:], whole[:place] + junk):
        with contextlib.suppress(Refused):  # and nothing else
            assert read_infer(data, DoorLimits()).inputs


@pytest.mark.parametrize(
    ("datatype", "contents", "want"),
    [
        ("INT32", {"int_contents": [1, -2]}, np.array([1, -2], np.int32)),
        ("INT8", {"int_contents": [1, 128]}, None),
        ("UINT8", {"uint_contents": [1, 255]}, np.array([1, 255], np.uint8)),
        ("UINT64", {"uint64_contents": [1, 2**64 - 1]}, np.array([1, 2**64 - 1], np.uint64)),
        ("FP32", {"fp32_contents": [1.5, 2.5]}, np.array([1.5, 2.5], np.float32)),
        ("BOOL", {"bool_contents": [True, False]}, np.array([True, False])),
        ("FP32", {"int_contents": [1, 2]}, None), ("FP16", {"fp32_contents": [1, 2]}, None),
        ("INT32", {"int_contents": [1]}, None),
    ],
)  # fmt: skip
def test_typed_contents_are_the_same_tensor_or_refused(datatype: str, contents: Any, want: Any) -> None:
    tensor = TENSOR(name="x", datatype=datatype, shape=[2], contents=kserve.InferTensorContents(**contents))
    data = kserve.ModelInferRequest(model_name="m", inputs=[tensor]).SerializeToString()
    if want is None:
        with pytest.raises(Refused):
            read_infer(data, DoorLimits())
    else:
        assert read_infer(data, DoorLimits()).inputs[0].data == want.tobytes()


def test_the_header_that_ends_a_triton_is_refused() -> None:
    status, said = _ask(doors_of(FakeTriton()), _request().SerializeToString(), (("triton_grpc_error", "true"),))
    assert (status, "triton_grpc_error" in said) == ("INVALID_ARGUMENT", True)


def test_a_version_that_is_named_is_the_one_that_answers() -> None:
    """Whatever the split says: all of it goes to another version here."""
    doors = doors_of(FakeTriton(), beside={5: FakeTriton(version=4)})
    asyncio.run(doors.versions.set([Neighbour(4, Place((5, 6)), None)], {3: 1.0}, None))
    for method, message in (
        ("ModelReady", kserve.ModelReadyRequest(name="m", version="4")),
        ("ModelMetadata", kserve.ModelMetadataRequest(name="m", version="4")),
        ("ModelInfer", _request(model_version="4")),
    ):
        path = f"/inference.GRPCInferenceService/{method}"
        status, answer = _ask(doors, message.SerializeToString(), (), path)
        assert status == "OK", (method, answer)
        other, said = _ask(doors, message.SerializeToString(), (("x-trireme-version", "3"),), path)
        assert (other, "different versions" in said) == ("INVALID_ARGUMENT", True)
        if method == "ModelMetadata":
            assert kserve.ModelMetadataResponse.FromString(answer).versions == ["4"]
    gone = kserve.ModelReadyRequest(name="m", version="5").SerializeToString()
    assert _ask(doors, gone, (), "/inference.GRPCInferenceService/ModelReady")[0] == "NOT_FOUND"


def test_requests_at_once_are_counted_with_those_of_http() -> None:
    status, said = _ask(doors_of(FakeTriton(), DoorLimits(requests_per_key=0)), _request().SerializeToString())
    assert (status, "of this caller" in said) == ("RESOURCE_EXHAUSTED", True)


def test_a_stream_tells_each_request_its_own_fault_and_goes_on() -> None:
    doors = doors_of(FakeTriton())
    wrong, right = _request(model_name="other", id="1"), _request(id="2")

    async def work(channel: Any) -> list[Any]:
        call = channel.stream_stream(STREAM)()
        for message in (wrong, right):
            await call.write(message.SerializeToString())
        await call.done_writing()
        return [kserve.ModelStreamInferResponse.FromString(one) async for one in call]

    found = {one.infer_response.id: one for one in asyncio.run(_with(doors, work))}
    assert found["1"].error_message.startswith("NOT_FOUND: no model 'other'")
    assert found["2"].error_message == ""
    assert found["2"].infer_response.parameters["triton_final_response"].bool_param
    page = doors.http._witnesses.counters.page(0, False).decode()
    assert f'requests_total{{route="{STREAM}/request",status="404"}} 1' in page


def test_a_client_that_leaves_a_stream_ends_its_work() -> None:
    triton = FakeTriton(generates=True, hang=True)
    tensor = TENSOR(name="text", datatype="BYTES", shape=[1, 1])
    streamed = TENSOR(name="stream", datatype="BOOL", shape=[1, 1])
    asked = _request(inputs=[tensor, streamed], raw_input_contents=[b"\x01\0\0\0a", b"\1"])

    async def work(channel: Any) -> None:
        call = channel.stream_stream(STREAM)()
        await call.write(asked.SerializeToString())
        assert kserve.ModelStreamInferResponse.FromString(await call.read()).infer_response.outputs
        call.cancel()
        while not triton.left:
            await asyncio.sleep(0.01)

    asyncio.run(_with(doors_of(triton), work))
