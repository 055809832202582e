"""Tests that need a GPU: what they assert is correctness, never a time. Skipped, with the reason, where none is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from builders.spec import Flavour
from measure.gpu_proof import setting
from measure.gpu_proof.machine import try_flavour
from measure.gpu_proof.setting import FLAVOURS, Setting
from measure.gpu_proof.timing import NotRun
from runtime.gpu import visible_targets

_FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if _FOLDER in item.path.parents]
    absent = not visible_targets() if mine else False
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if absent:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU: nvidia-smi is not there, or names none"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The dry run's shapes on the GPU, in fp32, so that rounding decides between no two tokens."""
    small = setting.dry(tmp_path_factory.mktemp("gpu"))
    return replace(small, device="cuda", target=visible_targets()[0], compiler="inductor")


@pytest.fixture(scope="session")
def flavour(tiny: Setting) -> Flavour:
    """The first TensorRT that builds for this GPU. One process holds one flavour."""
    refusals = []
    name: Flavour
    for name in FLAVOURS:
        try:
            try_flavour(name, tiny)
        except NotRun as refused:
            refusals.append(f"{name}: {refused}")
        else:
            return name
    pytest.skip("; ".join(refusals))
