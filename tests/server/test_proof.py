"""What keeps a real Triton from becoming ready: a model that answers in the right shape, with wrong numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper

from builders import pipeline
from builders.pipeline import Build
from builders.spec import DeploymentSpec
from loadtest.seen.proof import proof_from_metrics
from runtime.errors import NotProven
from runtime.proof.record import PROOF_FILE
from runtime.server.health import Health
from runtime.server.launch import Exposure, Ports, TritonServer
from runtime.server.serve import serve_repository
from runtime.server.supervise import Supervisor
from runtime.settings import ServerSettings
from tests import generators
from tests.conftest import ALL_ONES, tiny_spec

pytestmark = pytest.mark.triton
READY_S = 120
CONTROLLED = Exposure(control_secret="a-secret-of-this-test")
RANKS = {"executor": "onnxruntime", "max_batch_size": 8, "length_buckets": [16, 64]}


def _copy(built: Build, folder: Path) -> Path:
    assert built.entry is not None
    return Path(shutil.copytree(built.entry.repository, folder / "repository"))


@contextmanager
def _changed(file: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """`file` with other content for a while; what it is linked to stays."""
    before = file.read_bytes()
    file.unlink()
    file.write_bytes(change(before))
    try:
        yield
    finally:
        file.write_bytes(before)


def _wait_ready(server: TritonServer) -> None:
    with closing(Supervisor(server)) as supervisor:
        supervisor.wait_ready(READY_S, threading.Event())


def _load_again(server: TritonServer) -> None:
    """As the repair of a dead stub does: Triton skips a model whose files have not changed."""
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(server.grpc_address) as client:
        for name in server.settings.load_order:
            adapter = server.repository / name / "1" / "model.py"
            if adapter.is_file():
                adapter.touch()
            client.load_model(name, headers=server.control_headers)


def _weights(change: Callable[[np.ndarray], np.ndarray], which: int | None = None) -> Callable[[bytes], bytes]:  # type: ignore[type-arg]
    """A change of the graph's matrices: of all of them, or of one."""

    def apply(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        matrices = [item for item in model.graph.initializer if len(item.dims) == 2 and min(item.dims) > 16]
        for item in matrices if which is None else [matrices[which]]:
            values = change(numpy_helper.to_array(item).copy())
            item.CopyFrom(numpy_helper.from_array(values.astype(numpy_helper.to_array(item).dtype), item.name))
        return model.SerializeToString()

    return apply


def _saturated(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Large values stop at a limit, as sums in too few bits do."""
    limit = 1.0 * float(values.std())
    return np.clip(values, -limit, limit)


def _zeroed(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    values[: len(values) // 2] = 0
    return values


def _other_tokenizer(content: bytes) -> bytes:
    """The same entries under other numbers, as the file of another training has them."""
    data = json.loads(content)
    words = [word for word in data["model"]["vocab"] if not word.startswith(("[", "<"))]
    numbers = [data["model"]["vocab"][word] for word in words]
    data["model"]["vocab"] |= dict(zip(words, reversed(numbers), strict=True))
    return json.dumps(data).encode()


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    return pipeline.build(tiny_spec(tiny_bert), "cpu", tmp_path_factory.mktemp("encoder"), "repository")


def test_an_encoder_with_wrong_numbers_is_never_ready(encoder: Build, tmp_path: Path) -> None:
    """One server, whose models are loaded with one fault after the other."""
    repository = _copy(encoder, tmp_path)
    graph = repository / "tiny-encoder" / "1" / "graph.onnx"
    mutations = {
        "saturating arithmetic": (graph, _weights(_saturated)),
        "a weight block of zeros": (graph, _weights(_zeroed, -1)),
        "a swapped tokenizer": (repository / "tiny-tokenizer" / "1" / "tokenizer.json", _other_tokenizer),
        "all ones": (repository / "tiny-encoder" / "1" / "model.py", lambda content: content + ALL_ONES.encode()),
    }
    with TritonServer(repository, Ports.free(), exposure=CONTROLLED) as server:
        _wait_ready(server)
        for name, (file, change) in mutations.items():
            with _changed(file, change):
                _load_again(server)
                with pytest.raises(
                    NotProven, match=r"tiny version 1 is not proven on this machine: mean cosine"
                ) as said:
                    _wait_ready(server)
                print(name, said.value)
        _load_again(server)
        _wait_ready(server)
        assert server.proven is not None
        page = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10).read().decode()
        shown = {figure.name: figure.value for figure in proof_from_metrics(page, "tiny", "1")}
        assert shown == pytest.approx({figure.name: figure.value for figure in server.proven.figures}, abs=1e-5)


@pytest.mark.slow
def test_the_file_of_another_rank(tiny_bert: Path, tmp_path: Path) -> None:
    spec = tiny_spec(tiny_bert, parallel={"tensor": 2}, serving=RANKS)
    repository = _copy(pipeline.build(spec, "cpu", tmp_path, "repository"), tmp_path)
    folder = repository / "tiny-encoder" / "1"
    first, second = sorted(path for path in folder.iterdir() if path.suffix == ".data")
    with TritonServer(repository, Ports.free(), exposure=CONTROLLED) as server:
        _wait_ready(server)
        with _changed(second, lambda _: first.read_bytes()):
            _load_again(server)
            with pytest.raises(NotProven, match="mean cosine"):
                _wait_ready(server)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generators.save_generator(tmp_path_factory.mktemp("llama") / "model", "llama")


def test_a_generator_with_wrong_numbers_is_never_ready(llama: Path, tmp_path: Path) -> None:
    spec = DeploymentSpec.model_validate({
        "name": "tiny",
        "model": {"source": str(llama), "task": "generation", "max_length": 64},
        "precision": {"cpu": "fp32", "calibration_samples": 32},
        "generation": {"slots": 4, "cache_lengths": [16, 64], "chunk_tokens": 16},
    })  # fmt: skip
    repository = _copy(pipeline.build(spec, "cpu", tmp_path, "repository"), tmp_path)
    folder = repository / "tiny" / "1"
    mutations = {
        "a weight block of zeros": (folder / "graph.onnx", _weights(_zeroed, -1)),
        "a swapped tokenizer": (folder / "tokenizer.json", _other_tokenizer),
    }
    with TritonServer(repository, Ports.free(), exposure=CONTROLLED) as server:
        _wait_ready(server)
        assert server.proven is not None
        assert {figure.name for figure in server.proven.figures} == {"perplexity ratio", "log-probability difference"}
        for name, (file, change) in mutations.items():
            with _changed(file, change):
                _load_again(server)
                with pytest.raises(NotProven, match=r"not proven on this machine: perplexity ratio") as said:
                    _wait_ready(server)
                print(name, said.value)


def test_serve_says_the_figures_last_and_exits_1(encoder: Build, tmp_path: Path) -> None:
    """The whole command on a version that was damaged after the build; and on one of an earlier release."""
    from builders.pipeline import repository_path

    assert encoder.entry is not None
    build_dir = tmp_path / "build"
    repository = repository_path(build_dir, encoder.spec, "cpu")
    shutil.copytree(encoder.entry.repository.parents[2], build_dir)
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(encoder.spec.model_dump(mode="json")))
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    command = [sys.executable, "-m", "builders", "serve", str(file), "--build-dir", str(build_dir), *ports]
    with _changed(repository / "tiny-encoder" / "1" / "graph.onnx", _weights(_saturated)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: tiny version 1 is not proven on this machine: mean cosine 0.")
    assert "(at least 0.998)" in last
    assert "is ready" not in done.stdout


def test_a_version_without_a_proof_is_refused_by_name(encoder: Build, tmp_path: Path) -> None:
    """As a pod serves it: the kubelet is told why, to the end."""
    repository, health = _copy(encoder, tmp_path), Health()
    settings = ServerSettings.load(repository)
    (repository / "tiny" / "1" / PROOF_FILE).unlink()
    settings.model_copy(update={"proof_digest": None}).save(repository)
    with pytest.raises(NotProven, match="run `trireme build` again"):
        serve_repository(repository, Ports.free(), READY_S, True, health=health)
    assert str(health.ready()).startswith("version 1 of tiny carries no proof: an earlier release published it")
