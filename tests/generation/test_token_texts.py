"""How single tokens are written, for tokenizers of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from runtime.generation.request import ScoredToken, Update
from runtime.generation.token_texts import TokenTexts
from tests.generation.setup import write_tokenizer

TEXT = "Grüße, 世界! def f(x):\n\treturn 'é' 🙂"


def _sentencepiece() -> Any:
    """As Llama 2's: words with their space, and bytes for what it has no word for."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁open",
        "▁a",
        "▁file",
        "a",
        "s",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def _wordpiece() -> Any:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "open": 2, "file": 3, "##s": 4}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    made.add_special_tokens(["[UNK]", "[CLS]"])
    return made


def test_the_bytes_of_a_texts_tokens_are_the_texts(tmp_path: Path) -> None:
    fast = Tokenizer.from_file(str(write_tokenizer(tmp_path / "tokenizer.json")))
    texts = TokenTexts(fast)
    spelled = [texts.spelling(token) for token in fast.encode(TEXT).ids]
    assert b"".join(item.data for item in spelled) == TEXT.encode()
    assert any(item.data.decode(errors="replace").endswith("\ufffd") for item in spelled), "parts of characters"
    assert texts.spelling(2) == (b"</s>", True)
    assert texts.spelling(100_000) == (b"", True)


@pytest.mark.parametrize(
    ("make", "token", "expected"),
    [
        (_sentencepiece, "▁open", b" open"), (_sentencepiece, "<0xE4>", b"\xe4"), (_sentencepiece, "s", b"s"),
        (_wordpiece, "file", b" file"), (_wordpiece, "##s", b"s"),
    ],
)  # fmt: skip
def test_tokens_keep_their_space(make: Any, token: str, expected: bytes) -> None:
    fast = make()
    assert TokenTexts(fast).spelling(fast.token_to_id(token)) == (expected, False)


def test_details_are_json_for_programs() -> None:
    fast = _wordpiece()
    texts = TokenTexts(fast)
    update = Update(1, tokens=(3, 1), logprobs=(-0.5, -2.0), tops=(((3, -0.5), (4, -1.5)), ()))
    assert json.loads(texts.output_details(update)) == [
        {
            "id": 3, "bytes": b" file".hex(), "logprob": -0.5,
            "top": [{"id": 3, "bytes": b" file".hex(), "logprob": -0.5}, {"id": 4, "bytes": "73", "logprob": -1.5}],
        },
        {"id": 1, "bytes": b"[CLS]".hex(), "logprob": -2.0, "special": True, "top": []},
    ]  # fmt: skip
    assert json.loads(texts.details([ScoredToken(4, -1.0, ())])) == [
        {"id": 4, "bytes": "73", "logprob": -1.0, "top": []}
    ]
