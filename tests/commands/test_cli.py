"""The commands as a user types them: exit codes, messages, and nothing left behind."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_spec


def _run(*arguments: object, limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run(
        [sys.executable, "-m", "builders", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=limit,
    )


@pytest.fixture
def spec_file(tiny_bert: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_spec(tiny_bert).model_dump(mode="json")))
    return file


def test_build_speaks_json_and_does_nothing_twice(spec_file: Path, tmp_path: Path) -> None:
    first = _run("build", spec_file, "--build-dir", tmp_path / "build", "--json")
    again = _run("build", spec_file, "--build-dir", tmp_path / "build", "--json")
    assert first.returncode == again.returncode == 0, first.stderr
    one, two = json.loads(first.stdout), json.loads(again.stdout)
    assert one == two
    assert one["repository"]["version"] == 1
    assert one["graphs"][0]["quality"]["worst_cosine"] > 0.9999
    assert "(unchanged)" in _run("build", spec_file, "--build-dir", tmp_path / "build").stderr


def test_single_stages_chain(tiny_bert: Path, tmp_path: Path) -> None:
    sentence_transformers = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    (sentence_transformers / "1_Pooling").mkdir()
    (sentence_transformers / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    graph, small, plan = tmp_path / "graph.onnx", tmp_path / "small.onnx", tmp_path / "model.plan"
    exported = _run("export", sentence_transformers, "-o", graph, "--max-length", 64)
    assert exported.returncode == 0, exported.stderr
    quantised = _run("quantize", graph, "-o", small, "--json")
    assert quantised.returncode == 0, quantised.stderr
    assert json.loads(quantised.stdout)["quality"]["worst_cosine"] >= 0.98
    again = _run("quantize", small, "-o", tmp_path / "smaller.onnx")
    assert again.returncode == 2
    assert "expected fp32 or fp16" in again.stderr
    built = _run("engine", small, "-o", plan, "--target", "sm89", "--batch", "1:2:4", "--length", "1:16:64")
    assert built.returncode == 0, built.stderr
    assert plan.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "graph.onnx", "graph.onnx.json", "model.plan", "model.plan.json", "small.onnx", "small.onnx.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "no-such-spec"], "No such file"),
        (["build", "minilm", "--platform", "tpu"], "Invalid value"),
        (["export", "/no/such/folder", "-o", "x.onnx"], "no such folder"),
        (["quantize", "no-such.onnx", "-o", "x.onnx"], "no such file"),
        (["engine", "no-such.onnx", "-o", "x.plan", "--target", "sm89"], "no such file"),
        (["package", "no-such.onnx", "-o", "x.xml", "--target", "openvino"], "no such file"),
        (["package", "README.md", "-o", "x.xml", "--target", "ncnn"], "Invalid value for '--target'"),
        (["report", "no-such.json"], "no-such.json"),
        (["engine", "README.md", "-o", "x.plan", "--target", "sm89"], "no ONNX model"),
        (["loadtest", "minilm", "-o", "x.html"], "FILE.json"),
        (["serve", "minilm", "--http-port", "99999"], "less than or equal to 65535"),
    ],
)
def test_wrong_input_exits_2_with_a_cure(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("x.onnx").exists()


def test_ranks_without_their_executor_are_refused_clearly(spec_file: Path, tmp_path: Path) -> None:
    text = spec_file.read_text().replace("tensor: 1", "tensor: 2")
    spec_file.write_text(text.replace("executor: null", "executor: openvino"))
    done = _run("build", spec_file, "--build-dir", tmp_path / "build")
    assert done.returncode == 2
    assert "needs serving.executor=onnxruntime" in done.stderr
    assert not (tmp_path / "build").exists()


def test_a_missed_budget_exits_1_with_figures(spec_file: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(spec_file.read_text())
    data["precision"] = {"cpu": "int8", "calibration_samples": 8, "min_mean_cosine": 1.0}
    spec_file.write_text(yaml.safe_dump(data))
    done = _run("build", spec_file, "--build-dir", tmp_path / "build")
    assert done.returncode == 1
    assert "min_mean_cosine=1.0" in done.stderr


def test_a_disk_that_fills_leaves_nothing_half_written(spec_file: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the same write fails half-way."""
    done = _run("build", spec_file, "--build-dir", tmp_path / "build", limit_bytes=50_000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "build").rglob("*") if path.is_file()]
    fine = _run("build", spec_file, "--build-dir", tmp_path / "build")
    assert fine.returncode == 0, fine.stderr
