"""Weights stored as indices into codebooks, and expanded when a checkpoint is loaded.

`codebooks.safetensors` stands in the place of model.safetensors, so that nothing else takes the folder for one of plain
weights. Of a matrix X it holds `X.indices`, `bits` bits each and packed into bytes, and `X.codes` [groups, 2^bits]; all
other weights lie in it as they are. `codebooks.json` says which matrices these are. It is a codec for files: what is
loaded, exported and served is as large, and as fast, as it was.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from builders.checkpoint.reading import parse
from builders.checkpoint.weights import CODEBOOKS, shapes
from builders.errors import CheckpointError
from runtime.record import Record

if TYPE_CHECKING:
    import torch

FILE = "codebooks.json"
_INDICES, _CODES = ".indices", ".codes"


class CodedMatrix(Record):
    """`group`: how many weights in a row share a codebook, in the order of the flattened matrix."""

    shape: tuple[int, int]
    bits: int = Field(ge=1, le=8)
    group: int = Field(ge=1)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stored(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors in the file, by what follows its name."""
        return {_INDICES: (-(-self.size * self.bits // 8),), _CODES: (self.size // self.group, 2**self.bits)}


class Codebooks(Record):
    """All matrices of a checkpoint that are stored so, by name."""

    version: Literal[1] = 1
    matrices: dict[str, CodedMatrix]


def _read(folder: Path) -> tuple[Codebooks, dict[str, tuple[int, ...]]]:
    """The manifest, and the shapes of what is stored. Raises CheckpointError for a manifest that is not that of the
    file beside it."""
    path = folder / FILE
    if not path.is_file():
        raise _refused(path, "no such file")
    try:
        found = Codebooks.model_validate(parse(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise _refused(path, f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from error
    there = shapes(folder / CODEBOOKS)
    for name, matrix in found.matrices.items():
        if matrix.size % matrix.group:
            raise _refused(path, f"{name}: {matrix.size} weights in groups of {matrix.group}")
        for end, shape in matrix.stored.items():
            if there.get(f"{name}{end}") != shape:
                raise _refused(path, f"{name}{end} of shape {list(shape)}, where the weights have "
                                     f"{there.get(f'{name}{end}')}")  # fmt: skip
    left = sorted(name for name in there if name.endswith(_INDICES) and _stem(name) not in found.matrices)
    if left:
        raise _refused(path, f"no word of {left[0]}")
    return found, there


def weight_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a safetensors file, as it is when expanded. Raises CheckpointError for a file that is
    truncated, and for codebooks whose manifest is another's."""
    if file.name != CODEBOOKS:
        return shapes(file)
    found, there = _read(file.parent)
    plain = {name: shape for name, shape in there.items() if _stem(name) not in found.matrices}
    return {**plain, **{name: matrix.shape for name, matrix in found.matrices.items()}}


def count_parameters(path: Path) -> int:
    """Elements in a safetensors file, when expanded. A pickle is not opened for this: its size in fp32 has to do."""
    if path.suffix == ".bin":
        return path.stat().st_size // 4
    if path.suffix != ".safetensors":
        return 0
    return sum(map(math.prod, weight_shapes(path).values()))


def expanded(folder: Path) -> dict[str, torch.Tensor]:
    """All weights, plain. Raises CheckpointError for an index that its codebook does not have."""
    import torch
    from safetensors.torch import load_file

    (found, _), stored = _read(folder), load_file(folder / CODEBOOKS)
    state = {name: value for name, value in stored.items() if _stem(name) not in found.matrices}
    for name, matrix in found.matrices.items():
        indices = unpack(stored[f"{name}{_INDICES}"].numpy(), matrix.bits, matrix.size)
        codes = stored[f"{name}{_CODES}"].float()
        chosen = torch.from_numpy(indices.astype(np.int64)).reshape(len(codes), matrix.group)
        state[name] = codes.gather(1, chosen).reshape(matrix.shape)
    return state


def stored(name: str, indices: NDArray[np.uint8], codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The tensors of one matrix; `codes` [groups, 2^bits]. They take two bytes each where these can hold them."""
    import torch

    small = codes.abs().max() <= torch.finfo(torch.float16).max
    kept = codes.half() if small else codes.float()
    return {f"{name}{_INDICES}": torch.from_numpy(pack(indices, bits)), f"{name}{_CODES}": kept.contiguous()}


def pack(indices: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers under 2^bits, one behind the other, the highest bit first; zeros fill the last byte."""
    digits = np.unpackbits(indices.reshape(-1, 1), axis=1)[:, 8 - bits :]
    return np.packbits(digits.reshape(-1))


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` of what `pack` has packed."""
    digits = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    wide = np.zeros((count, 8), np.uint8)
    wide[:, 8 - bits :] = digits
    return np.packbits(wide, axis=1)[:, 0]


def _stem(name: str) -> str:
    return name.removesuffix(_INDICES).removesuffix(_CODES)


def _refused(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        f"manifest of codebooks {path}", got=got, expected=f"the one that `trireme compress` wrote with {CODEBOOKS}",
        fix="copy the whole folder again",
    )  # fmt: skip
