"""The whole of a checkpoint: each of its sides checked, and its files hashed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from builders.artifacts import Checkpoint, FileRecord
from builders.checkpoint import tokenizer
from builders.checkpoint.adapter import adapter_files, base_folder
from builders.checkpoint.architecture import check_encoder, check_foreign, check_generator, check_length
from builders.checkpoint.codebooks import count_parameters
from builders.checkpoint.generation import generation_facts
from builders.checkpoint.reading import read_json, size
from builders.checkpoint.sentence import Sentence, read_sentence
from builders.checkpoint.source import locate
from builders.checkpoint.weights import weight_files
from builders.checkpoint.widths import read_widths
from builders.spec import ModelSlice

_SETTINGS = ("*.json", "*.jinja", "*.py", "additional_chat_templates/*")
GENERATES = ("generation", "seq2seq")


def load_checkpoint(model: ModelSlice) -> Checkpoint:
    """The checkpoint that `model.source` names, with its files hashed.

    Raises CheckpointError: no such folder, no or truncated weights, pickled weights that were not asked for, an
    unknown architecture, tokens that the model does not know, a sequence length or a task that the weights cannot
    serve. Raises UnsupportedError, by name, for what would change the outputs and is not built.
    """
    given = locate(model)
    folder = base_folder(given, model)
    config = read_json(folder / "config.json")
    check_foreign(folder, config)
    generates = model.task in GENERATES
    model_type = (check_generator if generates else _check_encoder)(folder, config, model)
    weights = weight_files(folder, model.allow_pickle)
    parameters = sum(map(count_parameters, weights))  # this and the next raise for a manifest that does not belong here
    read_widths(folder, config, weights)
    adapter = adapter_files(given, folder, model)
    typed = model.task == "reranking" and config.get("type_vocab_size", 0) > 1
    tokenizer.check_tokenizer(folder, config, model, typed)
    hidden_size = size(folder, config, "hidden_size", "dim", "n_embd", "d_model")
    generation = generation_facts(folder, config, model) if generates else None
    sentence = Sentence() if generates else read_sentence(folder, model, hidden_size)
    check_length(model, folder, config, model_type, generation)
    if not generates:
        tokenizer.check_text_length(folder, model, sentence.max_length)
    return Checkpoint(
        directory=folder,
        files=_records(folder, {*_settings(folder), *sentence.files, *weights, *adapter}),
        source=model.source,
        architecture=(config.get("architectures") or ["unknown"])[0],
        model_type=model_type,
        task=model.task,
        pooling=sentence.pooling,
        hidden_size=hidden_size,
        labels=_labels(model, config),
        parameters=parameters,
        max_length=model.max_length,
        token_type_ids=typed,
        generation=generation,
        head=sentence.head,
        prompts=sentence.prompts,
        lower_case=sentence.lower_case,
        adapter=given if adapter else None,
    )


def load_config(model: ModelSlice) -> dict[str, Any]:
    """`config.json` alone, for arithmetic that needs no weights. Raises CheckpointError as `load_checkpoint` does."""
    return read_json(locate(model, ["config.json"]) / "config.json")


def _check_encoder(folder: Path, config: dict[str, Any], _: ModelSlice) -> str:
    return check_encoder(folder, config)


def _settings(folder: Path) -> list[Path]:
    """What may change outputs beside the weights: every setting at the top."""
    found = [path for pattern in _SETTINGS for path in folder.glob(pattern)]
    return [path for path in found if path.is_file() and not path.name.endswith(".index.json")]


def _records(folder: Path, files: Iterable[Path]) -> tuple[FileRecord, ...]:
    """Names are relative to the folder; an adapter that lies elsewhere keeps the name of its file alone."""
    return tuple(
        FileRecord.of(path).model_copy(
            update={"name": str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name}
        )
        for path in sorted(files)
    )


def _labels(model: ModelSlice, config: dict[str, Any]) -> int:
    if model.task in ("embedding", *GENERATES):
        return 0
    return int(config.get("num_labels") or len(config.get("id2label") or {}) or 2)
