"""The rules of the house, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from measure.house import FLOORS, PACKAGES, House, floor_of, picture, read_house, upward
from tests import ROOT

HOUSE = read_house()
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "openvino", "polygraphy", "tensorrt", "tensorrt_rtx", "locust",
         "kubernetes", "kubernetes_validate", "jsonschema", "websocket", "sqlalchemy", "alembic"}  # fmt: skip
# Rooms and files that are about that library alone. Ranks are processes of their own, which are nothing but torch.
ABOUT = {
    "loadtest/drive/": {"locust"},
    "builders/partition/": {"onnx"},
    "builders/qat/layer.py": {"torch"},
    "builders/training/muon.py": {"torch"},
    "measure/live_users.py": {"locust"},
    "online/feedback/": {"sqlalchemy", "alembic"},
    "runtime/ranks/": {"torch"},
    "runtime/tensorrt/rank_worker.py": {"torch"},
}


def _sources() -> list[Path]:
    return [
        *(ROOT / file for file in HOUSE.texts),
        *(ROOT / "model_repository").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imported(text: str, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports, and names that may be modules; a guard for type checkers is no top level."""
    tree = ast.parse(text)
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{item.name}" for item in node.names)}
    return found


def test_every_room_stands_on_one_floor() -> None:
    named = [room for floor in FLOORS for room in floor]
    assert len(named) == len(set(named))
    assert set(named) == set(HOUSE.rooms)


def test_arrows_run_down() -> None:
    assert upward(HOUSE) == []


def test_no_circles() -> None:
    """Of rooms this follows from the floors; inside a room it does not."""
    assert HOUSE.circles() == []


def test_packages_know_what_is_below_them() -> None:
    """Floors order rooms; of packages, some that stand higher still do not know all below."""
    may = {
        "runtime": set(),
        "cluster": {"runtime"},
        "loadtest": {"runtime"},
        "builders": {"runtime", "cluster", "loadtest", "online"},
        "online": {"runtime", "cluster", "loadtest", "builders"},
        "measure": {"runtime", "cluster", "loadtest", "builders", "online"},
    }
    assert set(may) == set(PACKAGES)
    for room, other in HOUSE.arrows:
        package, known = room.split("/")[0], other.split("/")[0]
        assert known == package or known in may[package], HOUSE.arrows[room, other]
        if (package, known) == ("builders", "online"):
            assert room == "builders/commands", "online learning drives the pipeline; of builders, commands drive it"


def test_stages_do_not_know_each_other() -> None:
    """The pipeline is the only importer of all stages, and only front ends drive it."""
    stages = {f"builders/{name}" for name in ("compress", "export", "quantize", "engine", "repository")}
    stages |= {"builders/partition/cut", "builders/partition/prove"}
    assert {floor_of(stage) for stage in stages} <= {floor_of("builders/export"), floor_of("builders/partition/prove")}
    drivers = {room for room, other in HOUSE.arrows if other == "builders/pipeline"}
    measuring = {room for room in HOUSE.rooms if room.startswith("measure")}
    assert drivers <= {"builders/commands", "online/loop"} | measuring


def test_a_room_says_what_it_is_for() -> None:
    for room in HOUSE.rooms:
        sentence = HOUSE.sentence(room)
        assert sentence.endswith((".", ":")), f"{room}: {sentence!r}"
        assert 20 < len(sentence) < 130, f"{room}: {sentence!r}"


def test_a_name_means_one_thing() -> None:
    assert HOUSE.twice() == {}


def test_only_adapters_know_triton() -> None:
    for path in _sources():
        if "triton_python_backend_utils" in _imported(path.read_text()):
            assert _name(path).startswith("model_repository/")
            assert path.parts[-2:] == ("1", "model.py")


def test_heavy_libraries_load_where_they_are_used() -> None:
    for file, text in HOUSE.texts.items():
        allowed = next((names for start, names in ABOUT.items() if file.startswith(start)), set())
        heavy = {name.split(".")[0] for name in _imported(text, top_level_only=True)} & HEAVY
        assert heavy <= allowed, file


def test_a_file_is_a_thought() -> None:
    for path in _sources():
        assert len(path.read_text().splitlines()) <= 400, path


def test_the_picture_is_of_this_house() -> None:
    assert (ROOT / "docs" / "house.svg").read_text() == picture(HOUSE), "run `make house`"


def test_help_loads_no_heavy_library() -> None:
    code = "import sys, builders.__main__; print(*{name.split('.')[0] for name in sys.modules})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert not set(output.split()) & (HEAVY | {"numpy", "grpc", "tritonclient", "matplotlib"})


@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_circles_are_found_in_any_house(arrows: set[tuple[int, int]]) -> None:
    """Against the walk from each file: it is in a circle when it reaches itself."""
    texts = {
        f"runtime/m{number}.py": "\n".join(f"import runtime.m{to}" for start, to in sorted(arrows) if start == number)
        for number in range(7)
    }
    house = House(texts)
    reached = {number: {to for start, to in arrows if start == number != to} for number in range(7)}
    for _ in range(7):
        reached = {number: others.union(*(reached[other] for other in others)) for number, others in reached.items()}
    loops = {f"runtime/m{number}.py" for number, others in reached.items() if number in others}
    assert loops <= {file for circle in house.circles() for file in circle}
    assert bool(loops) == bool(house.circles())
