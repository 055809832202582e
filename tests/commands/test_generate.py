"""A language model as a user meets it: a spec, a build, a server, and text that streams from it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import pipeline
from builders.errors import InputError, UnsupportedError
from builders.pipeline import Build
from builders.spec import DeploymentSpec
from runtime.client import served_model, stream
from runtime.errors import ServerFault
from runtime.server.launch import Ports, TritonServer
from runtime.server.supervise import Supervisor, ready_server
from runtime.settings import GeneratorModelSettings
from runtime.tensorrt.rank_manifest import load_manifest
from tests import generators


def _spec(source: Path, **changes: object) -> DeploymentSpec:
    """A tiny model of random weights: its perplexity says nothing, so the budget is wide."""
    slices: dict[str, object] = {
        "model": {"source": str(source), "task": "generation", "max_length": 64},
        "precision": {"cpu": "w8", "max_perplexity_ratio": 2.0, "calibration_samples": 32},
        "generation": {"slots": 4, "cache_lengths": [16, 64]},
        **changes,
    }
    return DeploymentSpec.model_validate({"name": "tiny-lm", **slices})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generators.save_generator(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def built(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    return pipeline.build(_spec(llama), "cpu", tmp_path_factory.mktemp("lm"), "repository")


@pytest.fixture(scope="module")
def serving(built: Build) -> Iterator[TritonServer]:
    assert built.entry is not None
    with ready_server(built.entry.repository) as server:
        yield server


def test_weights_in_eight_bits_as_asked(built: Build, llama: Path) -> None:
    assert [graph.precision for graph in built.graphs] == ["fp32", "w8"]
    assert built.served_graph.operators["DequantizeLinear"] > 0
    again = pipeline.build(_spec(llama), "cpu", built.served_graph.directory.parents[2], "repository")
    assert again.entry == built.entry
    assert _spec(llama, precision={"cpu": "fp32"}).precision.cpu == "fp32"


def test_engines_for_each_length_of_the_cache(llama: Path, tmp_path: Path) -> None:
    """Real TensorRT for RTX builds of the fp16 graph: prompts and decoding are two profiles of each engine."""
    built = pipeline.build(_spec(llama), "gpu", tmp_path, "repository")
    assert [(engine.target, engine.capacity) for engine in built.engines] == [("sm89", 16), ("sm89", 64)]
    assert all(len(engine.profiles) == 2 for engine in built.engines)
    assert built.entry is not None
    settings = GeneratorModelSettings.load(built.entry.repository / "tiny-lm" / "1")
    assert settings.executor == "tensorrt-rtx"
    assert settings.files == {"sm89.16": "model.sm89.16.plan", "sm89.64": "model.sm89.64.plan"}
    for file in settings.files.values():
        assert (built.entry.repository / "tiny-lm" / "1" / file).stat().st_size > 10_000


def test_engines_of_pipeline_stages_and_their_manifest(llama: Path, tmp_path: Path) -> None:
    spec = _spec(llama, parallel={"pipeline": 2}, serving={"executor": "onnxruntime"})
    built = pipeline.build(spec, "gpu", tmp_path, "repository")
    assert [(engine.stage, engine.capacity) for engine in built.engines] == [(0, 16), (0, 64), (1, 16), (1, 64)]
    assert built.entry is not None
    version = built.entry.repository / "tiny-lm" / "1"
    settings = GeneratorModelSettings.load(version)
    assert settings.files == {"engines": "engines.json"}
    manifest = load_manifest(version / settings.files["engines"])
    assert all((version / file).stat().st_size > 10_000 for rank in manifest.ranks for file in rank.files.values())
    assert "gpus: 0" in (built.entry.repository / "tiny-lm" / "config.pbtxt").read_text()


def test_engines_of_both_halves_of_an_encoder_decoder(tmp_path: Path) -> None:
    source = generators.save_generator(tmp_path / "t5", "t5")
    spec = _spec(source, model={"source": str(source), "task": "seq2seq", "max_length": 64})
    built = pipeline.build(spec, "gpu", tmp_path / "build", "repository")
    assert built.entry is not None
    settings = GeneratorModelSettings.load(built.entry.repository / "tiny-lm" / "1")
    assert set(settings.files) == {"sm89.16", "sm89.64", "sm89.encoder"}


def test_tensor_ranks_need_full_tensorrt(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"TensorRT for RTX runs on one GPU"):
        pipeline.build(
            _spec(llama, parallel={"tensor": 2}, serving={"executor": "onnxruntime"}), "gpu", tmp_path, "repository"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.triton
def test_the_command_streams_and_a_seed_repeats(serving: TritonServer) -> None:
    command = [sys.executable, "-m", "builders", "generate", "the list", "--grpc", serving.grpc_address]
    command += ["--metrics", serving.metrics_address, "--max-tokens", "12", "--temperature", "1.0", "--seed", "5"]
    plain, again = (subprocess.run(command, capture_output=True, text=True, timeout=120, check=True) for _ in range(2))
    assert plain.stdout == again.stdout
    lines = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=True).stdout
    chunks = [json.loads(line) for line in lines.splitlines()]
    assert "".join(chunk["text"] for chunk in chunks) == plain.stdout.removesuffix("\n")
    assert chunks[-1]["completion_tokens"] == sum(len(chunk["tokens"]) for chunk in chunks)
    assert chunks[-1]["finish"] in ("length", "stop")


@pytest.mark.triton
def test_the_metrics_name_the_model(serving: TritonServer) -> None:
    assert served_model(serving.metrics_address) == "tiny-lm"
    with pytest.raises(InputError, match="name the --model"):
        served_model("127.0.0.1:9")


@pytest.mark.triton
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 1000}, "max_tokens"),
    ],
)
def test_a_refused_request_says_why(serving: TritonServer, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        list(stream(serving.grpc_address, "tiny-lm", "the list", options))
    assert list(stream(serving.grpc_address, "tiny-lm", "the list", {"max_tokens": 2}))[-1].finish is not None


@pytest.mark.triton
def test_an_unknown_model_and_an_absent_server(serving: TritonServer) -> None:
    with pytest.raises(InputError, match="unknown model"):
        list(stream(serving.grpc_address, "other", "x", {}))
    with pytest.raises(ServerFault):
        list(stream("127.0.0.1:9", "tiny-lm", "x", {}))


@pytest.mark.triton
@pytest.mark.parametrize("parallel", [{"tensor": 2}, pytest.param({"pipeline": 2}, marks=pytest.mark.slow)])
def test_ranks_serve_the_same_text(llama: Path, tmp_path: Path, parallel: dict[str, int]) -> None:
    """Greedy, in fp32: sums in another order differ in the last digits only."""
    exact = {"cpu": "fp32", "calibration_samples": 32}
    texts = []
    for changes in ({}, {"parallel": parallel, "serving": {"executor": "onnxruntime"}}):
        built = pipeline.build(_spec(llama, precision=exact, **changes), "cpu", tmp_path, "repository")
        assert built.entry is not None
        with ready_server(built.entry.repository) as server:
            chunks = list(stream(server.grpc_address, "tiny-lm", "the list of", {"max_tokens": 24}))
        texts.append("".join(chunk.text for chunk in chunks))
    assert texts[0] == texts[1]


@pytest.mark.triton
def test_a_busy_generator_is_not_taken_for_a_broken_one(llama: Path, tmp_path: Path) -> None:
    """A full queue refuses the probe as it refuses anyone; a reload would end what runs."""
    crowded = {"generation": {"slots": 1}, "serving": {"queue_size": 1}}
    built = pipeline.build(_spec(llama, **crowded), "cpu", tmp_path, "repository")
    assert built.entry is not None
    asked_to_stop = threading.Event()

    def ask(address: str) -> None:
        while not asked_to_stop.is_set():
            with contextlib.suppress(ServerFault):
                list(stream(address, "tiny-lm", "the list", {"max_tokens": 50, "min_length": 50}))

    with TritonServer(built.entry.repository, Ports.free()) as server:
        supervisor = Supervisor(server)
        supervisor.wait_ready(120, threading.Event())
        threads = [threading.Thread(target=ask, args=(server.grpc_address,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        failures = [failure for _ in range(30) if (failure := supervisor.probe()) is not None]
        asked_to_stop.set()
        for thread in threads:
            thread.join(60)
        supervisor.close()
    assert failures, "the queue was never full"
    assert all(failure.busy for failure in failures), failures


@pytest.mark.triton
def test_an_encoder_decoder_streams(tmp_path: Path) -> None:
    source = generators.save_generator(tmp_path / "t5", "t5")
    spec = _spec(source, model={"source": str(source), "task": "seq2seq", "max_length": 64})
    built = pipeline.build(spec, "cpu", tmp_path / "build", "repository")
    assert built.entry is not None
    with ready_server(built.entry.repository) as server:
        once, again = (
            list(stream(server.grpc_address, "tiny-lm", "the list of names", {"max_tokens": 8, "min_length": 8}))
            for _ in range(2)
        )
    assert sum(len(chunk.tokens) for chunk in once) == 8
    assert "".join(chunk.text for chunk in once) == "".join(chunk.text for chunk in again)
    assert once[-1].prompt_tokens > 1
