"""A transformer by its sizes, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builders.errors import InputError, UnsupportedError
from runtime.record import Record

# Families whose feed-forward part is gated whatever the activation.
_GATED = (
    "cohere", "gemma", "glm", "granite", "llama", "mistral", "olmo", "phi3", "qwen2", "qwen3", "smollm3", "stablelm",
)  # fmt: skip
# What these keys stand for needs other arithmetic: experts, compressed caches, two stacks of layers.
_OTHER_ARITHMETIC = ("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank")
_TIED = ("gpt2", "gemma", "gemma2", "gemma3_text")  # tied unless the file says otherwise
_GENERATES = ("CausalLM", "LMHead", "DoubleHeads")


class Model(Record):
    """`weight_bits` are those of the matrices; tables, activations and caches take `value_bytes` a value."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    generates: bool = True
    weight_bits: float = 16
    value_bytes: int = 2

    @property
    def block_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Matrices and the table of words; norms, biases and positions are under a hundredth."""
        tables = 1 if self.tied or not self.generates else 2
        return self.layers * self.block_parameters + tables * self.embedding_parameters


def model_from_config(config: Mapping[str, Any], *, weight_bits: float = 16) -> Model:
    """Raises InputError for a key that is missing, UnsupportedError for a model that these sizes do not describe."""
    _require_plain(config)

    def size(*names: str, default: int | None = None) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if not isinstance(found, int) or found < 1:
            raise InputError(
                "config.json",
                got=f"no {names[0]}" if found is None else f"{names[0]}: {found!r}",
                expected="the sizes of a transformer, as positive numbers",
                fix="add the key, or copy config.json of the model again",
            )
        return found

    hidden = size("hidden_size", "n_embd", "dim", "d_model")
    heads = size("num_attention_heads", "n_head", "n_heads", "num_heads")
    architectures = " ".join(config.get("architectures") or [])
    return Model(
        layers=size("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        ffn=size("intermediate_size", "hidden_dim", "d_ff", "n_inner", default=4 * hidden),
        vocabulary=size("vocab_size"),
        gated=_gated(config),
        tied=bool(config.get("tie_word_embeddings", config.get("model_type") in _TIED)),
        generates=any(word in architectures for word in _GENERATES),
        weight_bits=weight_bits,
    )


def _require_plain(config: Mapping[str, Any]) -> None:
    other = [key for key in _OTHER_ARITHMETIC if config.get(key)]
    if other or config.get("is_encoder_decoder"):
        raise UnsupportedError(
            "config.json",
            got=f"{other[0]}: {config[other[0]]}" if other else "an encoder-decoder",
            expected="an encoder or a decoder of equal dense blocks, for which the arithmetic holds",
            fix="size this model by a load test",
        )


def _gated(config: Mapping[str, Any]) -> bool:
    """Whether the feed-forward part multiplies two projections (SwiGLU and its kin).

    A config.json may leave out what is its class's default, so the kind of model tells first.
    """
    return str(config.get("model_type")).startswith(_GATED) or str(config.get("hidden_act")) in ("silu", "swish")
