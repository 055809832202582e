"""The real MiniLM behind a real Triton: answers, bad input, and every way to end it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from tritonclient import grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from builders import pipeline
from builders.judging import corpus
from builders.judging.vectors import graph_outputs, sample_requests
from builders.pipeline import Build
from builders.repository import publish
from builders.spec import DeploymentSpec
from runtime.errors import BadEnvironment
from runtime.server.launch import Ports, TritonServer
from runtime.server.supervise import Supervisor, ready_server
from tests import ROOT
from tests.conftest import tiny_spec, wait_until

pytestmark = pytest.mark.triton


def _infer(address: str, texts: list[bytes], name: str = "minilm") -> Any:
    with triton_grpc.InferenceServerClient(address) as client:
        item = triton_grpc.InferInput("text", [len(texts), 1], "BYTES")
        item.set_data_from_numpy(np.array([[text] for text in texts], dtype=np.object_))
        return client.infer(name, [item], client_timeout=30)


def test_served_vectors_are_the_models(server: TritonServer, minilm: Build) -> None:
    texts = corpus.texts(None, 40)
    got = _infer(server.grpc_address, [text.encode() for text in texts])
    want = graph_outputs(minilm.graph("fp32").file_path, sample_requests(minilm.checkpoint, texts), minilm.checkpoint)
    assert (got.as_numpy("embedding") * want).sum(axis=1).min() > 0.999
    assert got.as_numpy("token_count").shape == (40, 1)


def test_concurrent_requests_of_mixed_size_keep_their_answers(server: TritonServer) -> None:
    texts = [text.encode() for text in corpus.texts(None, 48)]
    alone = _infer(server.grpc_address, texts).as_numpy("embedding")
    failures: list[object] = []

    def ask(start: int, count: int) -> None:
        got = _infer(server.grpc_address, texts[start : start + count]).as_numpy("embedding")
        if not np.allclose(got, alone[start : start + count], atol=0.02):
            failures.append(start)

    threads = [threading.Thread(target=ask, args=(start, 1 + start % 5)) for start in range(0, 40, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_truncation_is_said(server: TritonServer) -> None:
    got = _infer(server.grpc_address, [b"short", b"long " * 400])
    assert got.as_numpy("truncated").ravel().tolist() == [False, True]
    assert got.as_numpy("token_count").ravel().tolist() == [3, 256]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([b"fine", b""], r"text\[1\] is empty"),
        ([b" \n"], r"text\[0\] is empty"),
        ([b"\xfe\xff"], r"text\[0\]: byte 0 is not valid UTF-8"),
        ([b"x"] * 65, "batch-size must be <= 64"),
    ],
)
def test_bad_text_is_the_callers_fault_and_hurts_nobody(server: TritonServer, texts: list[bytes], said: str) -> None:
    with pytest.raises(InferenceServerException, match=said) as caught:
        _infer(server.grpc_address, texts)
    assert "INVALID_ARGUMENT" in str(caught.value.status())
    assert str(ROOT) not in str(caught.value)
    assert _infer(server.grpc_address, [b"still here"]).as_numpy("embedding").shape == (1, 384)


@pytest.mark.parametrize(("dtype", "shape"), [("INT32", [1, 1]), ("BYTES", [1, 2]), ("BYTES", [1])])
def test_a_wrong_tensor_is_refused(server: TritonServer, dtype: str, shape: list[int]) -> None:
    item = triton_grpc.InferInput("text", shape, dtype)
    item.set_data_from_numpy(np.full(shape, b"x", np.object_) if dtype == "BYTES" else np.ones(shape, np.int32))
    with (
        triton_grpc.InferenceServerClient(server.grpc_address) as client,
        pytest.raises(InferenceServerException) as caught,
    ):
        client.infer("minilm", [item], client_timeout=10)
    assert "INVALID_ARGUMENT" in str(caught.value.status())


def test_metrics_name_what_is_served(server: TritonServer, minilm: Build) -> None:
    import urllib.request

    assert minilm.entry is not None
    text = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10).read().decode()
    line = next(line for line in text.splitlines() if line.startswith("trireme_model_info{"))
    assert f'digest="{minilm.entry.model_digest}"' in line
    assert f'spec_digest="{minilm.spec.digest}"' in line


def test_a_busy_port_is_named_before_anything_starts(minilm: Build) -> None:
    assert minilm.entry is not None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = Ports.free()
        ports = Ports(taken.getsockname()[1], free.grpc, free.metrics)
        with pytest.raises(BadEnvironment, match="choose another with --http-port"):
            TritonServer(minilm.entry.repository, ports)


class _Serving:
    """`trireme serve` as a user starts it."""

    def __init__(self, spec: Path, build_dir: Path) -> None:
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
        command = [
            sys.executable,
            "-m",
            "builders",
            "serve",
            str(spec),
            "--json",
            "--build-dir",
            str(build_dir),
            *ports,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate(timeout=30)[1])
        self.facts = json.loads(line)
        self.triton = psutil.Process(self.facts["pid"])
        self.stubs = self.triton.children(recursive=True)
        folder = next(word for word in self.triton.cmdline() if word.startswith("--backend-directory="))
        self.scratch = folder.partition("=")[2].removesuffix("/backends")

    def processes(self, program: str = "") -> list[psutil.Process]:
        """Every server and stub of this launcher that lives, of whichever start: the prefix is in their arguments."""
        found = []
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
                alive = process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                continue
            ours = any(f"trireme_{self.process.pid}_" in word for word in command)
            if ours and alive and command[0].endswith(program):
                found.append(process)
        return found

    def wait_again(self, before: psutil.Process) -> psutil.Process:
        """The server that runs in place of another."""
        assert wait_until(lambda: any(p.pid != before.pid for p in self.processes("tritonserver")), 60)
        return next(p for p in self.processes("tritonserver") if p.pid != before.pid)

    def leftovers(self) -> list[str]:
        """Processes, shared memory and scratch folders that this server has left."""
        memory = [path.name for path in Path("/dev/shm").glob(f"trireme_{self.process.pid}_*")]
        scratch = [self.scratch] if self.scratch and Path(self.scratch).exists() else []
        return [str(p) for p in self.processes()] + memory + scratch


@contextmanager
def _serve(spec: DeploymentSpec, folder: Path, build_dir: Path) -> Iterator[_Serving]:
    """A server that the test may end as it likes; whatever it does, nothing may be left."""
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    running = _Serving(file, build_dir)
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait(10)
    assert wait_until(lambda: not running.leftovers(), 40), running.leftovers()


@pytest.fixture(scope="module")
def tiny_build(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build directory in which `trireme serve` finds everything made."""
    folder = tmp_path_factory.mktemp("tiny") / "build"
    pipeline.build(tiny_spec(tiny_bert), "cpu", folder, "repository")
    return folder


@pytest.fixture
def serving(tmp_path: Path, tiny_bert: Path, tiny_build: Path) -> Iterator[_Serving]:
    build = Path(shutil.copytree(tiny_build, tmp_path / "build", symlinks=True))  # a test may damage it
    with _serve(tiny_spec(tiny_bert), tmp_path, build) as running:
        yield running


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_drains_what_is_in_flight(minilm: Build, tmp_path: Path, number: signal.Signals) -> None:
    assert minilm.entry is not None
    answers: list[object] = []
    texts = [b"long " * 400] * 64  # a second or more of work
    with _serve(minilm.spec, tmp_path, minilm.entry.repository.parents[2]) as serving:
        address = serving.facts["grpc"]
        thread = threading.Thread(target=lambda: answers.append(_infer(address, texts).as_numpy("embedding").shape))
        with triton_grpc.InferenceServerClient(address) as client:

            def tokenised() -> bool:
                statistics = client.get_inference_statistics("minilm-tokenizer").model_stats[0]
                return int(statistics.inference_count) >= 64

            thread.start()
            assert wait_until(tokenised, 20)  # so the encoder has it, or will within a moment
        serving.process.send_signal(number)
        thread.join(30)
        assert serving.process.wait(40) == 0
    assert answers == [(64, 384)]


def test_killing_the_launcher_leaves_nothing(serving: _Serving) -> None:
    serving.process.kill()
    assert wait_until(lambda: not serving.leftovers(), 40), serving.leftovers()


def _answers(serving: _Serving) -> bool:
    try:
        return bool(_infer(serving.facts["grpc"], [b"hello"], "tiny").as_numpy("embedding").shape == (1, 32))
    except InferenceServerException:
        return False


@pytest.mark.parametrize("victim", ["triton", "encoder", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_what_is_killed_comes_back_on_the_same_ports(serving: _Serving, victim: str) -> None:
    dies = serving.triton
    if victim != "triton":
        (dies,) = [stub for stub in serving.stubs if any(f"tiny-{victim}/" in word for word in stub.cmdline())]
    dies.kill()
    serving.wait_again(serving.triton)
    assert wait_until(lambda: _answers(serving), 60)
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(60) == 0
    assert serving.process.stderr is not None
    said = serving.process.stderr.read()
    assert ("Triton was killed by SIGKILL" if victim == "triton" else "a Python stub of Triton died") in said
    assert "repair 1 since the start" in said


def test_killing_the_launcher_while_it_starts_triton_again_leaves_nothing(serving: _Serving) -> None:
    serving.triton.kill()
    serving.wait_again(serving.triton)
    serving.process.kill()
    assert wait_until(lambda: not serving.leftovers(), 40), serving.leftovers()


def test_a_server_that_cannot_start_again_ends_the_launcher_with_the_reason(serving: _Serving, tmp_path: Path) -> None:
    (repository,) = (tmp_path / "build").rglob("model_repository")
    (repository / "settings.json").rename(repository / "gone.json")
    serving.triton.kill()
    assert serving.process.wait(120) == 1
    assert serving.process.stderr is not None
    said = serving.process.stderr.read()
    assert "5 repairs in a row did not help" in said
    assert "settings.json: missing" in said


def test_a_busy_server_is_not_repaired(tiny_bert: Path, tmp_path: Path) -> None:
    """A full queue refuses the probe as it refuses anyone; a reload would only make it busier."""
    spec = tiny_spec(tiny_bert, serving={"max_batch_size": 8, "length_buckets": [16, 64], "queue_timeout_us": 1})
    built = pipeline.build(spec, "cpu", tmp_path, "repository")
    assert built.entry is not None
    with TritonServer(built.entry.repository, Ports.free()) as server:
        supervisor = Supervisor(server)
        refusals = 0
        end = time.monotonic() + 60
        while time.monotonic() < end and refusals < 3:
            failure = supervisor.probe()
            if failure is not None and "timeout" in failure.reason.lower():
                assert failure.busy
                refusals += 1
        supervisor.close()
    assert refusals == 3


def test_a_response_cache_answers_again(minilm: Build, tmp_path: Path) -> None:
    import urllib.request

    serving = {**minilm.spec.serving.model_dump(), "response_cache_bytes": 1 << 20}
    spec = DeploymentSpec.model_validate({**minilm.spec.model_dump(), "serving": serving})
    assert minilm.entry is not None
    proof = minilm.proof
    assert proof is not None
    publish.publish(spec, "cpu", minilm.checkpoint, [minilm.served_graph], tmp_path / "repository", proof=proof)
    with ready_server(tmp_path / "repository") as server:
        for _ in range(3):
            _infer(server.grpc_address, [b"the same text"])
        text = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10).read().decode()
    assert 'nv_cache_num_hits_per_model{model="minilm",version="1"} 2' in text


def test_a_stub_that_cannot_start_says_why(minilm: Build, tmp_path: Path) -> None:
    """A damaged version directory: not ready, with Triton's own reason, and nothing left running."""
    from runtime.errors import ServerFault

    assert minilm.entry is not None
    repository = Path(shutil.copytree(minilm.entry.repository, tmp_path / "repository"))
    (repository / "minilm-tokenizer" / "1" / "tokenizer.json").write_text("{}")
    with TritonServer(repository, Ports.free()) as server:
        prefix = server.shm_prefix
        with pytest.raises(ServerFault, match="tokenizer"):
            Supervisor(server).wait_ready(60, threading.Event())
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))
    assert not psutil.pid_exists(server.pid) or os.getpid() == server.pid
