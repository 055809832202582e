"""The arithmetic of `plan`, against numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.errors import InputError
from builders.partition.plan import (
    GIGA,
    GPUS,
    Load,
    Model,
    best,
    cache_bytes_per_token,
    collective_bytes_per_token,
    divides,
    model_from_config,
    plan,
    step_seconds,
    weight_bytes,
)

LLAMA_8B = Model(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocabulary=128256)
LLAMA_70B = Model(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocabulary=128256)
CHAT = Load(sequences=16, prompt_tokens=1024, output_tokens=256)


def test_parameters_are_those_of_the_published_models() -> None:
    assert LLAMA_8B.parameters / 1e9 == pytest.approx(8.03, abs=0.01)
    assert LLAMA_70B.parameters / 1e9 == pytest.approx(70.55, abs=0.05)


def test_sizes_by_hand() -> None:
    assert cache_bytes_per_token(LLAMA_8B, 1, 1) == 131072  # 2 x 32 layers x 8 heads x 128 x 2 bytes
    assert cache_bytes_per_token(LLAMA_8B, 4, 2) == 131072 // 8
    assert cache_bytes_per_token(LLAMA_8B, 16, 1) == 2 * 32 * 128 * 2  # one head each, held twice over
    assert weight_bytes(LLAMA_8B, 1, 1) == LLAMA_8B.parameters * 2
    assert collective_bytes_per_token(LLAMA_8B, 1, 1) == 0
    assert collective_bytes_per_token(LLAMA_8B, 2, 1) == 2 * 32 * 4096 * 2 + 128256 * 2 // 2


def test_layouts_obey_the_heads() -> None:
    assert divides(LLAMA_8B, 8)
    assert divides(LLAMA_8B, 16)
    assert not divides(LLAMA_8B.model_copy(update={"heads": 12, "kv_heads": 12}), 8)
    assert {each.tensor for each in plan(LLAMA_8B, GPUS["H100"], CHAT)} == {1, 2, 4, 8}


def test_70b_fits_two_h200_and_no_single_h100() -> None:
    one = plan(LLAMA_70B, GPUS["H100"], CHAT, max_gpus=1)
    assert "needs 1" in one[0].reasons[0]
    assert "room for 72.0" in one[0].reasons[0]
    chosen = best(plan(LLAMA_70B, GPUS["H200"], CHAT))
    assert chosen is not None
    assert (chosen.gpus, chosen.tensor) == (2, 2)
    assert best(plan(LLAMA_70B, GPUS["L4"], CHAT, max_gpus=4)) is None


def test_limits_are_given_as_reasons() -> None:
    limits = CHAT.model_copy(update={"max_between_tokens_ms": 0.1, "max_first_token_ms": 0.1, "min_tokens_per_s": 1e9})
    reasons = " ".join(plan(LLAMA_8B, GPUS["H100"], limits)[0].reasons)
    assert all(words in reasons for words in ("first token after", "ms between tokens", "tokens/s, wanted"))


def test_decoding_is_bound_by_memory_and_prefill_by_compute() -> None:
    gpu = GPUS["H100"]
    seconds, bound = step_seconds(LLAMA_8B, gpu, 1, 1, 1, 1, 0)
    assert bound == "memory"
    read = (LLAMA_8B.parameters - LLAMA_8B.embedding_parameters) * 2  # all but the table of embeddings
    assert seconds == pytest.approx(read / (0.8 * 3350 * GIGA), rel=0.01)
    assert step_seconds(LLAMA_8B, gpu, 1, 1, 1, 4096, 0)[1] == "compute"


@given(tensor=st.sampled_from([1, 2, 4, 8]), pipeline=st.integers(1, 8))
def test_more_gpus_never_hold_more_each(tensor: int, pipeline: int) -> None:
    assert weight_bytes(LLAMA_70B, 2 * tensor, pipeline) <= weight_bytes(LLAMA_70B, tensor, pipeline)
    assert weight_bytes(LLAMA_70B, tensor, pipeline + 1) <= weight_bytes(LLAMA_70B, tensor, pipeline)
    assert weight_bytes(LLAMA_70B, tensor, pipeline) >= LLAMA_70B.parameters * 2 / (tensor * pipeline) * 0.9


def test_sizes_from_a_config() -> None:
    config = {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 6, "intermediate_size": 1536,
              "vocab_size": 30522, "hidden_act": "gelu", "architectures": ["BertModel"]}  # fmt: skip
    model = model_from_config(config)
    assert (model.head_dim, model.gated, model.generates) == (32, False, False)
    assert cache_bytes_per_token(model, 1, 1) == 0
    encoder = best(plan(model, GPUS["L4"], Load(sequences=32, prompt_tokens=128)))
    assert encoder is not None
    assert encoder.gpus == 1
    with pytest.raises(InputError, match="vocab_size"):
        model_from_config({key: value for key, value in config.items() if key != "vocab_size"})


def test_every_gpu_names_its_source() -> None:
    assert all(gpu.source.startswith("https://") for gpu in GPUS.values())
