"""The map of the house, read from its imports: `make house` prints it and draws `docs/house.svg`.

A room is a folder, or a file that stands alone in a package. Arrows are imports between rooms. They run down: each room
stands on a floor and imports rooms of lower floors only, so there is no circle.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "cluster", "loadtest", "builders", "online", "measure")
# From the ground up. Rooms of one floor do not know each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("runtime",),
    ("runtime/proof", "runtime/ranks"),
    ("runtime/tensorrt", "runtime/encoding/executor", "runtime/generation/executor"),
    ("runtime/encoding", "runtime/generation"),
    ("runtime/client.py",),
    ("runtime/server", "runtime/gateway"),
    ("runtime/pod",),
    ("loadtest", "cluster"),
    ("loadtest/requests",),
    ("loadtest/seen",),
    ("loadtest/plan.py",),
    ("loadtest/report",),
    ("loadtest/drive",),
    ("builders/errors.py", "builders/digests.py"),
    ("builders/spec",),
    ("builders/rounded.py",),
    ("builders/artifacts.py",),
    ("builders/graph.py",),
    ("builders/store", "builders/checkpoint", "builders/planning", "builders/partition", "builders/manifests/lint"),
    ("builders/judging", "builders/partition/rules", "builders/manifests"),
    ("builders/training",),
    (
        "builders/compress", "builders/export", "builders/quantize", "builders/partition/cut", "builders/engine",
        "builders/repository",
    ),
    ("builders/partition/prove", "builders/qat", "builders/edge"),
    ("builders/pipeline",),
    ("online/feedback/migrations/versions", "online", "online/tasks"),
    ("online/feedback", "online/rollout", "online/gate"),
    ("online/feedback/migrations", "online/learner", "online/serving", "online/doorway"),
    ("online/federated", "online/flower"),
    ("online/loop",),
    ("builders/commands",),
    ("builders/__main__.py",),
    ("measure/small_model", "measure/other_text.py", "measure/serving.py"),
    ("measure/bench",),
    ("measure/gpu_proof", "measure/chaos", "measure/clients", "measure"),
)  # fmt: skip
_LONGEST = 10  # names shown of a list


@dataclass(frozen=True)
class House:
    """`texts` are sources by path, relative to the root; `imports` the files that each file imports."""

    texts: Mapping[str, str]

    @cached_property
    def imports(self) -> dict[str, frozenset[str]]:
        return {file: frozenset(self._imported(file)) - {file} for file in self.texts}

    @cached_property
    def rooms(self) -> dict[str, list[str]]:
        """Files by room. A file that FLOORS names is a room by itself."""
        alone = {room for floor in FLOORS for room in floor if room.endswith(".py")}
        found: dict[str, list[str]] = defaultdict(list)
        for file in sorted(self.texts):
            if not _is_marker(file):
                found[file if file in alone else str(Path(file).parent)].append(file)
        return dict(found)

    @cached_property
    def arrows(self) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """The imports behind each pair of rooms."""
        room_of = {file: room for room, files in self.rooms.items() for file in files}
        found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for file, others in self.imports.items():
            for other in sorted(others):
                pair = room_of.get(file), room_of.get(other)
                if None not in pair and pair[0] != pair[1]:
                    found[pair].append((file, other))  # type: ignore[index]  # neither is None
        return dict(found)

    def _imported(self, file: str) -> Iterator[str]:
        """What only type checkers see counts as well: it is known all the same."""
        for node in ast.walk(ast.parse(self.texts[file])):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from (found for name in names if (found := self._file(name)) is not None)

    def _file(self, name: str) -> str | None:
        """The file of a module, or of the module that a name is taken from."""
        path = name.replace(".", "/")
        for stem in (path, path.rpartition("/")[0]):
            for found in (f"{stem}.py", f"{stem}/__init__.py"):
                if found in self.texts:
                    return found
        return None

    def circles(self) -> list[list[str]]:
        """Files, and rooms, that reach themselves."""
        between: dict[str, set[str]] = defaultdict(set)
        for room, other in self.arrows:
            between[room].add(other)
        return [*_circles(self.imports), *_circles(between)]

    def sentence(self, room: str) -> str:
        """What the room is for: the first line of its docstring."""
        file = room if room.endswith(".py") else f"{room}/__init__.py"
        return (ast.get_docstring(ast.parse(self.texts.get(file, ""))) or "").partition("\n")[0]

    def twice(self) -> dict[str, list[str]]:
        """Public classes of one name in several files."""
        found: dict[str, list[str]] = defaultdict(list)
        for file, text in self.texts.items():
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(file)
        return {name: files for name, files in sorted(found.items()) if len(files) > 1}

    def longest_function(self) -> tuple[int, str]:
        return max(
            ((node.end_lineno or 0) - node.lineno + 1, f"{file}: {node.name}")
            for file, text in self.texts.items()
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )


def read_house(root: Path = ROOT) -> House:
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    return House({file.relative_to(root).as_posix(): file.read_text() for file in files})


def floor_of(room: str) -> int:
    """Raises LookupError for a room that stands on none."""
    for number, floor in enumerate(FLOORS):
        if room in floor:
            return number
    raise LookupError(f"{room} stands on no floor; name it in measure/house.py")


def _is_marker(file: str) -> bool:
    """The `__init__.py` of a package holds no more than its sentence."""
    return file.count("/") == 1 and file.endswith("/__init__.py")


def _circles(graph: Mapping[str, frozenset[str] | set[str]]) -> list[list[str]]:
    """By taking away what imports nothing that is left, over and over."""
    left = {node: set(others) for node, others in graph.items()}
    while ends := [node for node, others in left.items() if not others & left.keys()]:
        for node in ends:
            del left[node]
    while starts := [node for node in left if not any(node in others for others in left.values())]:
        for node in starts:
            del left[node]
    return [sorted(left)] if left else []


def summary(house: House) -> str:
    lines_of = {file: len(text.splitlines()) for file, text in house.texts.items()}
    longest = max(lines_of, key=lambda file: lines_of[file])
    length, function = house.longest_function()
    twice = house.twice()
    rows = []
    for number, floor in enumerate(FLOORS):
        for room in floor:
            files = house.rooms.get(room, [])
            rows.append(f"{number:>3}  {room:<28}{len(files):>4} files{sum(lines_of[file] for file in files):>7} lines")
    return "\n".join(
        [
            *reversed(rows),
            "",
            f"packages         {len(PACKAGES)}: {', '.join(PACKAGES)}",
            f"rooms            {len(house.rooms)} on {len(FLOORS)} floors",
            f"files            {len(house.texts)}, {sum(lines_of.values())} lines",
            f"arrows           {len(house.arrows)} between rooms",
            f"circles          {len(house.circles())}",
            f"upward arrows    {len(upward(house))}",
            f"longest file     {lines_of[longest]} lines, {longest}",
            f"longest function {length} lines, {function}",
            f"names twice      {len(twice)}: {', '.join(list(twice)[:_LONGEST])}{' …' * (len(twice) > _LONGEST)}",
        ]
    )


def upward(house: House) -> list[str]:
    """Imports that do not run down, as sentences."""
    return [
        f"{file} imports {other}: {other_room} does not stand below {room}"
        for (room, other_room), pairs in house.arrows.items()
        if floor_of(other_room) >= floor_of(room)
        for file, other in pairs
    ]


def main() -> None:
    house = read_house()
    print(summary(house))
    (ROOT / "docs" / "house.svg").write_text(picture(house))


def _floors(package: str) -> int:
    return sum(floor[0].split("/")[0] == package for floor in FLOORS)


_WIDTH, _BOX, _ROW, _GAP = 1400, 34, 66, 14
_CENTRES = {  # of the width
    "runtime": 0.45, "cluster": 0.12, "loadtest": 0.12, "builders": 0.6, "online": 0.5, "measure": 0.5,
}  # fmt: skip
_COLOURS = dict(zip(PACKAGES, ("#42689a", "#2f7f7a", "#a85a14", "#3c7d35", "#a03a4a", "#8d4f80"), strict=True))


# On the same ground as the builders stand load tests and the cluster; the rest stands on and among the builders.
_TOWERS = {"runtime": "runtime", "cluster": "loadtest", "loadtest": "loadtest"}
_ROWS = sum(map(_floors, ("runtime", "builders", "online", "measure")))


def picture(house: House) -> str:
    """The rooms by floor, the ground at the bottom, with the arrows that a way over other rooms tells already."""
    places = _places(house)
    height = _ROWS * _ROW + 2 * _GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for room, other in sorted(_shortest(house)):
        (x, y, width), (to_x, to_y, to_width) = places[room], places[other]
        start, end, low = x + width / 2, to_x + to_width / 2, y + _BOX
        middle = (low + to_y) / 2
        curve = f"M{start:.0f},{low:.0f} C{start:.0f},{middle:.0f} {end:.0f},{middle:.0f} {end:.0f},{to_y:.0f}"
        lines.append(f'<path d="{curve}" fill="none" stroke="{_COLOURS[room.split("/")[0]]}" stroke-opacity="0.55"/>')
    for room, (x, y, width) in places.items():
        colour = _COLOURS[room.split("/")[0]]
        lines.append(
            f'<g><title>{escape(house.sentence(room))}</title><rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" '
            f'height="{_BOX}" rx="5" fill="{colour}"/><text x="{x + width / 2:.0f}" y="{y + 22:.0f}" font-size="14" '
            f'fill="white" text-anchor="middle">{escape(room)}</text></g>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _places(house: House) -> dict[str, tuple[float, float, float]]:
    """Left edge, upper edge and width of each room's box. Load tests and the cluster stand beside the builders."""
    found: dict[str, tuple[float, float, float]] = {}
    first: dict[str, int] = {}
    for number, floor in enumerate(FLOORS):
        rooms = [room for room in floor if room in house.rooms]
        package = rooms[0].split("/")[0]
        tower = _TOWERS.get(package, "builders")
        row = number - first.setdefault(tower, number) + (_floors("runtime") if tower != "runtime" else 0)
        widths = [8.2 * len(room) + 18 for room in rooms]
        x = _CENTRES[package] * _WIDTH - (sum(widths) + _GAP * (len(rooms) - 1)) / 2
        for room, width in zip(rooms, widths, strict=True):
            found[room] = (x, _GAP + (_ROWS - 1 - row) * _ROW, width)
            x += width + _GAP
    return found


def _shortest(house: House) -> set[tuple[str, str]]:
    """Arrows but for those that a way over other rooms tells as well."""
    reach: dict[str, set[str]] = {}
    kept = set()
    for room in sorted(house.rooms, key=floor_of):
        below = {other for start, other in house.arrows if start == room}
        kept |= {(room, other) for other in below if not any(other in reach[via] for via in below)}
        reach[room] = below.union(*(reach[other] for other in below))
    return kept


if __name__ == "__main__":
    main()
