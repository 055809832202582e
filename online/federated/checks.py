"""What an update must be before it counts: the right tensors, numbers, of a bounded length, for an honest count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import numpy as np

from online.federated.errors import UpdateRejected
from online.federated.tensors import MOMENT, Shapes, TensorFile, Tensors, length_of
from runtime.errors import InputError

_FEWEST_TO_COMPARE = 3  # of two, nobody can tell which is the outlier
_SHOWN = 3
_SLACK = 1.01  # for arithmetic


def require_update(file: Path, shapes: Shapes, longest: float, clip: float = math.inf) -> float:
    """Of a file from a client; returns its length. Raises UpdateRejected. No tensor of another shape is read. `clip`:
    of gradients, which no mean of them is longer than."""
    try:
        tensors = TensorFile(file)
        kinds = tensors.kinds()
    except Exception as error:  # safetensors raises its own, which is a plain Exception
        raise UpdateRejected(f"its bytes are no safetensors: {str(error)[:120]}") from error
    wrong = [
        f"{name} is {_said(kinds.get(name))}, expected {_said(('F32', shapes[name]) if name in shapes else None)}"
        for name in sorted(kinds.keys() | shapes.keys())
        if kinds.get(name) != (("F32", tuple(shapes[name])) if name in shapes else None)
    ]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UpdateRejected("; ".join(wrong[:_SHOWN]) + more)
    for name in tensors:
        if not np.isfinite(tensors[name]).all():
            raise UpdateRejected(f"{name} holds NaN or infinity")
    _require_moments(tensors, clip)
    length = length_of(tensors)
    if not length <= longest:
        raise UpdateRejected(f"its length is {length:.4g}; at most {longest:.4g} is taken")
    return length


def opened_weights(file: Path, shapes: Shapes, what: str, expected: str, fix: str) -> TensorFile:
    """Weights of any length that came from elsewhere. Raises InputError in the caller's words."""
    try:
        require_update(file, shapes, math.inf)
    except UpdateRejected as error:
        raise InputError(what, got=str(error), expected=expected, fix=fix) from error
    return TensorFile(file)


def _require_moments(tensors: Tensors, clip: float) -> None:
    """Adam's first moments are means of gradients, its second ones of their squares."""
    for key, most in (("exp_avg", clip), ("exp_avg_sq", clip * clip)):
        named = {name: tensors[name] for name in tensors if name.startswith(MOMENT) and name.endswith(f"/{key}")}
        length = length_of(named, lambda name: True)
        if not length <= _SLACK * most:
            raise UpdateRejected(f"its moments {key} are {length:.4g} long; at most {most:.4g} with a clip of {clip:g}")
    for name in tensors:
        if name.startswith(MOMENT) and name.endswith("/exp_avg_sq") and (tensors[name] < 0).any():
            raise UpdateRejected(f"{name} holds a square below 0")


def require_count(said: int, joined: int, most: int) -> None:
    """Raises UpdateRejected for a count that cannot be true. Nobody can check one that could: shares are bounded."""
    if said != joined:
        raise UpdateRejected(f"it counts {said} samples; the client joined with {joined}")
    if not 0 < said <= most:
        raise UpdateRejected(f"it counts {said} samples; from 1 to {most} are taken")


def outliers(lengths: Mapping[str, float], times: float) -> dict[str, str]:
    """Clients whose updates are longer than so many times the median, and why they do not count."""
    if len(lengths) < _FEWEST_TO_COMPARE:
        return {}
    middle = median(lengths.values())
    return {
        client: f"its length is {length:.4g}, {length / middle:.1f} times the round's median; {times:g} is allowed"
        for client, length in lengths.items()
        if middle and length > times * middle
    }


def _said(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if kind is None else f"{kind[0]} {list(kind[1])}"
