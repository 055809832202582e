"""Which GPUs this machine shows."""

from __future__ import annotations

import subprocess


def visible_targets() -> list[str]:
    """SM of each visible GPU in device order (`["sm89"]`); empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [f"sm{line.replace('.', '')}" for line in output.split()]
