"""Encoder-decoders like T5 -> two standard ONNX graphs, `encoder.onnx` and `decoder.onnx`.

Encoder:
    input_ids      int64 [batch, source]   padded on the right
    source_length  int64 [batch]           real tokens of each row, at least one
 -> cross_key_{i}, cross_value_{i}         [batch, heads, source, head_dim] for the cross attention of decoder layer i
Decoder: the inputs and outputs of `builders.export.decoder`, and as further inputs
    cross_key_{i}, cross_value_{i}, source_length   as the encoder left and was given them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from builders.artifacts import Checkpoint, GenerationQuality, OnnxGraph
from builders.export.decoder import MAX_RATIO
from builders.export.rewrites import cache_layers, exportable, last_tokens, operator_attention, replace
from builders.export.tokenizer import require_tokenizer
from builders.export.weights import load_weights, require_sound
from builders.export.write import write_program
from builders.graph import record_graph, require_standard
from builders.judging import parity
from builders.judging.perplexity import (
    ENCODER_FILE,
    Ids,
    encode,
    graph_perplexity,
    logits_perplexity,
    require_perplexity,
    text_pairs,
)

DECODER_FILE = "decoder.onnx"
_SLOTS, _SOURCE = 13, 7  # sizes of the example


def export_seq2seq(
    checkpoint: Checkpoint, precision: Literal["fp32", "fp16"], texts: Sequence[str], out: Path
) -> OnnxGraph:
    """Writes both graphs into `out`, checked against the eager fp32 model; the record is the decoder's, with all files.

    Checked is the second half of each text, given the first as the source. Raises CheckpointError when weights are
    missing or do not fit the tokenizer; ParityError or QualityError when the graphs compute something else.
    """
    require_tokenizer(checkpoint, texts)
    model = load_weights(checkpoint)
    few = text_pairs(checkpoint, texts, parity.ROWS, parity.LENGTH)
    many = text_pairs(checkpoint, texts)
    expected, reference = _logits(model, *few), logits_perplexity(_logits(model, *many), many[2])
    require_sound(expected, checkpoint)
    write_graphs(model.half() if precision == "fp16" else model, checkpoint, out)
    for name in (ENCODER_FILE, DECODER_FILE):
        require_standard(out / name)
    file = out / DECODER_FILE
    difference = parity.require_parity(
        file, few[2], expected, precision, checkpoint.source, encode(out / ENCODER_FILE, *few[:2])
    )
    perplexity, executor = graph_perplexity(file, many[2], encode(out / ENCODER_FILE, *many[:2]))
    quality = GenerationQuality(
        perplexity=perplexity,
        reference_perplexity=reference,
        tokens=many[2][:, 1:].size,
        executor=executor,
        max_relative_difference=difference,
    )
    require_perplexity({precision: quality}, MAX_RATIO[precision], f"graph of {checkpoint.source}")
    return record_graph(out, precision, quality, checkpoint.digest, DECODER_FILE)


def _logits(model: Any, source: Ids, lengths: Ids, target: Ids) -> NDArray[np.float32]:
    """[rows, length, vocabulary] of the eager model, each row by itself and without padding."""
    import torch

    with torch.no_grad():
        return np.concatenate(
            [
                model(
                    input_ids=torch.from_numpy(source[row : row + 1, : lengths[row]]),
                    decoder_input_ids=torch.from_numpy(target[row : row + 1]),
                )
                .logits.float()
                .numpy()
                for row in range(len(source))
            ]
        )


def write_graphs(model: Any, checkpoint: Checkpoint, out: Path) -> None:
    import torch

    facts = checkpoint.generation
    assert facts is not None
    layers = range(facts.layers)
    crossed = [f"cross_{part}_{layer}" for layer in layers for part in ("key", "value")]
    names = [f"{part}_cache_{layer}" for layer in layers for part in ("key", "value")]
    ids, lengths = torch.ones(3, _SOURCE, dtype=torch.int64), torch.tensor([7, 4, 2])
    own = [torch.zeros(3, facts.kv_heads, _SLOTS, facts.head_dim, dtype=model.dtype) for _ in names]
    cross = [torch.zeros(3, facts.heads, _SOURCE, facts.head_dim, dtype=model.dtype) for _ in crossed]
    encoder, decoder = _encoder_module(model), _decoder_module(model)
    with exportable(model, checkpoint.max_length, _attention):
        write_program(
            encoder, (ids, lengths), [{0: "batch", 1: "source"}, {0: "batch"}],
            ["input_ids", "source_length"], crossed, out / ENCODER_FILE,
        )  # fmt: skip
        write_program(
            decoder,
            (torch.zeros(3, 5, dtype=torch.int64), torch.tensor([0, 2, 7]), torch.full((3,), 4), lengths, *own, *cross),
            [{0: "batch", 1: "length"}, {0: "batch"}, {0: "batch"}, {0: "batch"},
             *[{0: "batch", 2: "capacity"}] * len(own), *[{0: "batch", 2: "source"}] * len(cross)],
            ["input_ids", "write_indices", "last_index", "source_length", *names, *crossed],
            ["logits", *[f"new_{name}" for name in names]],
            out / DECODER_FILE,
        )  # fmt: skip


def _distance_bias(attention: Any) -> Callable[[Any, Any], Any]:
    """(query positions [batch, length], slots) -> bias [batch, heads, length, slots], by T5's own buckets.

    Beyond the largest distance every key is in the last bucket, so one table of that length serves any position.
    """
    import torch

    longest = int(attention.relative_attention_max_distance)
    with torch.no_grad():
        table = attention.compute_bias(longest + 1, 1)[0, :, :, 0].T.contiguous()  # [longest + 1, heads]

    def bias(positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        distance = (positions[:, :, None] - slots[None, None]).clamp(0, longest)
        return torch.nn.functional.embedding(distance, table).permute(0, 3, 1, 2)

    return bias


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float = 1.0, position_bias: Any = None, **_: Any
) -> tuple[Any, None]:
    """Served to transformers' attention interface. Self attention adds the bias of relative positions to its scores."""
    import torch

    if module.is_causal or not module.is_decoder:  # not cross attention
        mask = torch.where(mask, position_bias, torch.finfo(query.dtype).min)
    return operator_attention(query, key, value, mask, scaling)


def _encoder_module(model: Any) -> Any:
    import torch

    class EncoderGraph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, source_length: torch.Tensor) -> tuple[torch.Tensor, ...]:
            mask = _source_mask(source_length, input_ids.shape[1], input_ids.shape[1])
            hidden = self.model.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
            cross = [block.layer[1].EncDecAttention for block in self.model.decoder.block]
            return tuple(
                part(hidden).view(*hidden.shape[:2], each.n_heads, each.key_value_proj_dim).transpose(1, 2)
                for each in cross
                for part in (each.k, each.v)
            )

    return EncoderGraph()


def _decoder_module(model: Any) -> Any:
    import torch
    from transformers.cache_utils import Cache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    class DecoderGraph(torch.nn.Module):
        """The decoder with positions, masks and caches spelled out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            attentions = [block.layer[0].SelfAttention for block in model.decoder.block]
            self.biased = [each for each in attentions if each.has_relative_attention_bias]
            self.biases = [_distance_bias(each) for each in self.biased]

        def forward(
            self, input_ids: torch.Tensor, write_indices: torch.Tensor, last_index: torch.Tensor,
            source_length: torch.Tensor, *caches: torch.Tensor,
        ) -> tuple[torch.Tensor, ...]:  # fmt: skip
            own, cross = caches[: len(caches) // 2], caches[len(caches) // 2 :]
            length, slots = input_ids.shape[1], torch.arange(own[0].shape[2])
            positions = write_indices[:, None] + torch.arange(length)[None]  # [batch, length]
            layers, encoded = cache_layers(own, write_indices), cache_layers(cross, None)
            cache = EncoderDecoderCache(Cache(layers=layers), Cache(layers=encoded))
            cache.is_updated = dict.fromkeys(range(len(layers)), True)  # cross keys and values are there already
            with ExitStack() as undo:
                undo.enter_context(last_tokens(self.model, last_index))
                for each, bias in zip(self.biased, self.biases, strict=True):
                    computed = bias(positions, slots)
                    replace(undo, each, "compute_bias", lambda *_, computed=computed, **__: computed)
                logits = self.model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=cross[0][:, 0]),  # only its presence is asked for
                    attention_mask=_source_mask(source_length, length, cross[0].shape[2]),
                    decoder_input_ids=input_ids,
                    decoder_attention_mask=slots[None, None, None] <= positions[:, None, :, None],
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            return (logits[:, 0].float(), *[part for layer in layers for part in (layer.keys, layer.values)])

    return DecoderGraph()


def _source_mask(source_length: Any, length: Any, source: Any) -> Any:
    """[batch, 1, length, source], True where the source has a token. ONNX Runtime wants the length spelled out."""
    import torch

    mask = torch.arange(source)[None, None, None] < source_length[:, None, None, None]
    return mask.expand(-1, 1, length, -1)
