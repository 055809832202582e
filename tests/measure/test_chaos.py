"""Chaos: what it sends is refused by a real gateway, and what it counts as wrong is wrong."""

from __future__ import annotations

import random

import pytest

from measure.chaos.blows import Blow
from measure.chaos.fuzz import fuzz
from measure.chaos.load import CompletionLoad
from tests.gateway.asking import gateway_ports


def test_no_class_of_fuzz_gets_through_a_gateway() -> None:
    """Nothing answers behind it: what was passed on would be a 503."""
    with gateway_ports("m", 9, 9, "--grpc-port", "0") as ports:
        found = fuzz(ports["gateway"], f"127.0.0.1:{ports['grpc']}", "m", 34, random.Random(1), slow_clients=0)
    told = {name for name in found.told if not name.startswith("grpc")}
    assert {name.rpartition(": ")[2][:1] for name in told} <= {"4", "c"}, found.told  # 4xx, or closed
    assert sum(found.told.values()) == 2 * 34
    assert [fault for fault in found.faults if "refused" not in fault] == []  # how long it took is this machine's


@pytest.mark.parametrize(
    ("text", "error", "ended", "cause"),
    [
        ("one two", "", True, "200"),
        ("one", "", True, "wrong"),  # ended as if it were whole
        ("one", "503", True, "stream ended: 503"),
        ("one", "", False, "connection: stream cut"),
        ("two", "503", True, "wrong"),
    ],
)
def test_a_stream_is_held_against_the_first_to_its_prompt(text: str, error: str, ended: bool, cause: str) -> None:
    load = CompletionLoad(0, "m")
    assert load._judged("prompt", "one two", "", True) == "200"
    assert load._judged("prompt", text, error, ended) == cause


def test_a_part_that_does_not_come_back_is_a_fault() -> None:
    assert "median 1.0 s, max 1.0 s" in Blow("stub killed", [1.0]).text
    assert Blow("stub killed", [1.0]).faults == []
    lost = Blow("stub killed", [None, None])
    assert "never answering again" in lost.text
    assert len(lost.faults) == 1
