"""A training that is killed with SIGKILL and goes on, beside one that nothing disturbs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_CHILD = """
import importlib
import sys
from pathlib import Path
module = importlib.import_module(sys.argv[1])
module._distilled(*map(Path, sys.argv[3:]), report=getattr(module, sys.argv[2]), save_every_s=0)
"""


def resumed_and_whole(
    distilled: Callable[..., Result], kill: Callable[..., None], paths: tuple[Path, Path], folder: Path, least: float
) -> tuple[Result, Result]:
    """Of `distilled(folder, *paths, **teaching)`, a module's `_distilled`; `kill` is its report that ends the process,
    and `least` the share of the training that is then behind it."""
    killed, undisturbed = folder / "killed", folder / "undisturbed"
    arguments = [distilled.__module__, kill.__name__, str(killed), *map(str, paths)]
    command = [sys.executable, "-c", _CHILD, *arguments]
    assert subprocess.run(command, check=False, timeout=300).returncode == -signal.SIGKILL
    assert (killed / "scratch" / "training.pt").is_file()
    shares: list[float] = []
    resumed = distilled(killed, *paths, report=lambda progress: shares.append(progress.share))
    assert shares[0] > least
    return resumed, distilled(undisturbed, *paths)


def assert_same_weights(model: Any, other: Any, saved: Callable[[str], bool] = lambda name: True) -> None:
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        if saved(name):
            assert torch.equal(a, b), name
