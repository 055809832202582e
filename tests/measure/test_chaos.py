"""Chaos: what it sends is refused by a real gateway, and what it counts as wrong is wrong."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from loadtest.report.assemble import this_machine
from measure.chaos.act import ChaosAct
from measure.chaos.blows import Blow
from measure.chaos.fuzz import Fuzzed, fuzz
from measure.chaos.load import CompletionLoad
from measure.chaos.page import write_page
from measure.chaos.service import Held
from tests.gateway.asking import gateway_ports


def test_no_class_of_fuzz_gets_through_a_gateway() -> None:
    """Nothing answers behind it: what was passed on would be a 503."""
    with gateway_ports("m", 9, 9, "--grpc-port", "0") as ports:
        found = fuzz(ports["gateway"], f"127.0.0.1:{ports['grpc']}", "m", 36, random.Random(1), slow_clients=0)
    told = {name for name in found.told if not name.startswith("grpc")}
    assert {name.rpartition(": ")[2][:1] for name in told} <= {"4", "c"}, found.told  # 4xx, or closed
    assert sum(found.told.values()) == 2 * 36
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


def test_the_page_says_first_what_was_wrong_and_counts_each_kind_of_failure(tmp_path: Path) -> None:
    load = CompletionLoad(0, "m", began=100.0)
    load.causes.update({"200": 1500, "503": 9734, "stream ended: 503": 2, "wrong": 1})
    load.seconds = {0: Counter({"200": 7}), 9: Counter({"503": 70, "connection: stream cut": 1})}
    fuzzed = Fuzzed(Counter({"junk: 400": 3, "junk: closed": 1}), 0.25, "junk")
    blows = [
        Blow("stub <killed>", [1.5, None], [3.0, 5.0]),
        Blow("full queue", [0.1], [7.0], '400 at once: {"200": 3}'),
    ]
    act = ChaosAct(
        "streams", load, Held(900, 31, 2), Held(950, 33, 2), blows, fuzzed, (8.0, 9.0), ["1 answers < right"]
    )
    write_page(tmp_path / "page.html", [act], (1.0, 2.0, 3.0))
    page = (tmp_path / "page.html").read_text()
    flat = re.sub(r"(<[^>]*>)+", "|", page)
    assert flat.index("|1 fault|streams: 1 answers &lt; right|") < flat.index("|answered a second|")
    assert "|refused|9,734|503 (9,734)|" in flat
    assert "|lost|2|stream ended: 503 (2)|" in flat
    assert "|wrong|1|wrong (1)|" in flat
    assert "|stub &lt;killed&gt;|2|1.5 s|1.5 s|1 times not answering again|" in flat
    assert "|junk|4|400 (3), closed (1)|" in flat
    assert this_machine().cpu_model in flat
    assert page.count(">stub &lt;killed&gt;<") == 2, "in the plot, where it fell, and in the table"


def test_a_part_that_does_not_come_back_is_a_fault() -> None:
    assert "median 1.0 s, max 1.0 s" in Blow("stub killed", [1.0]).text
    assert Blow("stub killed", [1.0]).faults == []
    lost = Blow("stub killed", [None, None])
    assert "never answering again" in lost.text
    assert len(lost.faults) == 1
