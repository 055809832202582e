"""`tokenizer.json`, which is served, against what transformers makes of the whole folder.

`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` can change ids too: lower-casing, tokens at
the ends, tokens that were added later, the side that is cut. Nothing of them is read here: the ids are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from builders.artifacts import Checkpoint
from builders.checkpoint.tokenizer import FILES
from builders.errors import CheckpointError

_TEXTS = 16
_ODD = (  # what normalisers, splitters and special tokens differ on
    "Hello World", "HELLO", "  two  spaces ", "naïve Café", "don't stop", "a\tb\nc", "x=1;y[2]", "你好世界",
    "Ünïcödé ½", "hello <s> world", "🙂 smile",
)  # fmt: skip
_CUT = 12  # tokens that a long text is cut to
_ADDED = 64  # added tokens that are tried in a text, and all of them by name


def require_tokenizer(checkpoint: Checkpoint, texts: Sequence[str]) -> None:
    """Raises CheckpointError with the first text whose ids differ. A tokenizer.json alone is its own reference."""
    if not any(checkpoint.path(name).is_file() for name in FILES[1:]):
        return
    from tokenizers import Tokenizer

    fast, reference = Tokenizer.from_file(str(checkpoint.path("tokenizer.json"))), _reference(checkpoint)
    fast.no_padding()
    fast.no_truncation()
    known, wanted = fast.get_vocab(with_added_tokens=True), reference.get_vocab()
    for token in sorted(set(reference.get_added_vocab()) | (set(wanted) - set(known))):
        if known.get(token) != wanted[token]:
            _refuse(checkpoint, f"the token {token!r} as {known.get(token)}", f"{wanted[token]}")
    added = [f"a {token} b" for token in sorted(reference.get_added_vocab())[:_ADDED]]
    tried = [*texts[:_TEXTS], *_ODD, *added]
    pairs: list[tuple[str, str | None]] = [(text, None) for text in tried]
    pairs += itertools.pairwise(tried) if checkpoint.task == "reranking" else ()
    for first, second in pairs:
        found = fast.encode(first, second)
        _compare(checkpoint, (first, second), found, reference(first, second))
    if checkpoint.generation is None:  # prompts are refused, not cut
        fast.enable_truncation(_CUT)
        longest = max(texts, key=len)
        cut = reference(longest, truncation=True, max_length=_CUT)
        _compare(checkpoint, (longest, f"cut to {_CUT} tokens"), fast.encode(longest), cut)


def _reference(checkpoint: Checkpoint) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(checkpoint.directory, local_files_only=True)
    except Exception as error:  # whatever the class that the folder names makes of its files
        raise CheckpointError(
            f"tokenizer of {checkpoint.source}",
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            expected="a folder that transformers' AutoTokenizer reads, as tokenizer_config.json names it",
            fix="copy the tokenizer's files again, or remove tokenizer_config.json where tokenizer.json says it all",
        ) from error  # fmt: skip


def _compare(checkpoint: Checkpoint, what: tuple[str, str | None], found: Any, wanted: Any) -> None:
    text = " | ".join(part[:60] for part in what if part is not None)
    if found.ids != list(wanted["input_ids"]):
        _refuse(checkpoint, f"{found.ids[:16]} for {text!r}", f"{list(wanted['input_ids'])[:16]}")
    types = wanted.get("token_type_ids")
    if checkpoint.token_type_ids and types is not None and found.type_ids != list(types):
        _refuse(checkpoint, f"segments {found.type_ids[:16]} for {text!r}", f"{list(types)[:16]}")


def _refuse(checkpoint: Checkpoint, found: str, wanted: str) -> None:
    folder = checkpoint.directory
    raise CheckpointError(
        f"tokenizer.json of {checkpoint.source}",
        got=found,
        expected=f"{wanted}, as transformers' AutoTokenizer makes of the folder's other files",
        fix='write a tokenizer.json that agrees: python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('DIR').save_pretrained('DIR')\", with {folder} for DIR",
    )
