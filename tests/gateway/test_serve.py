"""`trireme serve` with a gateway: keys, deaths, and an end in which nobody loses an answer."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import yaml
from tritonclient.utils import InferenceServerException

from builders.spec import DeploymentSpec
from loadtest.report.record import read_report
from runtime.channel import connect
from runtime.errors import BadEnvironment
from runtime.server.gateway_process import Doorway
from tests import generators
from tests.conftest import wait_until
from tests.gateway.asking import exchange_raw

KEY = "a-key-of-a-test"
LONGEST = 2048


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    source = generators.save_generator(folder / "model", "llama", max_position_embeddings=LONGEST)
    made = DeploymentSpec.model_validate(
        {
            "name": "tiny-lm",
            "model": {"source": str(source), "task": "generation", "max_length": LONGEST},
            "precision": {"cpu": "fp32", "calibration_samples": 32},
            "generation": {"slots": 2, "cache_lengths": [LONGEST]},
        }
    )
    (folder / "spec.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
    _write_keys(folder / "spec.yaml", KEY)
    return folder / "spec.yaml"


def _write_keys(spec: Path, *keys: str) -> None:
    lines = [f"{place}:{hashlib.sha256(key.encode()).hexdigest()}\n" for place, key in enumerate(keys)]
    (spec.parent / "keys").write_text("".join(lines))


def _command(spec: Path, *options: object) -> list[str]:
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    build = ["--build-dir", str(spec.parent / "build")]
    return [sys.executable, "-m", "builders", "serve", str(spec), "--json", *build, *ports, *map(str, options)]


@contextmanager
def _serving(spec: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    options = ("--gateway-port", 0, "--gateway-grpc-port", 0, "--api-keys-file", spec.parent / "keys")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(_command(spec, *options), **pipes, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        process.terminate()
        process.communicate(timeout=90)


def _client(facts: dict[str, Any]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{facts['gateway']}/v1", api_key=KEY, max_retries=0)


def _ready(facts: dict[str, Any]) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://{facts['gateway']}/readyz", timeout=20).status == 200)
    except (urllib.error.HTTPError, ConnectionError, urllib.error.URLError):
        return False


def _grpc_ready(facts: dict[str, Any]) -> bool:
    with connect(facts["gateway_grpc"]) as client:
        try:
            return bool(client.is_model_ready("tiny-lm", headers={"authorization": f"Bearer {KEY}"}, client_timeout=20))
        except InferenceServerException:  # it starts
            return False


def _taken(client: openai.OpenAI, ask: dict[str, Any]) -> bool:
    try:
        return bool(client.completions.create(**ask).choices)
    except openai.AuthenticationError:
        return False


def _text_or_status(client: openai.OpenAI, ask: dict[str, Any]) -> str | int:
    try:
        return str(client.completions.create(**ask).choices[0].text)
    except openai.InternalServerError as error:
        return error.status_code


def _load_goes_through(spec: Path, facts: dict[str, Any]) -> None:
    """A load test whose requests take the gateway's way, and whose counts are the server's own."""
    output, key = spec.with_name("load.json"), spec.with_name("key")
    options = ["-o", output, "--grpc", facts["grpc"], "--metrics", facts["metrics"], "--users", 1, "--warm-up-s", 0]
    options += ["--gateway-grpc", facts["gateway_grpc"], "--duration-s", 3, "--output-tokens", 4]
    command = [sys.executable, "-m", "builders", "loadtest", str(spec), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "UNAUTHENTICATED" in done.stderr
    key.write_text(f"{KEY}\n")
    done = subprocess.run(
        [*command, "--api-key-file", str(key)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "grpc through the gateway" in done.stdout
    report = read_report(output)
    assert report.load.gateway
    assert report.figures.requests > 0
    assert report.ledger is not None
    assert report.ledger.received_tokens == report.ledger.made_tokens > 0


def _gone(pid: int) -> bool:
    """A zombie is gone: whose it is now need not wait for it."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.triton
def test_a_gateway_lives_beside_its_server_and_outlives_deaths(spec: Path) -> None:
    with _serving(spec) as (process, facts), _client(facts) as client:
        assert wait_until(lambda: _ready(facts), 30)
        ask = {"model": "tiny-lm", "prompt": "open", "max_tokens": 5, "temperature": 0}
        text = client.completions.create(**ask).choices[0].text
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").completions.create(**ask)
        _load_goes_through(spec, facts)

        os.kill(facts["gateway_pid"], signal.SIGKILL)  # the next client waits for the next gateway
        assert client.completions.create(**ask).choices[0].text == text
        assert wait_until(lambda: _grpc_ready(facts), 30)

        _write_keys(spec, KEY, "another")
        process.send_signal(signal.SIGHUP)
        assert wait_until(lambda: _taken(client.with_options(api_key="another"), ask), 30)

        os.kill(facts["pid"], signal.SIGKILL)
        assert wait_until(lambda: not _ready(facts), 30)
        assert _text_or_status(client, ask) in (503, text)  # who waits a second may see it come back
        assert wait_until(lambda: _ready(facts), 120)
        assert client.completions.create(**ask).choices[0].text == text
        gateways = [one.pid for one in psutil.Process(process.pid).children() if "runtime.gateway" in one.cmdline()]
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        assert all(_gone(pid) for pid in gateways)


@pytest.mark.triton
def test_streams_end_before_the_server_does(spec: Path) -> None:
    with _serving(spec) as (process, facts), _client(facts) as client:
        asked = LONGEST // 2
        stream = client.completions.create(
            model="tiny-lm", prompt="x", max_tokens=asked, stream=True, extra_body={"min_tokens": asked},
            stream_options={"include_usage": True},
        )  # fmt: skip
        next(stream)
        process.send_signal(signal.SIGTERM)
        events = list(stream)
        assert events[-1].usage is not None
        assert events[-1].usage.completion_tokens == asked
        assert process.wait(90) == 0
        port = facts["gateway"].split(":")[1]
        with pytest.raises(ConnectionError):
            exchange_raw(int(port), b"GET /healthz HTTP/1.1\r\n\r\n")


@pytest.mark.triton
def test_nothing_is_left_when_the_launcher_is_killed(spec: Path) -> None:
    with _serving(spec) as (process, facts):
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        for name in ("gateway_pid", "pid"):
            assert wait_until(partial(_gone, facts[name]), 60), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gateway-port", 0, "--gateway-address", "0.0.0.0"], "would answer anybody"),
        (["--gateway-port", 0, "--api-keys-file", "/nowhere"], "--api-keys-file"),
        (["--api-keys-file", "keys"], "--gateway-port"),
    ],
)
def test_a_door_that_would_stand_open_is_refused_before_anything_is_built(
    spec: Path, options: list[object], said: str
) -> None:
    done = subprocess.run(_command(spec, *options), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_busy_port_is_named() -> None:
    with Doorway(0).listen() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadEnvironment, match="choose another with --gateway-port"):
            Doorway(port).listen()
    Doorway(0, "0.0.0.0", no_auth=True).require_closed()
