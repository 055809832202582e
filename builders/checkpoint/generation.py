"""What generation must know of a checkpoint: sizes of its caches, and the tokens that mean something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders.artifacts import Generation
from builders.checkpoint.architecture import POSITIONS
from builders.checkpoint.reading import read_optional, size
from builders.errors import CheckpointError, UnsupportedError
from builders.spec import ModelSlice

# They choose other tokens than the model would, in every answer, and no request can ask for them or against them.
_FORCED = (
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "sequence_bias", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "forced_decoder_ids",
)  # fmt: skip


def generation_facts(folder: Path, config: dict[str, Any], model: ModelSlice) -> Generation:
    """From config.json, and generation_config.json where that says more."""
    merged = {**config, **read_optional(folder / "generation_config.json")}
    _refuse_forced(folder, merged)
    vocabulary = size(folder, config, "vocab_size")
    eos_ids = _ids(folder, merged, "eos_token_id", vocabulary)
    bos_ids = _ids(folder, merged, "bos_token_id", vocabulary)
    pads = _ids(folder, merged, "pad_token_id", vocabulary)
    starts = _ids(folder, merged, "decoder_start_token_id", vocabulary) or bos_ids  # as `generate` does
    if model.task == "seq2seq" and not starts:
        raise CheckpointError(
            f"{folder / 'config.json'}: decoder_start_token_id", got="null",
            expected="the token that an answer begins with", fix="set it; of T5 it is the padding id, 0",
        )  # fmt: skip
    heads = size(folder, config, "num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
    found = config.get("head_dim") or config.get("d_kv")
    positions = next((config[name] for name in POSITIONS if isinstance(config.get(name), int)), None)
    return Generation(
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=eos_ids,
        pad_id=(*pads, *eos_ids, 0)[0],
        start_id=starts[0] if model.task == "seq2seq" else None,
        layers=size(folder, config, "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(found or size(folder, config, "hidden_size", "n_embd", "d_model") // heads),
        max_positions=positions if model.task == "generation" else None,
        vocabulary=vocabulary,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def _ids(folder: Path, merged: dict[str, Any], name: str, vocabulary: int) -> tuple[int, ...]:
    """Raises CheckpointError for an id that the model has no row for."""
    given = merged.get(name)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    wrong = [item for item in ids if type(item) is not int or not 0 <= item < vocabulary]
    if wrong:
        raise CheckpointError(
            f"{name} of {folder} (config.json, generation_config.json)", got=repr(wrong[0]),
            expected=f"ids from 0 to {vocabulary - 1}, the rows of the model's embedding, or null",
            fix="copy both files of the model again, or set the right id",
        )  # fmt: skip
    return tuple(ids)


def _refuse_forced(folder: Path, merged: dict[str, Any]) -> None:
    name = next((name for name in _FORCED if merged.get(name)), None)
    if name is not None:
        raise UnsupportedError(
            f"{name} of {folder} (config.json, generation_config.json)", got=repr(merged[name])[:60],
            expected="generation that follows the model: the key changes every answer, and is not built",
            fix="remove the key if answers without it are right",
        )  # fmt: skip
