"""Text as it streams: the pieces are the whole, no piece breaks a character, stop strings never show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.generation.detokenizer import Detokenizer
from tests.encoding.text_tokenizers import BYTE_LEVEL, GEMMA, KINDS, LLAMA, METASPACE, SUFFIX, make, whole_text
from tests.generation.setup import write_tokenizer

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


def _pieces(
    tokenizer: Any, ids: list[int], stop: tuple[str, ...] = (), prompt: list[int] | None = None
) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(tokenizer, stop, prompt or ())
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


MADE = {kind: make(kind) for kind in KINDS}
# Bytes of whole characters, of parts, and of none, so that random tokens now and then make one.
_BYTES = (0x20, 0x41, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x98, 0x80, 0xE0, 0xFF)


def _tokens(kind: str) -> st.SearchStrategy[list[int]]:
    tokenizer = MADE[kind]
    size = tokenizer.get_vocab_size()
    named = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in _BYTES] if kind in (LLAMA, GEMMA) else []
    words = [token for token in range(size) if not tokenizer.id_to_token(token).startswith("<0x")]
    return st.lists(
        st.one_of(*(st.sampled_from(some) for some in (named, words[-20:], range(size)) if some)), max_size=24
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_stream_is_what_the_output_adds_to_the_prompt(kind: str, data: st.DataObject) -> None:
    """Whatever the decoder does with neighbours, first spaces, special tokens and bytes that are no character."""
    tokenizer = MADE[kind]
    prompt, ids = data.draw(_tokens(kind)), data.draw(_tokens(kind))
    before, whole = whole_text(kind, tokenizer, prompt), whole_text(kind, tokenizer, prompt + ids)
    # A character that begins in the prompt and ends in the output belongs to the output.
    same = next((at for at, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    added = whole[same:]
    assert "".join(_pieces(tokenizer, ids, prompt=prompt)[0]) == added


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_text_ends_before_the_stop_string_that_is_complete_first(kind: str, data: st.DataObject) -> None:
    tokenizer = MADE[kind]
    prompt, ids = data.draw(_tokens(kind)), data.draw(_tokens(kind))
    whole = "".join(_pieces(tokenizer, ids, prompt=prompt)[0])
    spans = st.builds(
        lambda start, length: whole[start : start + length], st.integers(0, len(whole)), st.integers(1, 4)
    )
    stop = tuple(data.draw(st.lists(st.one_of(spans, st.text("he wor\n", max_size=3)).filter(bool), min_size=1)))
    pieces, stopped = _pieces(tokenizer, ids, stop, prompt)
    ends = [(whole.find(item) + len(item), whole.find(item)) for item in stop if item in whole]
    assert "".join(pieces) == (whole[: min(ends)[1]] if ends else whole)
    assert not stopped or ends  # a part of a character, which only the end completes, may be what stops


def _ids(tokenizer: Any, *names: str) -> list[int]:
    return [tokenizer.token_to_id(name) for name in names]


@pytest.mark.parametrize("kind", [LLAMA, GEMMA, METASPACE])
def test_the_first_word_keeps_its_space_behind_a_prompt(kind: str) -> None:
    tokenizer = MADE[kind]
    prompt, ids = _ids(tokenizer, "<s>", "▁hello", "</s>"), _ids(tokenizer, "▁world", "▁hello")
    assert _pieces(tokenizer, ids, prompt=prompt)[0] == [" world", " hello", ""]
    assert _pieces(tokenizer, ids, (" world",), prompt) == ([""], True)
    indented = _ids(tokenizer, "▁▁▁▁", "return")
    assert _pieces(tokenizer, indented, prompt=prompt)[0] == ["    ", "return", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_may_name_special_tokens(kind: str) -> None:
    tokenizer = MADE[kind]
    word, end, other = (tokenizer.get_vocab_size() - 4, *_ids(tokenizer, "<|im_end|>", "</s>"))
    shown = "".join(_pieces(tokenizer, [word, word])[0])
    pieces, stopped = _pieces(tokenizer, [word, word, end, word], ("<|im_end|>",))
    assert ("".join(pieces), stopped) == (shown, True)
    pieces, stopped = _pieces(tokenizer, [word, word, other, end, word], (f"{shown[-1]}</s><|im_end|>",))
    assert ("".join(pieces), stopped) == (shown[:-1], True)
    assert not _pieces(tokenizer, [word, other, word], ("<|im_end|>", "/s", ">", "</", "</s"))[1]  # no part of a name


def test_a_stop_string_counts_at_once_in_a_token_that_begins_a_character() -> None:
    tokenizer = MADE[BYTE_LEVEL]
    ids = _ids(tokenizer, "n", "o", "w", "ĠðŁ")
    assert _pieces(tokenizer, ids, ("now ",)) == (["", "", "", ""], True)
    assert _pieces(tokenizer, [*ids, *_ids(tokenizer, "ĺ", "Ģ")], ("now ",)) == (["", "", "", ""], True)


@pytest.mark.parametrize("kind", [LLAMA, GEMMA])
def test_a_lost_byte_is_one_replacement_and_unsays_nothing(kind: str) -> None:
    tokenizer = MADE[kind]
    ids = _ids(tokenizer, "▁world", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0xE4>")
    assert "".join(_pieces(tokenizer, ids, prompt=_ids(tokenizer, "▁hello"))[0]) == " world😀\ufffd"


def test_overlapping_stop_strings_do_not_depend_on_where_tokens_cut() -> None:
    tokenizer = MADE[SUFFIX]
    one = _pieces(tokenizer, _ids(tokenizer, "b", "c", "a", "b"), ("bcab", "ca"))
    assert ("".join(one[0]), one[1]) == ("b", True)
    assert _pieces(make_words("bcab"), [0], ("bcab", "ca")) == (["b"], True)


def make_words(*words: str) -> Any:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_tokens_of_a_stop_string_are_held_with_its_text() -> None:
    tokenizer = make_words("a", "b", "st", "op", "x")
    detokenizer = Detokenizer(tokenizer, ("stop",))
    held = []
    for token in (0, 2, 4, 1, 2, 3):  # a st x b st op
        _, stopped = detokenizer.push(token)
        held.append(detokenizer.held_tokens)
    assert (held, stopped) == ([0, 1, 0, 0, 1, 2], True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [(), ("nowhere", "</s>!")])
def test_no_token_costs_more_than_a_few(kind: str, stop: tuple[str, ...]) -> None:
    """Tokens that give no text, bytes that are no character, or a stop string that never comes."""
    tokenizer = MADE[kind]
    longest = 0

    class Counting:
        id_to_token = staticmethod(tokenizer.id_to_token)

        @staticmethod
        def decode(ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(tokenizer.decode(list(ids), skip_special_tokens))

    size = tokenizer.get_vocab_size()
    stray = tokenizer.token_to_id("Ģ") if kind == BYTE_LEVEL else tokenizer.token_to_id("<0x80>") or 0
    for token in (tokenizer.token_to_id("</s>"), stray, size + 7, size - 4):
        detokenizer = Detokenizer(Counting, stop, [size + 7] * 50)
        for _ in range(60):
            detokenizer.push(token)
        for _ in range(60):
            detokenizer.push(tokenizer.token_to_id("</s>"))
    assert longest <= 12
