"""The text at hand: how much of it is read, and in what pieces."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

from builders.judging import corpus


def test_only_as_many_libraries_are_read_as_are_needed() -> None:
    few, more = corpus.library_texts(1), corpus.library_texts(2_500_000)
    assert sum(map(len, more)) >= 2_500_000
    assert set(few) < set(more)
    assert corpus.library_texts(1) == few
    import networkx

    line = " ".join((inspect.getdoc(networkx.shortest_path) or "").partition("\n")[0].split())
    assert line in more
    assert line not in few


def test_docstrings_are_taken_in_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a file that this Python cannot parse is passed over: torch has one for a newer Python."""
    package = tmp_path / "prose_of_a_test"
    package.mkdir()
    one, other = "The first line says what it does", "A second paragraph that\n    goes on over two lines."
    (package / "__init__.py").write_text(f'''def f():\n    """{one}\n\n    {other}\n    """\n''')
    (package / "newer.py").write_text("def f[[T]: pass")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec(package.name) is not None
    assert sorted(corpus.of_library(package.name)) == ["A second paragraph that goes on over two lines.", one]
    assert package.name not in sys.modules
