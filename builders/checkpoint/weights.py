"""The files that hold the weights: the very ones that transformers opens."""

from __future__ import annotations

from pathlib import Path

from builders.checkpoint.reading import read_json, require
from builders.errors import CheckpointError

CODEBOOKS = "codebooks.safetensors"  # see builders.checkpoint.codebooks


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """In the order of transformers: one file goes before an index, safetensors before pickles. Raises CheckpointError
    for weights that are not there."""
    if (folder / CODEBOOKS).is_file():
        if (folder / "model.safetensors").is_file():
            raise CheckpointError(
                f"checkpoint {folder}", got=f"{CODEBOOKS} and model.safetensors", expected="one of them",
                fix="remove what does not belong to this model",
            )  # fmt: skip
        return [folder / CODEBOOKS]
    kinds = [("model", "safetensors"), *([("pytorch_model", "bin")] if allow_pickle else ())]
    for name, suffix in kinds:
        single, index = folder / f"{name}.{suffix}", folder / f"{name}.{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            parts = sorted({str(part) for part in read_json(index).get("weight_map", {}).values()})
            for part in parts:
                require(folder, part, f"copy the missing part that {index.name} lists")
            return [index, *(folder / part for part in parts)]
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    raise CheckpointError(
        f"checkpoint {folder}",
        got=f"pickled weights only ({pickles[0].name}), which can run code" if pickles else "no weights",
        expected="model.safetensors",
        fix="save the model again with safetensors, or set model.allow_pickle: true if you trust it"
        if pickles
        else "give the folder that transformers' save_pretrained wrote",
    )


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
