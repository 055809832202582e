"""Text in, padded ids out; bad text is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import BadEnvironment, BadRequest
from runtime.settings import TokenizerSettings
from runtime.tokenizer import Tokenizer, decode_texts


def _tokenizer(folder: Path, **changes: object) -> Tokenizer:
    settings = {"max_length": 16, "pad_id": 1, "token_type_ids": False, "pair": False, **changes}
    return Tokenizer(folder / "tokenizer.json", TokenizerSettings.model_validate(settings))


def test_long_text_is_truncated_and_said_so(tiny_bert: Path) -> None:
    short, long = _tokenizer(tiny_bert).encode(["return the value", "return the value " * 30])
    assert (short.truncated, long.truncated) == (False, True)
    assert len(long.ids) == 16
    assert long.ids[-1] == short.ids[-1]  # the separator is kept


def test_padding_to_the_next_bucket(tiny_bert: Path) -> None:
    tokenizer = _tokenizer(tiny_bert, length_buckets=(8, 16))
    feeds = tokenizer.pad(tokenizer.encode(["a", "a b c d e f"]))
    assert feeds["input_ids"].shape == (2, 8)
    assert feeds["input_ids"][0, -1] == 1
    assert feeds["attention_mask"].sum(axis=1).tolist() == [3, 8]


def test_pairs_carry_their_types(tiny_bert: Path) -> None:
    tokenizer = _tokenizer(tiny_bert, token_type_ids=True, pair=True)
    feeds = tokenizer.pad(tokenizer.encode(["a"], ["b c"]))
    assert feeds["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4))
def test_any_bytes_are_text_or_a_clear_error(raw: list[bytes]) -> None:
    try:
        texts = decode_texts(raw, "text")
    except BadRequest as error:
        said = str(error)
    else:
        said = ""
        assert [text.encode() for text in texts] == raw
        assert all(text.strip() for text in texts)
    assert not said or said.startswith("text[")


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadEnvironment, match="not a tokenizer file"):
        _tokenizer(tmp_path)
