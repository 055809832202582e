"""Which GPUs this process sees: those of the machine, or of them those that CUDA_VISIBLE_DEVICES names."""

from __future__ import annotations

import os
import subprocess


def visible_targets() -> list[str]:
    """SM of each visible GPU in device order (`["sm89"]`); empty without a driver."""
    return [f"sm{capability.replace('.', '')}" for [capability] in visible_gpus("compute_cap")]


def visible_gpus(fields: str) -> list[list[str]]:
    """What nvidia-smi says of each visible GPU in device order, by its names of `fields`; empty without a driver.

    As CUDA does, whatever follows a device that is not there is not seen. A MIG device has its GPU's facts.
    """
    gpus = [line.split(", ") for line in _ask(f"--query-gpu=index,uuid,{fields}", "--format=csv,noheader")]
    named = named_devices()
    if named is None:
        return [facts for _, _, *facts in gpus]
    parents = _mig_parents() if any(name.startswith("MIG-") for name in named) else {}
    found = []
    for name in named:
        wanted = parents.get(name, name)
        matching = [facts for index, uuid, *facts in gpus if _names(wanted, index, uuid)]
        if len(matching) != 1:
            break
        found += matching
    return found


def named_devices() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES: numbers, or UUIDs of GPUs and MIG devices. None where all GPUs are shown."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if shown is None else [name.strip() for name in shown.split(",") if name.strip()]


def _names(wanted: str, index: str, uuid: str) -> bool:
    """A UUID may be cut short, as long as it names one GPU."""
    return uuid.startswith(wanted) if wanted.startswith("GPU-") else wanted == index


def _mig_parents() -> dict[str, str]:
    """The GPU's UUID by each MIG device's: `nvidia-smi -L` lists devices below their GPU."""
    parents, gpu = {}, ""
    for line in _ask("-L"):
        uuid = line.rpartition("UUID: ")[2].rstrip(")")
        if line.startswith("GPU "):
            gpu = uuid
        elif uuid.startswith("MIG-"):
            parents[uuid] = gpu
    return parents


def _ask(*arguments: str) -> list[str]:
    """nvidia-smi's lines; none where it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]
