"""Small tokenizers of each kind that decodes in its own way."""

from __future__ import annotations

from typing import Any

SPECIAL = ("<s>", "</s>", "<|im_end|>")
_PIECES = ("▁hello", "▁world", "▁▁▁▁", "return", "▁", "日", "\ufffd", "▁\n")
LLAMA, GEMMA, METASPACE, WORDPIECE, BYTE_LEVEL, SUFFIX = KINDS = (
    "byte fallback, first space off", "byte fallback", "Metaspace", "WordPiece", "byte level", "end-of-word suffix",
)  # fmt: skip


def make(kind: str) -> Any:
    """A tokenizer of `tokenizers`; those of SentencePiece's kind as Llama 2, Gemma and T5 have them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if kind in (LLAMA, GEMMA, METASPACE):
        fallback = kind != METASPACE
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
        pieces = [(piece, -1.0) for piece in ("<unk>", *bytes_, *_PIECES)]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=fallback))
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        strip = [decoders.Strip(" ", 1, 0)] if kind == LLAMA else []
        tokenizer.decoder = (
            decoders.Sequence(steps + strip) if fallback else decoders.Metaspace(prepend_scheme="always")
        )
    elif kind == WORDPIECE:
        words = ("[UNK]", "hello", "##ing", "wor", "##ld", ".", ",", "'", "n't", "'s")
        tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.decoder = decoders.WordPiece()
    elif kind == BYTE_LEVEL:
        vocabulary = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE({**vocabulary, "ĊĊ": 256, "ĠðŁ": 257, "Ġhe": 258}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        words = ("a</w>", "b", "b</w>", "c", "a")
        vocabulary = {word: at for at, word in enumerate(words)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
        tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def whole_text(kind: str, tokenizer: Any, ids: list[int]) -> str:
    """What the tokens say: as the tokenizer decodes them, but bytes of byte fallback as UTF-8 with replacements."""
    if kind not in (LLAMA, GEMMA):
        return str(tokenizer.decode(ids))
    raw = b""
    for name in map(tokenizer.id_to_token, ids):
        if name.startswith("<0x"):
            raw += bytes.fromhex(name[3:5])
        elif name not in SPECIAL:
            raw += name.replace("▁", " ").encode()
    text = raw.decode(errors="replace")
    return text.removeprefix(" ") if kind == LLAMA else text
