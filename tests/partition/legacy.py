"""Graphs of torch's exporter of old, which computes every size from `Shape`: most ONNX files in the wild."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.partition.exported import FFN, HEADS, HIDDEN, LAYERS, TOKENS, VOCABULARY, random_parameters


def legacy(kind: str, file: Path) -> Path:
    """`input_ids`, `attention_mask` -> `hidden` or `logits`, from the exporter of old: every size from `Shape`."""
    import torch
    import transformers

    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": FFN}
    sizes |= {"max_position_embeddings": 64, "vocab_size": VOCABULARY, **TOKENS}
    small = {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 64,
        "vocab_size": VOCABULARY,
        **TOKENS,
    }
    makers: dict[str, Callable[[], Any]] = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**sizes)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, use_cache=False)),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False)
        ),
        "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, use_cache=False)),
    }
    model = random_parameters(makers[kind]())
    model.set_attn_implementation("eager")

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    output = "hidden" if kind == "bert" else "logits"
    names = ["input_ids", "attention_mask", output]
    example = (torch.zeros(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))
    partial = file.with_name(f".{os.getpid()}-{file.name}")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Graph(),
            example,
            str(partial),
            dynamo=False,
            opset_version=18,
            input_names=names[:2],
            output_names=[output],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in names},
        )
    partial.rename(file)
    return file


def legacy_cached(file: Path) -> Path:
    """GPT-2 whose caches grow by Concat: `past_*` in, `present_*` out, a mask over `past + length`."""
    import torch
    import transformers
    from transformers.cache_utils import DynamicCache

    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, vocab_size=VOCABULARY, **TOKENS
    )
    model = random_parameters(transformers.GPT2LMHeadModel(config))
    model.set_attn_implementation("eager")

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            cache = DynamicCache([(past[at], past[at + 1]) for at in range(0, len(past), 2)])
            made = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
            )
            layers = made.past_key_values.layers
            return (made.logits, *[part for layer in layers for part in (layer.keys, layer.values)])

    names = [f"{part}_{layer}" for layer in range(LAYERS) for part in ("key", "value")]
    ids = torch.zeros(2, 3, dtype=torch.int64)
    past = [torch.zeros(2, HEADS, 5, HIDDEN // HEADS) for _ in names]
    axes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "position_ids", "logits")}
    axes |= {"attention_mask": {0: "batch", 1: "past + length"}} | {
        f"past_{name}": {0: "batch", 2: "past"} for name in names
    }
    inputs = ["input_ids", "attention_mask", "position_ids", *[f"past_{name}" for name in names]]
    outputs = ["logits", *[f"present_{name}" for name in names]]
    partial = file.with_name(f".{os.getpid()}-{file.name}")
    example = (ids, torch.ones(2, 8, dtype=torch.int64), ids + 5, *past)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Graph(), example, str(partial), dynamo=False, opset_version=18, input_names=inputs,
                          output_names=outputs, dynamic_axes=axes)  # fmt: skip
    partial.rename(file)
    return file


GRAPHS: dict[str, Callable[[Path], Path]] = {
    "legacy_bert": lambda file: legacy("bert", file),
    "legacy_gpt2_cached": legacy_cached,
    "legacy_gpt2": lambda file: legacy("gpt2", file),
    "legacy_llama": lambda file: legacy("llama", file),
    "legacy_neox": lambda file: legacy("neox", file),
}
