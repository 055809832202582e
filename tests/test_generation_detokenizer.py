"""Text as it streams: the pieces are the whole, no piece breaks a character, stop strings never show."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.generation.detokenizer import Detokenizer
from tests.generation_setup import write_tokenizer

WORDS = "naïve café 日本語 👩‍👩‍👧 Ωμέγα for every file in it\n\t don't 🏳️‍🌈é"


def _byte_fallback() -> Any:
    """As SentencePiece models have it: a space is a mark, unknown characters are byte tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁for",
        "▁file",
        "e",
        "n",
        "日",
        "é",
        "ï",
        "▁in",
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True,
                   unk_token="<unk>", fuse_unk=True)
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")))


@pytest.fixture(scope="module", params=["byte level", "byte fallback"])
def tokenizer(request: pytest.FixtureRequest, byte_level: Any) -> Any:
    return byte_level if request.param == "byte level" else _byte_fallback()


def _pieces(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for token in ids:
        text, stopped = detokenizer.push(token)
        pieces.append(text)
        if stopped:
            return pieces, True
    return [*pieces, detokenizer.flush()], False


@settings(deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_are_the_decoded_whole(byte_level: Any, data: st.DataObject) -> None:
    """Of byte-level tokens. A byte-fallback decoder unsays good characters when bad bytes follow; a stream cannot."""
    tokenizer = byte_level
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40))
    assert "".join(_pieces(tokenizer, ids)[0]) == tokenizer.decode(ids)


@settings(deadline=None)
@given(text=st.text(st.sampled_from(WORDS), max_size=40))
def test_no_piece_of_a_text_breaks_a_character(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text).ids
    pieces, _ = _pieces(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(text=st.text(st.sampled_from(WORDS), max_size=40), data=st.data())
def test_a_stop_string_never_shows_wherever_tokens_cut_it(tokenizer: Any, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text).ids
    whole = tokenizer.decode(ids)
    stop = data.draw(st.lists(st.text(st.sampled_from(WORDS), min_size=1, max_size=4), min_size=1, max_size=3))
    if whole:
        start = data.draw(st.integers(0, len(whole) - 1))
        stop.append(whole[start : start + data.draw(st.integers(1, 5))])
    pieces, stopped = _pieces(tokenizer, ids, tuple(stop))
    found = [whole.find(item) for item in stop if item in whole]
    shown = "".join(pieces)
    assert stopped == bool(found)
    if found:
        assert whole.startswith(shown)
        assert not any(item in shown for item in stop)
    else:
        assert shown == whole


def test_text_is_shown_as_soon_as_it_can_be(byte_level: Any) -> None:
    tokenizer = byte_level
    detokenizer = Detokenizer(tokenizer, ("stop",))
    shown = [detokenizer.push(tokenizer.token_to_id(letter))[0] for letter in "abstos"]
    assert shown == ["a", "b", "", "", "", "sto"]
    assert detokenizer.flush() == "s"


def test_the_cost_of_a_token_does_not_grow(byte_level: Any) -> None:
    tokenizer = byte_level
    longest = 0

    class Counting:
        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(tokenizer.decode(ids, skip_special_tokens))

    detokenizer = Detokenizer(Counting())
    for token in tokenizer.encode(WORDS * 20).ids:
        detokenizer.push(token)
    assert longest <= 12
