"""Which models are taken for which task, and how long their texts may be. Plain facts of config.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from builders.artifacts import Generation
from builders.checkpoint.reading import read_optional, size
from builders.errors import CheckpointError, UnsupportedError
from builders.spec import ModelSlice

_ROBERTA = ("roberta", "xlm-roberta", "camembert", "data2vec-text")  # their positions start after the padding id
ENCODERS = ("bert", *_ROBERTA, "distilbert", "mpnet", "electra", "ernie")
SEQ2SEQ = ("t5", "mt5", "umt5")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_DECODER = re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$")
_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|DoubleHeadsModel)$")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_encoder(folder: Path, config: dict[str, Any]) -> str:
    """The model type of an encoder. Raises for any other, and for options of a known type that are not built."""
    model_type = str(config.get("model_type"))
    architectures = [str(name) for name in config.get("architectures") or []]
    if model_type in ENCODERS and not config.get("is_decoder"):
        _check_options(folder, config, model_type)
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


def _check_options(folder: Path, config: dict[str, Any], model_type: str) -> None:
    """What older releases of transformers computed, and this one passes over without a word."""
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise UnsupportedError(
            f"{folder / 'config.json'}: position_embedding_type", got=positions,
            expected="absolute: transformers no longer computes relative positions of this kind",
            fix="use a checkpoint with absolute positions",
        )  # fmt: skip
    if config.get("use_task_id"):
        raise UnsupportedError(
            f"{folder / 'config.json'}: use_task_id", got="true, a third table of embeddings", expected="false",
            fix="use a checkpoint without task ids",
        )  # fmt: skip
    if model_type in _ROBERTA and config.get("pad_token_id", 1) is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: pad_token_id", got="null",
            expected=f"a token id: positions of {model_type} start after it",
            fix="set the padding id that the model was trained with, 1 in most",
        )  # fmt: skip


def check_generator(folder: Path, config: dict[str, Any], model: ModelSlice) -> str:
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
    _check_layers(folder, config, model_type)
    return model_type


def _check_layers(folder: Path, config: dict[str, Any], model_type: str) -> None:
    experts = next((name for name in _EXPERTS if isinstance(config.get(name), int) and config[name] > 1), None)
    # The adapted attention of DeepSeek keeps one latent vector a token, instead of keys and values of heads.
    latent = "kv_lora_rank" if config.get("kv_lora_rank") else None
    if latent or experts:
        kind = "multi-head latent attention" if latent else "a mixture of experts"
        raise UnsupportedError(
            f"checkpoint {folder} ({model_type})", got=f"{kind} ({latent or experts} in config.json)",
            expected="dense layers with keys and values for each head", fix="use a dense model of the same family",
        )  # fmt: skip


def check_foreign(folder: Path, config: dict[str, Any]) -> None:
    """Raises for code of the checkpoint's own, which is never run, and for weights that are packed by a quantiser."""
    for name, data in (
        ("config.json", config),
        ("tokenizer_config.json", read_optional(folder / "tokenizer_config.json")),
    ):
        if data.get("auto_map"):
            classes = ", ".join(sorted(map(str, data["auto_map"])))
            raise UnsupportedError(
                f"{folder / name}: auto_map", got=f"code of the checkpoint's own for {classes}",
                expected="a model that transformers computes without code from outside, which could run anything here",
                fix="use a checkpoint without it; or, where transformers' own code computes the same, remove auto_map",
            )  # fmt: skip
    packed = config.get("quantization_config") or config.get("compression_config")
    if packed:
        method = packed.get("quant_method", "unknown") if isinstance(packed, dict) else packed
        if isinstance(packed, dict) and method == "unknown":
            method = next((key for key in packed if key.startswith("load_in_") and packed[key]), method)
        raise UnsupportedError(
            f"{folder / 'config.json'}: quantization_config", got=f"weights quantised with {method}",
            expected="weights in fp32, fp16 or bf16: quantising is a stage of its own here",
            fix="give the checkpoint that was quantised, and choose precision in the spec",
        )  # fmt: skip


def position_offset(model_type: str, config: dict[str, Any]) -> int:
    """Row of the position table that the first token uses. RoBERTa's descendants start after the padding id."""
    if model_type in _ROBERTA:
        return int(config.get("pad_token_id", 1)) + 1
    return 2 if model_type == "mpnet" else 0


def check_length(
    model: ModelSlice, folder: Path, config: dict[str, Any], model_type: str, generation: Generation | None
) -> None:
    """Raises CheckpointError for texts that are longer than the checkpoint's position table."""
    if generation is not None and generation.max_positions is None:
        return  # relative positions
    if generation is not None and generation.max_positions is not None:
        longest = generation.max_positions
    else:
        longest = size(folder, config, "max_position_embeddings") - position_offset(model_type, config)
    if model.max_length > longest:
        raise CheckpointError(
            f"model.max_length of {model.source}",
            got=str(model.max_length),
            expected=f"at most {longest}, the checkpoint's position table",
            fix=f"set model.max_length: {longest} or less, and end "
            f"{'generation.cache_lengths, if given,' if generation else 'serving.length_buckets'} with it",
        )
