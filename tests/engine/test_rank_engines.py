"""Engines of ranks: real TensorRT for RTX builds, their layouts for Triton, and what Triton says to these."""

from __future__ import annotations

import shutil
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient import grpc as triton_grpc
from tritonclient.grpc import model_config_pb2

from builders import pipeline
from builders.artifacts import RepositoryEntry
from builders.engine import tensorrt
from builders.errors import EngineError, UnsupportedError
from builders.pipeline import Build, proving
from builders.repository import publish
from builders.spec import DeploymentSpec
from builders.store.store import Store
from runtime.errors import NotProven
from runtime.model_config import to_pbtxt
from runtime.server.launch import Ports, TritonServer
from runtime.server.supervise import Supervisor
from tests.conftest import tiny_spec

PARALLEL = {"tp": {"tensor": 2}, "pp": {"pipeline": 2}, "both": {"tensor": 2, "pipeline": 2}}
SERVING = {"executor": "onnxruntime", "max_batch_size": 8, "length_buckets": [16, 64]}


@pytest.fixture(scope="module", params=["tp", "pp"])
def built(request: pytest.FixtureRequest, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Engines of TensorRT for RTX: on a machine without a GPU full TensorRT builds none."""
    spec = tiny_spec(tiny_bert, parallel=PARALLEL[request.param], serving=SERVING, precision={"gpu": "fp16"})
    return pipeline.build(spec, "gpu", tmp_path_factory.mktemp("ranks"), "engine")


def _for_triton(spec: DeploymentSpec) -> DeploymentSpec:
    return spec.model_copy(update={"engine": spec.engine.model_copy(update={"flavour": "tensorrt"})})


def _publish(built: Build, spec: DeploymentSpec, repository: Path) -> tuple[RepositoryEntry, bool]:
    proof = proving.make(built, Store(built.engines[0].directory.parents[1]), lambda stage, message: None).proof
    assert proof is not None
    return publish.publish(spec, "gpu", built.checkpoint, built.engines, repository, built.partition, proof=proof)


def test_every_rank_has_an_engine_that_keeps_its_collectives(built: Build) -> None:
    partition = built.partition
    assert partition is not None
    ranks = [(stage, rank) for stage in range(partition.pipeline) for rank in range(partition.tensor)]
    assert [(engine.stage, engine.rank) for engine in built.engines] == ranks
    for engine in built.engines:
        assert engine.collectives == len(partition.stages[engine.stage].collectives)
        assert bool(engine.collectives) == (partition.tensor == 2)
        assert engine.file_path.stat().st_size > 10_000
        assert engine.source_digest == partition.digest


def test_a_collective_of_another_size_than_the_partitions_is_refused(built: Build, tmp_path: Path) -> None:
    partition = built.partition
    assert partition is not None
    if partition.tensor == 1:
        pytest.skip("stages alone have no collectives")
    shutil.copytree(partition.directory, tmp_path / "partition")
    file = tmp_path / "partition" / partition.stages[0].files[1]
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "nb_rank":
                attribute.i = 4
    file.write_bytes(model.SerializeToString())
    damaged = partition.model_copy(update={"directory": tmp_path / "partition"})
    with pytest.raises(
        EngineError, match=r"rank1\.onnx: its network has collectives over \[4(, 4)+\] ranks, the partition \d+ over 2"
    ):
        tensorrt.build_rank_engine(damaged, 0, 1, "fp16", "tensorrt-rtx", "sm89", built.spec.engine.profiles, tmp_path)
    assert not list(tmp_path.glob("*.plan"))


def test_tritons_layout_of_the_engines(built: Build, tmp_path: Path) -> None:
    assert built.partition is not None
    spec = _for_triton(built.spec)
    entry, _ = _publish(built, spec, tmp_path)
    if built.partition.tensor == 2:
        version = tmp_path / "tiny-encoder" / "1"
        assert {path.name for path in version.glob("*[0-9n]")} >= {"model.plan", "model.plan.rank0", "model.plan.rank1"}
        assert (version / "model.plan").read_bytes() == built.engines[0].file_path.read_bytes()
        assert (version / "model.plan.rank1").read_bytes() == built.engines[1].file_path.read_bytes()
    else:
        assert entry.models == ("tiny-tokenizer", "tiny-stage0", "tiny-stage1", "tiny")
        for stage in (0, 1):
            config = _read_config(tmp_path / f"tiny-stage{stage}")
            assert list(config.instance_group[0].gpus) == [stage]
            plan = tmp_path / f"tiny-stage{stage}" / "1" / "model.sm89.plan"
            assert plan.read_bytes() == built.engines[stage].file_path.read_bytes()


def _read_config(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


STAND_IN = '''
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    """Sums of what comes in, in the shape and type of what goes out."""

    def initialize(self, args):
        import json
        config = json.loads(args["model_config"])
        self.inputs = [item["name"] for item in config["input"]]
        self.output = config["output"][0]
        self.width = int(self.output["dims"][-1])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        arrays = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
        rows, length = arrays[0].shape[:2]
        total = sum(float(array.astype(np.float64).sum()) for array in arrays)
        half = self.output["data_type"] == "TYPE_FP16"
        shape = (rows, length, self.width) if half else (rows, self.width)
        values = np.full(shape, total % 7 + 1, np.float16 if half else np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.output["name"], values)])
'''


@pytest.mark.triton
def test_a_real_triton_takes_the_gpu_ensembles(built: Build, tmp_path: Path) -> None:
    """Only the engines' backend is exchanged, for a Python one with the same tensors: the ensembles are as on a GPU."""
    assert built.partition is not None
    repository = tmp_path / "repository"
    spec = _for_triton(built.spec)
    entry, _ = _publish(built, spec, repository)
    for name in entry.models:
        config = _read_config(repository / name)
        if config.platform != "tensorrt_plan":
            continue
        config.platform, config.backend = "", "python"
        config.ClearField("cc_model_filenames")
        config.ClearField("parameters")
        config.ClearField("instance_group")
        config.instance_group.add(kind="KIND_CPU", count=1)
        (repository / name / "config.pbtxt").write_text(to_pbtxt(config))
        (repository / name / "1" / "model.py").write_text(STAND_IN)
    with TritonServer(repository, Ports.free()) as server:
        with closing(Supervisor(server)) as supervisor, pytest.raises(NotProven, match="tiny version 1 is not proven"):
            supervisor.wait_ready(120, threading.Event())  # the whole way to the stages' outputs, which are made up
        item = triton_grpc.InferInput("text", [3, 1], "BYTES")
        item.set_data_from_numpy(np.array([[b"a"], [b"b c"], [b"d e f"]], dtype=np.object_))
        with triton_grpc.InferenceServerClient(server.grpc_address) as client:
            got = client.infer("tiny", [item], client_timeout=30)
    vectors, counts = got.as_numpy("embedding"), got.as_numpy("token_count")
    assert vectors is not None
    assert counts is not None
    assert vectors.shape == (3, 32)
    assert counts.shape == (3, 1)
    assert (vectors > 0).all()


@pytest.mark.parametrize(("kind", "flavour", "said"), [
    ("tp", "tensorrt-rtx", r"set engine\.flavour: tensorrt"),
    ("both", "tensorrt", "use tensor ranks alone, or stages alone"),
])  # fmt: skip
def test_ranks_that_triton_cannot_run_are_refused_before_any_work(
    tiny_bert: Path, tmp_path: Path, kind: str, flavour: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "require_tensorrt", lambda flavour: None)  # full TensorRT is not installed here
    spec = tiny_spec(tiny_bert, parallel=PARALLEL[kind], serving=SERVING, engine={"flavour": flavour})
    with pytest.raises(UnsupportedError, match=said):
        pipeline.build(spec, "gpu", tmp_path / "build", "repository")
    assert not (tmp_path / "build").exists()
