"""Graphs for the tests of the partitioner: small random transformers as torch exports them, and plain ONNX ones.

Every parameter is random, biases and norms too: a bias added twice or a shifted slice must change numbers.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

OPSET = 24
SLOTS = 32
HIDDEN, HEADS, LAYERS, VOCABULARY, FFN = 32, 4, 2, 64, 64


def encoder(kind: str, file: Path, **changes: Any) -> Path:
    """bert, roberta or distilbert: `input_ids`, `attention_mask` -> `hidden`."""
    import torch
    import transformers

    kinds = {
        "bert": (transformers.BertModel, transformers.BertConfig),
        "roberta": (transformers.RobertaModel, transformers.RobertaConfig),
        "distilbert": (transformers.DistilBertModel, transformers.DistilBertConfig),
    }
    model_type, config_type = kinds[kind]
    names = ("dim", "n_heads", "n_layers", "hidden_dim") if kind == "distilbert" else (
        "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")  # fmt: skip
    sizes = dict(zip(names, (HIDDEN, HEADS, LAYERS, FFN), strict=True))
    model = random_parameters(
        model_type(config_type(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **changes))
    )

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            batch, length = input_ids.shape
            mask = attention_mask[:, None, None, :].bool().expand(batch, 1, length, length)
            positions = {} if kind == "distilbert" else {"position_ids": torch.arange(length)[None]}
            return self.model(input_ids=input_ids, attention_mask=mask, **positions)[0]

    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=48)
    example = (torch.zeros(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))
    dims = tuple({0: batch, 1: length} for _ in example)
    return _export(Graph(), example, dims, ["input_ids", "attention_mask"], ["hidden"], file)


def decoder(kind: str, file: Path, *, half: bool = False, eager: bool = False, **changes: Any) -> Path:
    """gpt2, llama, qwen2, mistral or gemma with key-value caches: prefill and decode in one graph.

    `eager`: attention as MatMul-Softmax-MatMul with repeated key and value heads, not the Attention operator.
    """
    import torch
    import transformers

    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    if kind == "gpt2":
        sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
        config = transformers.GPT2Config(**{**sizes, "vocab_size": VOCABULARY, **TOKENS, **changes})
    else:
        extra = {"gemma": {"head_dim": 8}, "mistral": {"sliding_window": None}}.get(kind, {})
        config = getattr(transformers, f"{_CLASSES[kind]}Config")(
            **{**sizes, "vocab_size": VOCABULARY, **TOKENS, **changes, **extra}
        )
    model = random_parameters(
        getattr(transformers, f"{_CLASSES[kind]}{'LMHeadModel' if kind == 'gpt2' else 'ForCausalLM'}")(config)
    )
    if kind == "gpt2":
        _linear_from_conv1d(model)
    model = model.half() if half else model
    model.set_attn_implementation("eager" if eager else _attention())
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = torch.float16 if half else torch.float32
    caches = [torch.zeros(3, kv_heads, SLOTS, head_dim, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]
    example = (torch.zeros(3, 5, dtype=torch.int64), torch.tensor([0, 2, 7]), torch.full((3,), 4), *caches)
    batch, length, slots = (torch.export.Dim(name, min=1, max=SLOTS) for name in ("batch", "length", "slots"))
    dims = ({0: batch, 1: length}, {0: batch}, {0: batch}, tuple({0: batch, 2: slots} for _ in caches))
    names = [f"{part}_cache_{layer}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    return _export(
        _decoder_module(model, eager), example, dims, ["input_ids", "write_indices", "last_index", *names],
        ["logits", *[f"new_{name}" for name in names]], file,
    )  # fmt: skip


_CLASSES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "gemma": "Gemma"}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _decoder_module(model: Any, eager: bool) -> Any:
    import torch
    from transformers.cache_utils import Cache

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, write_indices: Any, last_index: Any, *caches: Any) -> Any:
            length, slots = input_ids.shape[1], caches[0].shape[2]
            positions = write_indices[:, None] + torch.arange(length)[None]
            mask = torch.arange(slots)[None, None, None] <= positions[:, None, :, None]
            if eager:
                mask = torch.where(mask, 0.0, -1e9).to(caches[0].dtype)
            layers = [_cache_layer(*caches[at : at + 2], write_indices) for at in range(0, len(caches), 2)]
            hidden = self.model.base_model(
                input_ids=input_ids, attention_mask=mask, position_ids=positions.clamp(max=63),
                past_key_values=Cache(layers=layers), use_cache=True,
            ).last_hidden_state  # fmt: skip
            last = torch.gather(hidden, 1, last_index[:, None, None].expand(-1, -1, hidden.shape[2]))
            return (self.model.lm_head(last), *[part for layer in layers for part in (layer.keys, layer.values)])

    return Graph()


def t5_encoder(file: Path) -> Path:
    """`input_ids`, `attention_mask` -> keys and values of every cross attention, [batch, heads, length, d]."""
    import torch

    model = _t5()

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            mask = (attention_mask[:, None, None, :] > 0).expand(-1, 1, input_ids.shape[1], -1)
            hidden = self.model.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
            projections = [
                part
                for block in self.model.decoder.block
                for part in (block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v)
            ]
            return tuple(part(hidden).view(*hidden.shape[:2], HEADS, 8).transpose(1, 2) for part in projections)

    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=48)
    example = (torch.ones(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64))
    names = [f"cross_{part}_{layer}" for layer in range(LAYERS) for part in ("key", "value")]
    return _export(Graph(), example, ({0: batch, 1: length},) * 2, ["input_ids", "attention_mask"], names, file)


def t5_decoder(file: Path) -> Path:
    """One step of the decoder, with its own caches and the encoder's keys and values as inputs."""
    import torch
    from transformers.cache_utils import Cache, EncoderDecoderCache

    model = _t5()

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, write_indices: Any, last_index: Any, encoder_mask: Any, *caches: Any) -> Any:
            own, cross = caches[: 2 * LAYERS], caches[2 * LAYERS :]
            length, slots = input_ids.shape[1], own[0].shape[2]
            positions = write_indices[:, None] + torch.arange(length)[None]
            first = self.model.decoder.block[0].layer[0].SelfAttention
            buckets = first._relative_position_bucket(
                torch.arange(slots)[None, None] - positions[:, :, None], bidirectional=False
            )
            bias = first.relative_attention_bias(buckets).permute(0, 3, 1, 2)
            first.compute_bias = lambda *_, **__: bias
            mask = torch.arange(slots)[None, None, None] <= positions[:, None, :, None]
            cross_mask = (encoder_mask[:, None, None, :] > 0).expand(-1, 1, length, -1)
            layers = [_cache_layer(own[at], own[at + 1], write_indices) for at in range(0, len(own), 2)]
            others = [_cache_layer(cross[at], cross[at + 1], write_indices) for at in range(0, len(cross), 2)]
            cache = EncoderDecoderCache(Cache(layers=layers), Cache(layers=others))
            cache.is_updated = dict.fromkeys(range(LAYERS), True)
            hidden = self.model.decoder(
                input_ids=input_ids, attention_mask=mask, encoder_hidden_states=cross[0][:, 0, :1, :1],
                encoder_attention_mask=cross_mask, past_key_values=cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
            last = torch.gather(hidden, 1, last_index[:, None, None].expand(-1, -1, hidden.shape[2]))
            return (
                self.model.lm_head(last * HIDDEN**-0.5),
                *[part for layer in layers for part in (layer.keys, layer.values)],
            )

    batch, length, encoded = (torch.export.Dim(name, min=1, max=48) for name in ("batch", "length", "encoded"))
    own = [torch.zeros(3, HEADS, SLOTS, 8) for _ in range(2 * LAYERS)]
    cross = [torch.zeros(3, HEADS, 7, 8) for _ in range(2 * LAYERS)]
    example = (torch.ones(3, 5, dtype=torch.int64), torch.tensor([0, 2, 7]), torch.full((3,), 4),
               torch.zeros(3, 7, dtype=torch.int64), *own, *cross)  # fmt: skip
    dims = ({0: batch, 1: length}, {0: batch}, {0: batch}, {0: batch, 1: encoded},
            tuple([{0: batch}] * len(own) + [{0: batch, 2: encoded}] * len(cross)))  # fmt: skip
    names = [f"{part}_cache_{layer}" for layer in range(LAYERS) for part in ("key", "value")]
    crossed = [f"cross_{part}_{layer}" for layer in range(LAYERS) for part in ("key", "value")]
    inputs = ["input_ids", "write_indices", "last_index", "encoder_mask", *names, *crossed]
    return _export(Graph(), example, dims, inputs, ["logits", *[f"new_{name}" for name in names]], file)


def _t5() -> Any:
    import transformers

    sizes = {"d_model": HIDDEN, "d_kv": 8, "num_heads": HEADS, "d_ff": FFN, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**sizes, num_layers=LAYERS, num_decoder_layers=LAYERS, decoder_start_token_id=0)
    model = random_parameters(transformers.T5ForConditionalGeneration(config))
    model.set_attn_implementation(_t5_attention())
    return model


def _cache_layer(keys: Any, values: Any, positions: Any) -> Any:
    import torch
    from transformers.cache_utils import CacheLayerMixin

    def write(cache: Any, update: Any) -> Any:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache, update, positions),
            {"axis": -2, "mode": "linear"},
            dtype=cache.dtype,
            shape=cache.shape,
            version=24,
        )

    class Layer(CacheLayerMixin):  # type: ignore[misc]
        is_compileable = True

        def lazy_initialization(self, *_: Any) -> None: ...

        def update(self, k: Any, v: Any, *_: Any, **__: Any) -> Any:
            self.keys, self.values = write(self.keys, k), write(self.values, v)
            return self.keys, self.values

        def get_mask_sizes(self, _: Any) -> Any:
            return self.keys.shape[2], 0

        def get_seq_length(self) -> int:
            return 0

        def get_max_cache_shape(self) -> Any:
            return self.keys.shape[2]

        def get_max_length(self) -> Any:
            return self.keys.shape[2]

    layer = Layer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


def _attention() -> str:
    """The Attention operator, in [batch, heads, length, d] and with fewer key and value heads as they are."""
    import torch
    from transformers import AttentionInterface

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        return torch.onnx.ops.attention(query, key, value, mask, scale=scaling)[0].transpose(1, 2), None

    AttentionInterface.register("onnx_operator", attention)
    return "onnx_operator"


def _t5_attention() -> str:
    import torch
    from transformers import AttentionInterface

    def attention(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scaling: Any = 1.0,
        position_bias: Any = None,
        **_: Any,
    ) -> Any:
        bias = 0.0 if position_bias is None else position_bias
        bias = torch.where(mask, bias, -1e9).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return torch.onnx.ops.attention(query, key, value, bias, scale=scaling)[0].transpose(1, 2), None

    AttentionInterface.register("onnx_operator_t5", attention)
    return "onnx_operator_t5"


def random_parameters(model: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def _linear_from_conv1d(model: Any) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    class Product(torch.nn.Module):
        def __init__(self, source: Any) -> None:
            super().__init__()
            self.weight, self.bias = source.weight, source.bias

        def forward(self, x: Any) -> Any:
            return x @ self.weight + self.bias

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                setattr(module, name, Product(child))


def _export(module: Any, example: Any, dims: Any, inputs: Sequence[str], outputs: Sequence[str], file: Path) -> Path:
    """Written beside and renamed, so that a run that was cut short leaves no half graph in a cache of graphs."""
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), example, dynamic_shapes=dims, strict=False)
        exported = torch.onnx.export(program, args=(), dynamo=True, opset_version=OPSET, input_names=list(inputs),
                                     output_names=list(outputs), verbose=False)  # fmt: skip
    assert exported is not None
    partial = file.with_name(f".{os.getpid()}-{file.name}")
    exported.save(partial, external_data=False)
    partial.rename(file)
    return file


GRAPHS: dict[str, Callable[[Path], Path]] = {
    "bert": lambda file: encoder("bert", file),
    "roberta": lambda file: encoder("roberta", file),
    "distilbert": lambda file: encoder("distilbert", file),
    "gpt2": lambda file: decoder("gpt2", file),
    "gpt2_fp16": lambda file: decoder("gpt2", file, half=True),
    "llama": lambda file: decoder("llama", file),
    "llama_fp16": lambda file: decoder("llama", file, half=True),
    "llama_eager": lambda file: decoder("llama", file, eager=True),
    "llama_wide": lambda file: decoder("llama", file, hidden_size=64, intermediate_size=128, tie_word_embeddings=False),
    "qwen2": lambda file: decoder("qwen2", file),
    "mistral": lambda file: decoder("mistral", file),
    "gemma": lambda file: decoder("gemma", file, num_key_value_heads=1),
    "t5_encoder": t5_encoder,
    "t5_decoder": t5_decoder,
}


def operators(file: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(file), load_external_data=False).graph.node}
