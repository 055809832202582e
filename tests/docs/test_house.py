"""The tree in docs/house.md is the tree on disk."""

from __future__ import annotations

import re

from measure.house import PACKAGES, read_house
from measure.house_page import PAGE, tree, with_tree
from tests import ROOT

HOUSE = read_house()


def test_the_committed_tree_is_what_the_rooms_say() -> None:
    page = PAGE.read_text()
    assert page == with_tree(page, HOUSE), "run `make docs`"


def test_every_folder_with_code_is_in_the_tree() -> None:
    """Names in the list by their depth, against folders on disk: not by way of what wrote the list."""
    shown, path = set(), list[str]()
    for indent, name in re.findall(r"^( *)- `([^`]+)`", PAGE.read_text().partition("<!-- end")[0], re.M):
        path[len(indent) // 2 :] = [name.rstrip("/")]
        shown.add("/".join(path))
    folders = {
        file.parent.relative_to(ROOT).as_posix() for package in PACKAGES for file in (ROOT / package).rglob("*.py")
    }
    assert {name for name in shown if not name.endswith(".py")} == folders


def test_every_room_says_what_it_is_for() -> None:
    assert all(line.rstrip().endswith((".", "!")) for line in tree(HOUSE).splitlines())
