"""The tokenizer against the model: every id that a text can have is a row of the model's tables.

Rows beyond a table are not an error everywhere: OpenVINO clamps them, and different texts get the same vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders.checkpoint.reading import read_optional, require
from builders.errors import CheckpointError
from builders.spec import ModelSlice

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_OTHERS = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json")
_NO_LIMIT = 1 << 20  # transformers writes 1e30 where there is none


def check_tokenizer(folder: Path, config: dict[str, Any], model: ModelSlice, token_type_ids: bool) -> None:
    """Raises CheckpointError for a tokenizer that is absent, damaged, or knows more than the model."""
    fast = _open(folder)
    vocabulary = config.get("vocab_size")
    names = {number: token for token, number in fast.get_vocab(with_added_tokens=True).items()}
    probe = [fast.encode("a"), fast.encode("a", "a")]  # templates have ids of their own
    used = {number for item in probe for number in item.ids}
    highest = max([*names, *used], default=0)
    if isinstance(vocabulary, int) and highest >= vocabulary:
        raise CheckpointError(
            f"tokenizer.json of {model.source}",
            got=f"the token id {highest} ({names.get(highest, 'in its template')!r})",
            expected=f"ids under {vocabulary}, the rows of the model's embedding (vocab_size)",
            fix="copy the tokenizer that the model was trained with, or model.resize_token_embeddings(len(tokenizer))",
        )
    types = config.get("type_vocab_size", 0)
    kind = max((number for item in probe for number in item.type_ids), default=0)
    if token_type_ids and kind >= types:
        raise CheckpointError(
            f"tokenizer.json of {model.source}", got=f"the segment id {kind}",
            expected=f"ids under {types} (type_vocab_size)", fix="copy the tokenizer that the model was trained with",
        )  # fmt: skip
    pad = config.get("pad_token_id")
    if isinstance(vocabulary, int) and pad is not None and (type(pad) is not int or not 0 <= pad < vocabulary):
        raise CheckpointError(
            f"pad_token_id of {folder} (config.json)", got=repr(pad),
            expected=f"ids from 0 to {vocabulary - 1}, the rows of the model's embedding, or null",
            fix="copy config.json of the model again, or set the right id",
        )  # fmt: skip


def _open(folder: Path) -> Any:
    from tokenizers import Tokenizer

    other = next((name for name in _OTHERS if (folder / name).is_file()), None)
    convert = (
        "python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('DIR').save_pretrained('DIR')\""
        f", with {folder} for DIR"
    )
    require(folder, "tokenizer.json", f"make one of {other}: {convert}" if other else f"save one: {convert}")
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for an unreadable file
        raise CheckpointError(
            str(folder / "tokenizer.json"), got=str(error).splitlines()[0], expected="a file of the tokenizers library",
            fix=f"copy the file again, or save one: {convert}",
        ) from error  # fmt: skip


def check_text_length(folder: Path, model: ModelSlice, declared: int | None) -> None:
    """Raises CheckpointError where the checkpoint's own pipeline cuts texts earlier than the spec: it was not trained
    on longer ones. `declared` is what sentence-transformers says, which goes before the tokenizer's own limit."""
    limit, file = declared, "sentence_bert_config.json: max_seq_length"
    if limit is None:
        limit, file = (
            read_optional(folder / "tokenizer_config.json").get("model_max_length"),
            ("tokenizer_config.json: model_max_length"),
        )
    if isinstance(limit, int | float) and limit < min(model.max_length, _NO_LIMIT):
        raise CheckpointError(
            f"model.max_length of {model.source}",
            got=str(model.max_length),
            expected=f"at most {int(limit)}, where the checkpoint cuts its texts ({file})",
            fix=f"set model.max_length: {int(limit)} or less, and end serving.length_buckets with it; or raise the "
            "limit in that file if the model was trained on longer texts",
        )
