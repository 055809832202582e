"""A LoRA adapter beside base weights, or a folder that holds an adapter alone and names its base."""

from __future__ import annotations

from pathlib import Path

from builders.artifacts import file_digest
from builders.checkpoint.reading import read_json
from builders.checkpoint.source import locate
from builders.checkpoint.weights import one_file
from builders.errors import CheckpointError, UnsupportedError
from builders.spec import ModelSlice

CONFIG = "adapter_config.json"


def base_folder(folder: Path, model: ModelSlice) -> Path:
    """Where the weights are that the adapter in `folder` belongs on: there, unless it lies alone."""
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return folder
    base = str(read_json(folder / CONFIG).get("base_model_name_or_path") or "")
    if base and (folder / base).is_dir():
        return (folder / base).resolve()
    try:
        return locate(model.model_copy(update={"source": base, "revision": None}))
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder / CONFIG}: base_model_name_or_path", got=f"{base!r} ({error.got})",
            expected="the folder or Hugging Face id of the base model, since no config.json lies beside the adapter",
            fix="put the base model's files beside the adapter, or set the path (relative to the adapter, or absolute)",
        ) from error  # fmt: skip


def adapter_files(folder: Path, base: Path, model: ModelSlice) -> list[Path]:
    """The files of the adapter in `folder`; none where there is no adapter. Raises for kinds that cannot be merged."""
    if not (folder / CONFIG).is_file():
        return []
    config = read_json(folder / CONFIG)
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise UnsupportedError(
            f"{folder / CONFIG}: peft_type", got=kind, expected="LORA, which can be merged into the weights",
            fix="merge the adapter with peft (merge_and_unload), save the model, and give that folder",
        )  # fmt: skip
    weights = one_file(folder, "adapter_model", model.allow_pickle)
    own = folder / "tokenizer.json"
    if folder != base and own.is_file() and not _same(own, base / "tokenizer.json"):
        raise CheckpointError(
            f"adapter {folder}", got="a tokenizer.json that differs from the base model's",
            expected="one tokenizer for both",
            fix=f"copy the base model's files ({base}) and the adapter's into one folder, with the right tokenizer",
        )  # fmt: skip
    return [folder / CONFIG, weights]


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and file_digest(path) == file_digest(other)
