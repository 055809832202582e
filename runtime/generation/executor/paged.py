"""A decoder graph with slot caches -> an OpenVINO model whose caches lie in blocks.

The graph is the one that ONNX Runtime serves: `TensorScatter` writes each row's keys and values into its cache, and
`Attention` reads all of it through a mask. Here both become OpenVINO's PagedAttention, which writes and reads blocks in
place and computes only what is filled. The rest of the graph stays as it is: every token becomes a row of length 1 with
a position of its own, so prompts and decoding rows share one call.

    input_ids [tokens, 1], write_indices [tokens]: all tokens of a step, sequence after sequence, and their positions
    past_lens [sequences], subsequence_begins [sequences + 1]: tokens in the cache before the step; where each begins
    block_indices [blocks], block_indices_begins [sequences + 1]: the blocks of each sequence, in order
    max_context_len []: of the longest sequence, after the step
    sampled [sequences]: the tokens whose logits are wanted -> logits [sequences, vocabulary]
    key_cache_{i}, value_cache_{i} [blocks, heads, BLOCK, head_dim]

PagedAttention is an experimental operator of OpenVINO, whose inputs may change: the version is pinned, and each build
measures perplexity through this model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import BadEnvironment

BLOCK = 32  # tokens; what the CPU kernel wants

_PAGED = "PagedAttentionExtension"
_NO_FLOATS = np.zeros(0, np.float32)
_NO_INTEGERS = np.zeros(0, np.int32)
_ZERO = np.int32(0)
# Inputs of the operator behind queries, keys, values and the two caches. Those that a step gives are put in later.
_STEP = {"past_lens": 5, "subsequence_begins": 6, "block_indices": 7, "block_indices_begins": 8, "max_context_len": 12}
_LATER = {at: _ZERO if name == "max_context_len" else _NO_INTEGERS for name, at in _STEP.items()}
_SCALE, _WINDOW = 9, 10
_UNUSED = {
    11: _NO_FLOATS,  # slopes of ALiBi
    13: _NO_INTEGERS,  # score aggregation
    14: _NO_INTEGERS,  # cache rotation, three inputs
    15: _NO_INTEGERS,
    16: _NO_FLOATS,
    17: _NO_FLOATS,  # sparse prompts, three inputs
    18: _ZERO,
    19: _ZERO,
    20: _NO_FLOATS,  # attention sinks
    21: _ZERO,  # cache eviction, four inputs
    22: _NO_INTEGERS,
    23: _NO_INTEGERS,
    24: _NO_INTEGERS,
    25: _NO_INTEGERS,  # token types
    26: np.zeros(0, np.uint8),  # bias between queries, two inputs
    27: _NO_INTEGERS,
}


def paged_model(decoder: Path, core: Any) -> Any:
    """The `openvino.Model`. Raises BadEnvironment for a graph whose attention cannot be paged."""
    from openvino.frontend.onnx import ConversionExtension

    reasons: list[str] = []

    def attention(node: Any) -> list[Any]:
        try:
            return _attention(node)
        except ValueError as error:
            reasons.append(str(error))  # the library's own message has pages
            raise

    core.add_extension(ConversionExtension("TensorScatter", _scatter))
    core.add_extension(ConversionExtension("Attention", attention))
    try:
        model = core.read_model(str(decoder))
    except RuntimeError as error:
        raise _refusal(decoder.name, reasons[0] if reasons else str(error)) from error
    _give_step_inputs(model, decoder.name)
    model.validate_nodes_and_infer_types()
    return model


def weight_block(model: Any) -> int | None:
    """The shortest block of weights that share a scale; None where no weights are in few bits."""
    sizes = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Reshape" and len(node.get_output_partial_shape(0)) == 3:
            source = node.input_value(0).get_node()
            source = source.input_value(0).get_node() if source.get_type_name() == "Convert" else source
            if source.get_type_name() == "Constant" and source.get_element_type().to_string() in ("i8", "i4"):
                sizes.append(int(node.get_output_shape(0)[1]))  # [K / size, size, N]
    return min(sizes, default=None)


def _scatter(node: Any) -> list[Any]:
    """A marker that keeps cache and update together until `_attention` takes them apart."""
    from openvino import opset13

    return [opset13.concat([node.get_input(0), node.get_input(1)], 2).output(0)]


def _attention(node: Any) -> list[Any]:
    """[tokens, heads, 1, head_dim] -> the same, through PagedAttention on the caches' own inputs."""
    from openvino import opset13
    from openvino.op import _PagedAttentionExtension

    if node.get_attribute("softcap", 0.0):
        raise ValueError("attention with a soft cap cannot be paged")
    query, (key, key_cache), (value, value_cache) = node.get_input(0), *(_update(node.get_input(at)) for at in (1, 2))
    width = value_cache.get_partial_shape()[3].get_length()
    scale = node.get_attribute("scale", 0.0) or query.get_partial_shape()[3].get_length() ** -0.5
    window = np.int32(_window(node.get_input(3).get_node()))
    arrays = {**_LATER, _SCALE: np.float32(scale), _WINDOW: window, **_UNUSED}
    given = [_flat(query), _flat(key), _flat(value), key_cache, value_cache]
    rest = [opset13.constant(array).output(0) for _, array in sorted(arrays.items())]
    attended = _PagedAttentionExtension([*given, *rest])
    return [opset13.reshape(attended.output(0), np.array([0, -1, 1, width]), True).output(0)]


def _update(scattered: Any) -> tuple[Any, Any]:
    """New keys or values, and the graph input that is their cache."""
    marker = scattered.get_node()
    if marker.get_type_name() != "Concat" or marker.input_value(0).get_node().get_type_name() != "Parameter":
        raise ValueError("attention reads keys or values that were not just written into a cache")
    return marker.input_value(1), marker.input_value(0)


def _flat(heads: Any) -> Any:
    from openvino import opset13

    return opset13.reshape(heads, np.array([0, -1]), True).output(0)


def _window(mask: Any) -> int:
    """Tokens that a causal mask looks back on, 0 for all. Raises ValueError for any other mask.

    The mask is `slots <= seen`, or that and `slots > seen - window`, where `seen` comes from `write_indices` (see the
    exporter).
    """
    kind = mask.get_type_name()
    if kind == "LessEqual" and _compares_slots(mask):
        return 0
    if kind == "LogicalAnd":
        nodes = [mask.input_value(at).get_node() for at in (0, 1)]
        parts = {node.get_type_name(): node for node in nodes}
        if set(parts) == {"LessEqual", "Greater"} and all(map(_compares_slots, nodes)):
            oldest = parts["Greater"].input_value(1).get_node()
            back = oldest.input_value(1).get_node()
            if oldest.get_type_name() == "Subtract" and back.get_type_name() == "Constant":
                return int(back.get_data().item())
    raise ValueError(f"attention through a mask that is made by {kind}, and not causal, cannot be paged")


def _compares_slots(comparison: Any) -> bool:
    """Slots on the left, positions on the right."""
    left, right = (_reads_positions(comparison.input_value(at).get_node()) for at in (0, 1))
    return right and not left


def _reads_positions(node: Any) -> bool:
    """Whether `write_indices` is among what a node is made of."""
    if node.get_type_name() == "Parameter":
        return str(node.get_friendly_name()) == "write_indices"
    return any(_reads_positions(value.get_node()) for value in node.input_values())


def _give_step_inputs(model: Any, name: str) -> None:
    """Puts the inputs of a step in, and takes those out that a paged cache needs no more."""
    inputs = {item.get_friendly_name(): item for item in model.get_parameters()}
    steps = {key: _parameter(key, [] if key == "max_context_len" else [-1]) for key in (*_STEP, "sampled")}
    for node in model.get_ordered_ops():
        if node.get_type_name() == _PAGED:
            for key, at in _STEP.items():
                node.input(at).replace_source_output(steps[key].output(0))
            _tell_heads(node)
    for key, item in inputs.items():
        if "_cache_" in key:
            _page(item, inputs["input_ids"])
    for result in model.get_results():
        if "logits" not in result.input_value(0).get_names():
            model.remove_result(result)
    _choose(model, inputs, steps["sampled"], name)
    model.add_parameters(list(steps.values()))


def _tell_heads(node: Any) -> None:
    """The CPU kernel asks for numbers that the shapes would tell."""
    facts = node.get_rt_info()
    for letter, at in (("k", 3), ("v", 4)):
        shape = node.input_value(at).get_partial_shape()
        facts[f"num_{letter}_heads"], facts[f"{letter}_head_size"] = shape[1].get_length(), shape[3].get_length()


def _page(cache: Any, input_ids: Any) -> None:
    """[rows, heads, capacity, head_dim] becomes blocks. Whoever asks for its shape wants rows, which are tokens now."""
    from openvino import PartialShape, opset13

    like = opset13.convert(opset13.unsqueeze(input_ids, np.array([2, 3])), cache.get_element_type())
    for reader in cache.output(0).get_target_inputs():
        if reader.get_node().get_type_name() != _PAGED:
            reader.replace_source_output(like.output(0))
    shape = cache.get_partial_shape()
    cache.set_partial_shape(PartialShape([-1, shape[1], BLOCK, shape[3]]))


def _choose(model: Any, inputs: dict[str, Any], sampled: Any, name: str) -> None:
    """The head sees the sampled tokens, in place of each row's `last_index`."""
    from openvino import opset13

    gathers = [node for node in model.get_ordered_ops() if node.get_type_name() == "GatherElements"]
    if len(gathers) != 1 or "last_index" not in inputs:
        raise _refusal(name, f"{len(gathers)} nodes choose the token whose logits are wanted, one is expected")
    chosen = opset13.gather(gathers[0].input_value(0), sampled, np.int64(0))
    gathers[0].output(0).replace(chosen.output(0))
    model.remove_parameter(inputs["last_index"])


def _parameter(name: str, shape: list[int]) -> Any:
    from openvino import PartialShape, Type, opset13

    made = opset13.parameter(PartialShape(shape), Type.i32, name=name)
    made.output(0).set_names({name})
    return made


def _refusal(name: str, why: str) -> BadEnvironment:
    return BadEnvironment(f"OpenVINO cannot page {name}: {why}; set serving.executor: onnxruntime")
