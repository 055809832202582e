"""The files that hold the weights: the very ones that transformers opens."""

from __future__ import annotations

import math
from pathlib import Path

from builders.checkpoint.reading import read_json, require
from builders.errors import CheckpointError


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """transformers' own order: one file goes before an index. Raises CheckpointError for weights that are not there."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
        for name in names:
            require(folder, name, f"copy the missing part that {index.name} lists")
        return [index, *(folder / name for name in names)]
    pickles = _pickles(folder)
    if pickles and allow_pickle:
        return pickles
    raise CheckpointError(
        f"checkpoint {folder}",
        got=f"pickled weights only ({pickles[-1].name}), which can run code" if pickles else "no weights",
        expected="model.safetensors",
        fix="save the model again with safetensors, or set model.allow_pickle: true if you trust it"
        if pickles
        else "give the folder that transformers' save_pretrained wrote",
    )


def _pickles(folder: Path) -> list[Path]:
    single, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if single.is_file():
        return [single]
    return [*([index] if index.is_file() else []), *sorted(folder.glob("pytorch_model-*.bin"))]


def one_file(folder: Path, name: str, allow_pickle: bool) -> Path:
    """`name`.safetensors, or the pickle of older releases where that was asked for. Raises CheckpointError."""
    pickle = folder / ("pytorch_model.bin" if name == "model" else f"{name}.bin")
    if pickle.is_file() and not (folder / f"{name}.safetensors").is_file():
        if allow_pickle:
            return pickle
        raise CheckpointError(
            f"checkpoint {folder}", got=f"pickled weights ({pickle.name}), which can run code",
            expected=f"{name}.safetensors",
            fix="save it again with safetensors, or set model.allow_pickle: true if you trust it",
        )  # fmt: skip
    require(folder, f"{name}.safetensors", "copy the whole folder again")
    return folder / f"{name}.safetensors"


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a safetensors file, from its header; opening it fails when the file is truncated."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as tensors:
            names = list(tensors.keys())
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise CheckpointError(
            f"weights {path}", got=f"{path.stat().st_size} bytes, {error}", expected="a whole safetensors file",
            fix="copy or download the file again; it is truncated or damaged",
        ) from error  # fmt: skip


def count_parameters(path: Path) -> int:
    """Elements in a safetensors file. A pickle is not opened for this: its size in fp32 has to do."""
    if path.suffix == ".bin":
        return path.stat().st_size // 4
    if path.suffix != ".safetensors":
        return 0
    return sum(map(math.prod, shapes(path).values()))
