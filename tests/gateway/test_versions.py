"""Traffic between versions: split, pinned, mirrored, set as a whole by who holds the secret."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from runtime.gateway.app import Doors
from runtime.gateway.refused import Refused
from runtime.gateway.triton import Facts
from runtime.gateway.versions import Lane, Traffic
from tests.gateway.asking import FakeTriton, Got, ask, doors_of, get

SECRET = {"trireme-admin": "a-secret-of-this-test"}
EMBED = json.dumps({"model": "m", "input": "a"}).encode()
BESIDE = {"versions": {"4": {"http_port": 5, "metrics_port": 6}}}


class _Other(FakeTriton):
    async def facts(self) -> Facts:
        found = await super().facts()
        return Facts(found.version, 2, {**found.metadata, "outputs": []})


def _doors(tmp_path: Path, candidate: FakeTriton | None = None, main: FakeTriton | None = None) -> Doors:
    beside = {5: candidate or FakeTriton(version=4)}
    return doors_of(
        main or FakeTriton(), beside=beside, control_secret=SECRET["trireme-admin"].encode(),
        mirror_log=tmp_path / "mirror.log",
    )  # fmt: skip


async def _set(doors: Doors, body: dict[str, Any], headers: dict[str, str] | None = None) -> Got:
    given = {"content-type": "application/json", **(SECRET if headers is None else headers)}
    return await ask(doors.http, "PUT", "/control/versions", json.dumps(body).encode(), given)


async def _embed(doors: Doors, **headers: str) -> Got:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return await ask(doors.http, "POST", "/v1/embeddings", EMBED, {"content-type": "application/json", **given})


def test_the_split_is_by_weight() -> None:
    lanes = tuple(Lane(FakeTriton(), number, None) for number in (3, 4, 5))
    traffic = Traffic(lanes, (9.0, 0.0, 1.0))
    picked = [traffic.pick(at / 1000).version for at in range(1000)]
    assert [picked.count(number) for number in (3, 4, 5)] == [900, 0, 100]
    assert Traffic(lanes, (1.0, 0.0, 0.0)).pick(1.0).version == 3, "rounding never gives to who has nothing"


def test_a_version_gets_its_share_and_what_is_pinned_to_it(tmp_path: Path) -> None:
    candidate = FakeTriton(version=4)

    async def work() -> None:
        doors = _doors(tmp_path, candidate)
        assert (await _embed(doors)).headers["x-trireme-version"] == "3"
        assert (await _embed(doors, x_trireme_version="4")).status == 404
        assert (await _set(doors, {**BESIDE, "weights": {"3": 1}})).json["versions"]["4"]["share"] == 0
        assert (await _embed(doors, x_trireme_version="4")).headers["x-trireme-version"] == "4"
        assert (await _embed(doors)).headers["x-trireme-version"] == "3"
        await _set(doors, {**BESIDE, "weights": {"4": 1}})
        assert (await _embed(doors)).headers["x-trireme-version"] == "4"
        candidate.error = Refused(500, "broken")
        assert (await _embed(doors)).status == 500
        told = (await ask(doors.http, "GET", "/control/versions", headers=SECRET)).json
        assert told["versions"]["4"]["served"]["requests"] == 3, "a lane that is named again goes on counting"
        assert told["versions"]["4"]["served"]["errors"] == 1
        assert sum(told["versions"]["3"]["served"]["seconds_counts"]) == 2
        page = (await ask(doors.http, "GET", "/metrics", headers={})).body.decode()
        assert 'trireme_gateway_version_errors_total{version="4",role="served"} 1' in page
        assert 'trireme_gateway_version_weight{version="4"} 1' in page

    asyncio.run(work())


def test_a_path_pins_as_well(tmp_path: Path) -> None:
    body = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}]}

    async def infer(doors: Doors, version: str, **headers: str) -> Got:
        path, given = f"/v2/models/m/versions/{version}/infer", {"content-type": "application/json", **headers}
        return await ask(doors.http, "POST", path, json.dumps(body).encode(), given)

    async def work() -> None:
        doors = _doors(tmp_path)
        assert (await infer(doors, "4")).status == 404
        await _set(doors, {**BESIDE, "weights": {"3": 1}})
        assert (await infer(doors, "4")).json["model_version"] == "4"
        assert (await infer(doors, "4", **{"x-trireme-version": "3"})).status == 400

    asyncio.run(work())


def test_a_mirror_is_asked_and_nobody_hears_it(tmp_path: Path) -> None:
    candidate = FakeTriton(version=4)

    async def work() -> None:
        doors = _doors(tmp_path, candidate)
        await _set(doors, {**BESIDE, "weights": {"3": 1}, "mirror": "4"})
        for wrong in (None, Refused(500, "broken")):
            candidate.error = wrong
            got = await _embed(doors)
            assert (got.status, got.headers["x-trireme-version"]) == (200, "3")
            await asyncio.sleep(0)
        told = (await ask(doors.http, "GET", "/control/versions", headers=SECRET)).json
        while told["versions"]["4"]["mirrored"]["requests"] < 2:
            await asyncio.sleep(0.01)
            told = (await ask(doors.http, "GET", "/control/versions", headers=SECRET)).json
        assert told["mirror_same"] == 1
        assert told["versions"]["4"]["mirrored"]["errors"] == 1
        assert told["versions"]["4"]["served"]["requests"] == 0
        for file in doors.files:
            file.close()

    asyncio.run(asyncio.wait_for(work(), 20))
    lines = [json.loads(line) for line in (tmp_path / "mirror.log").read_text().splitlines()]
    assert [(line["status"], line.get("same")) for line in lines] == [(200, True), (500, None)]
    assert lines[0]["worst_cosine"] == pytest.approx(1.0)
    assert (tmp_path / "mirror.log").stat().st_mode & 0o077 == 0


def test_a_mirrored_text_is_written_down(tmp_path: Path) -> None:
    main, candidate = (FakeTriton(generates=True, version=number) for number in (3, 4))
    candidate.words = ("one", " other")

    async def work() -> None:
        doors = _doors(tmp_path, candidate, main)
        await _set(doors, {**BESIDE, "weights": {"3": 1}, "mirror": "4"})
        body = json.dumps({"model": "m", "prompt": "x"}).encode()
        got = await ask(doors.http, "POST", "/v1/completions", body)
        assert got.json["choices"][0]["text"] == "one two three"
        while doors.versions.mirror.different < 1:
            await asyncio.sleep(0.01)
        for file in doors.files:
            file.close()

    asyncio.run(asyncio.wait_for(work(), 20))
    line = json.loads((tmp_path / "mirror.log").read_text())
    assert (line["answer"], line["mirror_answer"]) == ("one two three", "one other")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"weights": {"3": 0}}, 409), ({"weights": {"9": 1}}, 409), ({"weights": {"3": 1}, "mirror": "9"}, 409),
        ({"weights": {"3": -1}}, 400), ({"weights": {"x": 1}}, 400), ({"weights": {"3": 1}, "wieghts": {}}, 400),
        ({"weights": {"5": 1}, "versions": {"5": {"http_port": 5, "metrics_port": 6}}}, 409),  # it is version 4
        ({"weights": {"3": 1}, "versions": {"3": {"http_port": 5, "metrics_port": 6}}}, 409),
        ({"weights": {"3": 1}, "versions": {"4": {"http_port": 0, "metrics_port": 6}}}, 400),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_hold_changes_nothing(tmp_path: Path, body: dict[str, Any], status: int) -> None:
    async def work() -> None:
        doors = _doors(tmp_path)
        await _set(doors, {**BESIDE, "weights": {"3": 1, "4": 3}})
        before = doors.versions.traffic
        assert (await _set(doors, body)).status == status
        assert doors.versions.traffic is before

    asyncio.run(work())


def test_a_version_of_another_shape_is_not_put_beside(tmp_path: Path) -> None:
    got = asyncio.run(_set(_doors(tmp_path, _Other(version=4)), {**BESIDE, "weights": {"4": 1}}))
    assert got.status == 409
    assert "other inputs or outputs" in got.json["error"]


def test_only_the_secret_opens_it(tmp_path: Path) -> None:
    for headers in ({}, {"trireme-admin": "a-secret-of-this-tes"}, {"authorization": "Bearer x"}):
        assert asyncio.run(_set(_doors(tmp_path), {"weights": {"3": 1}}, headers)).status == 403
        assert get(_doors(tmp_path).http, "/control/versions", headers).status == 403
    without = doors_of(FakeTriton())
    assert get(without.http, "/control/versions", SECRET).status == 404
