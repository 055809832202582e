"""The rules of the house, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("builders", "cluster", "loadtest", "measure", "model_repository", "runtime", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
STAGES = {"compress", "export", "quantize", "partition", "engine", "repository", "checkpoint"}
FRONT_ENDS = (
    "builders/__main__.py",
    "builders/commands/",
    "measure/demo.py",
    "measure/demo_generate.py",
    "builders/commands/show.py",
    "builders/pipeline/one_file.py",
    "measure/",
)
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "openvino", "polygraphy", "tensorrt", "tensorrt_rtx", "locust",
         "kubernetes", "kubernetes_validate", "jsonschema", "websocket"}  # fmt: skip


def _imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Modules that a file imports; what only type checkers see does not count."""
    tree = ast.parse(path.read_bytes())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{item.name}" for item in node.names)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _stage(path: Path) -> str | None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "builders" and len(parts) > 1 and parts[1] in STAGES else None


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_run_one_way(path: Path) -> None:
    imported = set(_imports(path))
    top = path.relative_to(ROOT).parts[0]
    if top == "runtime":
        assert not {name for name in imported if name.split(".")[0] in ("builders", "loadtest")}
    if top == "loadtest":
        assert not {name for name in imported if name.split(".")[0] == "builders"}
    stage = _stage(path)
    if stage is not None:
        others = {f"builders.{other}" for other in STAGES - {stage}}
        # `position_offset` and the records of a checkpoint are facts that export shares, not a stage's work.
        others.discard("builders.checkpoint")
        assert not {name for name in imported if ".".join(name.split(".")[:2]) in others}
        assert "builders.pipeline" not in imported
    if "builders.pipeline" in imported and not _name(path).startswith("builders/pipeline/"):
        assert top == "tests" or _name(path).startswith(FRONT_ENDS), "only front ends drive the pipeline"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_only_adapters_know_triton(path: Path) -> None:
    if "triton_python_backend_utils" in set(_imports(path)):
        assert _name(path).startswith("model_repository/")
        assert _name(path).endswith("/1/model.py")


@pytest.mark.parametrize("path", [p for p in SOURCES if "tests" not in p.parts], ids=_name)
def test_heavy_libraries_load_where_they_are_used(path: Path) -> None:
    # Rooms and files that are about that library alone.
    rooms = {"loadtest/": {"locust"}, "builders/partition/": {"onnx"}, "builders/training/muon.py": {"torch"}}
    allowed = next((names for room, names in rooms.items() if _name(path).startswith(room)), set())
    heavy = {name.split(".")[0] for name in _imports(path, top_level_only=True)} & HEAVY
    ranks = _name(path).startswith("runtime/ranks/")  # processes of their own, which are nothing but torch
    assert ranks or not heavy - allowed


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_file_is_a_thought(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_help_loads_no_heavy_library() -> None:
    import subprocess

    code = "import sys, builders.__main__; print(*{name.split('.')[0] for name in sys.modules})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert not set(output.split()) & (HEAVY | {"numpy", "grpc", "tritonclient", "matplotlib"})
