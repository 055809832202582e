"""Small random language models, saved as transformers saves real ones, and what they say when run eagerly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.judging import corpus
from builders.spec import ModelSlice
from tests.conftest import _save_tokenizer
from tests.partition.exported import random_parameters

TEXTS = corpus.texts(None, 64)
POSITIONS, WINDOW = 96, 20
DECODERS = ("gpt2", "llama", "qwen2", "mistral", "gemma")
_IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1, "vocab_size": 400}
_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip


def _partial_rotary(share: float) -> dict[str, Any]:
    """Angles for this share of a head alone."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}}


PARTLY_ROTATED = ("gpt_neox", "phi3", "nemotron", "phi", "glm")
_CLASSES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": POSITIONS}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_SIZES, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SIZES),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SIZES, "sliding_window": WINDOW}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_SIZES, "num_key_value_heads": 1, "head_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {
        **{name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}, "rotary_pct": 0.25,
        "hidden_size": 128}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_SIZES, **_partial_rotary(0.75), "hidden_size": 128}),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {**_SIZES, **_partial_rotary(0.5)}),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_SIZES, **_partial_rotary(0.5)}),
    "glm": ("GlmConfig", "GlmForCausalLM", {**_SIZES, **_partial_rotary(0.5), "head_dim": 8}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {
        "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 2,
        "decoder_start_token_id": 1, "relative_attention_max_distance": 24, "relative_attention_num_buckets": 16}),
}  # fmt: skip


def make_generator(kind: str, **changes: Any) -> Any:
    """The eager model; every parameter is random, norms and biases too."""
    import torch
    import transformers

    config, model, sizes = _CLASSES[kind]
    torch.manual_seed(0)
    return random_parameters(
        getattr(transformers, model)(getattr(transformers, config)(**{**_IDS, **sizes, **changes}))
    )


def save_generator(folder: Path, kind: str, **changes: Any) -> Path:
    make_generator(kind, **changes).save_pretrained(folder)
    _save_tokenizer(folder, types=False)
    return folder


def generator_checkpoint(folder: Path, task: str = "generation", max_length: int = POSITIONS) -> Checkpoint:
    return load_checkpoint(ModelSlice.model_validate({"source": str(folder), "task": task, "max_length": max_length}))


def eager_logits(model: Any, **inputs: Any) -> NDArray[np.float32]:
    """[length, vocabulary] for one text."""
    import torch

    tensors = {name: torch.tensor([ids]) for name, ids in inputs.items()}
    with torch.no_grad():
        return model(**tensors).logits[0].float().numpy()  # type: ignore[no-any-return]
