"""The code key of a stage holds all that the stage runs, and little else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from builders.pipeline import encoder, generator, partition
from builders.store.closure import HOUSE, closure, code_key, tool_versions
from tests import ROOT

FILES = {
    "builders/__init__.py": "",
    "builders/stage/__init__.py": "from builders.stage.handed import made\nfrom builders.beside import other\n",
    "builders/stage/handed.py": "made = 1\n",
    "builders/beside.py": "other = 2\n",
    "builders/cli.py": "import builders.run\n",
    "builders/deep.py": (
        "from builders.stage import made as deep\n"  # a module may bind its own name
        "def late():\n    from runtime import pools\n    return pools\n"
    ),
    "runtime/__init__.py": "",
    "runtime/pools.py": "import onnx\nWORKER = 'runtime.worker'\n",
    "runtime/worker.py": "",
    "builders/run.py": (
        "from builders import deep\nfrom builders.stage import made\nimport numpy\n\n"
        "def stage(out):\n    return helper(out)\n\n"
        "def helper(out):\n    return deep.late(), made, numpy\n\n"
        "def unrelated(out):\n    from builders import beside\n    return beside\n"
    ),
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_package_of_the_house_is_followed() -> None:
    """One that is not would count as a library without a version, and its changes as none."""
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(HOUSE)


def key(house: Path) -> dict[str, Any]:
    return code_key(_stage(house), house)


def _stage(house: Path) -> Callable[..., Any]:
    """The stage as a function whose code says that it is of that file; nothing of it runs."""
    space: dict[str, Any] = {}
    exec(compile("def stage(out): ...", str(house / "builders/run.py"), "exec"), space)
    stage: Callable[..., Any] = space["stage"]
    return stage


@pytest.mark.parametrize(
    "name", ["builders/deep.py", "runtime/pools.py", "runtime/worker.py", "builders/stage/handed.py"]
)
def test_what_a_stage_reaches_counts(house: Path, name: str) -> None:
    """Imports inside functions, the module of a process by its name, and what a package hands on."""
    before = key(house)
    (house / name).write_text(FILES[name] + "# changed\n")
    assert key(house) != before


@pytest.mark.parametrize("name", ["builders/cli.py", "builders/beside.py"])
def test_what_it_does_not_reach_does_not(house: Path, name: str) -> None:
    before = key(house)
    (house / name).write_text(FILES[name] + "# changed\n")
    assert key(house) == before


def test_of_its_own_file_only_what_it_uses(house: Path) -> None:
    before, file = key(house), house / "builders/run.py"
    file.write_text(FILES["builders/run.py"].replace("return beside", "return beside, 1"))
    assert key(house) == before
    file.write_text(FILES["builders/run.py"].replace("return deep.late()", "return deep.late(), 1"))
    assert key(house) != before


def test_a_module_that_is_missing_is_no_empty_key(house: Path) -> None:
    (house / "builders/deep.py").write_text("import builders.gone\n")
    with pytest.raises(LookupError, match=r"builders\.gone is imported"):
        key(house)


def test_libraries_count_by_what_provides_them(house: Path) -> None:
    assert set(key(house)["libraries"]) == {"numpy", "onnx"}
    assert tool_versions("no_such_module") == {"no_such_module": "absent"}
    assert tool_versions("onnx_ir")["onnx_ir"] == metadata.version("onnx-ir")
    assert tool_versions("yaml")["yaml"] == f"pyyaml {metadata.version('PyYAML')}"


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        (encoder.export, "builders.checkpoint"),
        (encoder.quantize, "builders.quantize.smoothquant"),
        (generator.qualify, "runtime.rows"),
        (partition.partition, "runtime.ranks.worker"),
    ],
)
def test_stages_of_the_pipeline_reach_what_their_results_depend_on(stage: Callable[..., Any], module: str) -> None:
    from builders.store.closure import _definition, _used

    file, name = _definition(stage)
    reached = closure(_used(file.read_text(), name)[1])
    assert any(found == module or found.startswith(f"{module}.") for found in reached)
    assert not [found for found in reached if found.startswith(("builders.commands", "builders.manifests"))]
    assert not {"builders.commands.show", "builders.pipeline.one_file", "builders.__main__"} & set(reached)


@pytest.mark.slow
def test_keys_graphs_and_programs_are_the_same_in_every_process(tiny_bert: Path, tmp_path: Path) -> None:
    """Sets of strings have another order under each seed."""
    script = Path(__file__).with_name("digests_of_a_build.py")
    outputs = [
        subprocess.run(
            [sys.executable, str(script), str(tiny_bert), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=300, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()) == 9
