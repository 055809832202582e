"""A fixture for the modules that name this one in `pytest_plugins`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.generation.setup import write_decoder


@pytest.fixture(scope="session")
def decoder_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("decoder") / "graph.onnx")
