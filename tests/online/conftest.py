"""Fixtures that several files of online learning need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.online.federated_world import SAMPLES, issue


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads for matrices of this size cost more than they bring."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    issue(folder, ["coordinator", *SAMPLES])
    return folder
