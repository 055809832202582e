"""Weights by name, in fp32, and their files: safetensors, read one tensor at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from online.files import replace_file

Floats = NDArray[np.float32]
Tensors = Mapping[str, Floats]
Shapes = Mapping[str, tuple[int, ...]]
MOMENT = "moments/"  # names that begin so are of an optimiser's state, and no weight's


class TensorFile(Mapping[str, Floats]):
    """A safetensors file whose tensors are read when they are asked for, each time anew. Raises SafetensorError, an
    Exception of that library's own, for bytes that are none."""

    def __init__(self, file: Path) -> None:
        from safetensors import safe_open

        self._open = cast(Any, safe_open(file, "np"))
        self._names = list(self._open.keys())

    def __getitem__(self, name: str) -> Floats:
        if name not in self._names:
            raise KeyError(name)
        found: Floats = self._open.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def metadata(self) -> dict[str, str]:
        return dict(self._open.metadata() or {})

    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type, in the format's own word, and shape of each; no tensor is read."""
        slices = {name: self._open.get_slice(name) for name in self._names}
        return {name: (item.get_dtype(), tuple(item.get_shape())) for name, item in slices.items()}


def write_tensors(tensors: Tensors, file: Path) -> str:
    """On the disk when it returns, whole or not at all. Returns the file's SHA-256."""
    from safetensors.numpy import save

    content = save({name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()})
    replace_file(file, content)
    return hashlib.sha256(content).hexdigest()


def weights_of(model: Any) -> dict[str, Floats]:
    """Copies of what a training moves; a matrix that is used twice is one."""
    return {
        name: parameter.detach().float().numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def put_weights(model: Any, weights: Tensors) -> None:
    """`weights` as `weights_of` names them, all of them."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(np.array(weights[name])))


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in tensors.items()}


def parted(tensors: Tensors) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Weights, and moments."""
    weights = {name: value for name, value in tensors.items() if not name.startswith(MOMENT)}
    return weights, {name: value for name, value in tensors.items() if name.startswith(MOMENT)}


def length_of(tensors: Tensors, kind: Callable[[str], bool] = lambda name: not name.startswith(MOMENT)) -> float:
    """Euclidean, over all weights, or those that are of this kind by their names; a tensor at a time."""
    squares = (float(np.square(tensors[name], dtype=np.float64).sum()) for name in tensors if kind(name))
    return math.sqrt(sum(squares))
