"""The tree in docs/house.md, written from the first line of each room's docstring."""

from __future__ import annotations

from pathlib import Path

from measure.house import PACKAGES, ROOT, House, read_house

PAGE = ROOT / "docs" / "house.md"
_BEGIN, _END = "<!-- tree: written by `make docs` -->\n", "<!-- end of the tree -->"


def tree(house: House) -> str:
    """A list of every room under its folder, from the highest package to the ground."""
    lines = []
    for package in reversed(PACKAGES):
        rooms = {package, *(room for room in house.rooms if room.startswith(f"{package}/"))}
        for room in sorted(rooms, key=lambda name: Path(name).parts):
            name = f"{room}/" if package == room else Path(room).name
            slash = "" if name.endswith((".py", "/")) else "/"
            lines.append(f"{'  ' * room.count('/')}- `{name}{slash}` {house.sentence(room)}")
    return "\n".join(lines) + "\n"


def with_tree(page: str, house: House) -> str:
    """The page with the tree of this house. Raises ValueError for a page without the two marks."""
    head, begin, rest = page.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: no lines {_BEGIN.strip()!r} and {_END!r}, between which the tree stands")
    return f"{head}{begin}\n{tree(house)}\n{end}{tail}"


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text(encoding="utf-8"), read_house()), encoding="utf-8")
    print(PAGE)
