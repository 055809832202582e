"""Messages to ranks: what was sent comes back, and what arrives runs nothing."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.ranks import wire
from runtime.ranks.program import Communicate, EngineProgram, PassedValue, RankGrid, RankProgram, RunGraph, Transfer
from runtime.rows import CacheShape
from runtime.step import Copy, Row

PROGRAM = RankProgram(
    "/models/1",
    (RunGraph(b"\x00graph", ("x",), ("y",)), Communicate("all_reduce", "y", "z", 2)),
    ("x",),
    ("z",),
    received=(Transfer("x", 0),),
    states=(("made", "given"),),
)
ENGINES = EngineProgram(
    RankGrid(2, 2), "tensorrt", (Path("a.plan"),), (512,), 8, (PassedValue("h", 0, (1, "length"), 2),), (), b"w", b""
)


@pytest.mark.parametrize(
    "message",
    [
        ("load", (PROGRAM, RankGrid(1, 2))),
        ("load", (ENGINES,)),
        ("reserve", (CacheShape(2, 8, "float16"), (16, 64), 6)),
        ("copy_rows", ([Copy(None, Row(0, 1), 0), Copy(Row(0, 1), Row(1, 2), 7)],)),
        ("run", ({"a": [1.5, None, True], "é": "text"}, (), float("inf"))),
    ],
)
def test_what_was_sent_comes_back(message: Any) -> None:
    assert wire.decode(wire.encode(message)) == message


def test_arrays_come_back_with_type_and_shape() -> None:
    sent = {"a": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::2], "b": np.float16([[]]), "c": np.array(True)}
    found = wire.decode(bytearray(wire.encode((sent, np.int64(3)))))
    assert found[1] == 3
    for name, array in sent.items():
        assert (found[0][name].dtype, found[0][name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[0][name], array)
        assert found[0][name].flags.aligned
        assert found[0][name].flags.writeable


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no message",
        struct.pack("!Q", 1 << 62) + b"[]",
        struct.pack("!Q", 13) + b'["record","x"]',
        struct.pack("!Q", 25) + b'["array","<f4",[9999],8] ' + b"\0" * 8,
        struct.pack("!Q", 19) + b'["array","O",[1],8]' + b"\0" * 8,
        struct.pack("!Q", 4000) + b"[" * 4000,
        wire.encode(("run", (np.zeros(4),)))[:-20],
    ],
)
def test_anything_else_is_no_message(data: bytes) -> None:
    with pytest.raises(wire.NoMessage):
        wire.decode(data)


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def test_a_pickle_is_not_run() -> None:
    with pytest.raises(wire.NoMessage):
        wire.decode(pickle.dumps(_Runs()))


def test_what_has_no_form_is_not_sent() -> None:
    with pytest.raises(TypeError, match="_Runs cannot be sent"):
        wire.encode(("run", _Runs()))
