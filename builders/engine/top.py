"""The output that lets greedy steps leave their logits on the GPU."""

from __future__ import annotations

from pathlib import Path

from builders.errors import EngineError
from runtime.tensorrt.engine import LOGITS, TOP

_LARGEST_VOCABULARY = 1 << 24  # a float32 holds every whole number up to it


def add_top(file: Path, folder: Path) -> Path:
    """A copy of the graph in `folder` that gives `top` besides: float32 [batch, 2], the largest logit and its token.

    The logit of a row that holds a NaN is NaN. Weights of their own are linked.
    Raises EngineError for a graph without logits, or with others than float32 of a fixed, sensible vocabulary.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(str(file), load_external_data=False)
    found = next((value for value in model.graph.output if value.name == LOGITS), None)
    if found is None:
        raise EngineError(f"{file.name}: no output {LOGITS}, only {', '.join(v.name for v in model.graph.output)}")
    logits = found.type.tensor_type
    vocabulary = logits.shape.dim[-1].dim_value
    if logits.elem_type != TensorProto.FLOAT or not 1 <= vocabulary <= _LARGEST_VOCABULARY:
        raise EngineError(f"{file.name}: its logits are no float32 of 1 to {_LARGEST_VOCABULARY} tokens")
    for name in {entry.value for tensor in model.graph.initializer for entry in tensor.external_data
                 if entry.key == "location"}:  # fmt: skip
        (folder / name).symlink_to((file.parent / name).resolve())
    one = f"{TOP}/one"  # the number of tokens wanted, and the axis of the vocabulary
    model.graph.initializer.append(helper.make_tensor(one, TensorProto.INT64, [1], [1]))
    model.graph.node.extend([
        helper.make_node("Flatten", [LOGITS], [f"{TOP}/rows"], axis=-1),  # some exports have [batch, 1, vocabulary]
        helper.make_node("TopK", [f"{TOP}/rows", one], [f"{TOP}/value", f"{TOP}/index"], axis=1),
        # Which of them is the largest next to a NaN is not defined; a sum is NaN with any of its terms.
        helper.make_node("ReduceSum", [f"{TOP}/rows", one], [f"{TOP}/sum"], keepdims=1),
        helper.make_node("IsNaN", [f"{TOP}/sum"], [f"{TOP}/broken"]),
        helper.make_node("Where", [f"{TOP}/broken", f"{TOP}/sum", f"{TOP}/value"], [f"{TOP}/logit"]),
        helper.make_node("Cast", [f"{TOP}/index"], [f"{TOP}/token"], to=TensorProto.FLOAT),
        helper.make_node("Concat", [f"{TOP}/logit", f"{TOP}/token"], [TOP], axis=1),
    ])  # fmt: skip
    batch = logits.shape.dim[0].dim_param or logits.shape.dim[0].dim_value
    model.graph.output.append(helper.make_tensor_value_info(TOP, TensorProto.FLOAT, [batch, 2]))
    target = folder / file.name
    target.write_bytes(model.SerializeToString())
    return target
