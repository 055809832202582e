"""A large decoder in torch, the peer that everybody knows: transformers' Llama with its StaticCache; eager, and with
the step launched as one CUDA graph, as it is and compiled.

All rows stand at the last position of their cache, which a static cache reads as a whole wherever they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from measure.bench.decoder_graph import DecoderShape
from measure.gpu_proof.machine import require_torch
from measure.gpu_proof.record import Measured
from measure.gpu_proof.roofline import against, decode_work, prefill_work
from measure.gpu_proof.setting import Setting
from measure.gpu_proof.timing import Case, captured, in_time, seconds_of

if TYPE_CHECKING:
    import torch

Step = Callable[[], "torch.Tensor"]


def new_llama(shape: DecoderShape, positions: int, dtype: str, device: str) -> Any:
    """A LlamaForCausalLM with random weights, made on the device; the same twice."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=positions, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()


def decode_row(setting: Setting, how: str, context: int, rows: int, note: str = "") -> Measured:
    case = f"{setting.decoder_name}, decode, batch {rows}, context {context}"
    return Measured(case, how, {"batch": rows, "context": context}, note=note)


def measure(setting: Setting) -> Iterator[Measured]:
    require_torch(setting, "transformers")
    model = new_llama(setting.decoder, max(setting.contexts), setting.dtype, setting.device)
    return in_time(setting, _cases(setting, model))


def _cases(setting: Setting, model: Any) -> Iterator[Case]:
    """What tells most in the least time first: compiling 32 layers for one shape takes most of a minute."""
    graph = "" if setting.dry else " + CUDA graph"
    for length in setting.contexts:
        row = Measured(f"{setting.decoder_name}, prompt of {length}", "torch eager", {"length": length})
        yield row, partial(_prefill, setting, model)
    ways = {f"torch eager{graph}": (False, True), "torch eager": (False, False), f"torch.compile{graph}": (True, True)}
    for (how, (compiled, graphs)), context, rows in product(ways.items(), setting.contexts, setting.decode_rows):
        yield decode_row(setting, how, context, rows), partial(_decode, setting, model, compiled, graphs)


def _prefill(setting: Setting, model: Any, row: Measured) -> list[Measured]:
    import torch

    length = row.axes["length"]
    ids = torch.ones(1, length, dtype=torch.int64, device=setting.device)
    with torch.no_grad():
        seconds = seconds_of(lambda: model(input_ids=ids, logits_to_keep=1), setting)
    work = prefill_work(setting.decoder, length, setting.value_bytes)
    return [against(row, work, seconds, setting.limits, tokens_per_s=length / seconds)]


def _decode(setting: Setting, model: Any, compiled: bool, graphs: bool, row: Measured) -> list[Measured]:
    rows, context = row.axes["batch"], row.axes["context"]
    step = decode_step(setting, model, rows, context, compiled=compiled)
    launch = captured(step, setting) if graphs else step
    seconds, contract = seconds_of(launch, setting), seconds_of(lambda: launch().cpu(), setting)
    work = decode_work(setting.decoder, rows, context, setting.value_bytes)
    figures = {"tokens_per_s": rows / seconds, "contract_ms": contract * 1e3}
    return [against(row, work, seconds, setting.limits, **figures)]


def decode_step(setting: Setting, model: Any, rows: int, context: int, *, compiled: bool = False) -> Step:
    """A greedy step at the last position of a new, empty cache; any number of times. Gives tokens, [rows, 1]."""
    import torch
    from transformers import StaticCache

    config, forward = model.config, model
    cache = StaticCache(config, max_cache_len=context)
    cache.early_initialization(rows, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    if compiled:
        torch.compiler.reset()  # a shape is a compilation, and after 8 of them Dynamo would give up
        forward = torch.compile(model, backend=setting.compiler, fullgraph=True, dynamic=False)
    ids = torch.ones(rows, 1, dtype=torch.int64, device=setting.device)
    reached = [layer.cumulative_length for layer in cache.layers]
    last = [torch.full_like(length, context - 1) for length in reached]

    def step() -> torch.Tensor:
        torch._foreach_copy_(reached, last)  # back by one: each step moves on
        with torch.no_grad():
            tokens: torch.Tensor = forward(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        return tokens

    return step
