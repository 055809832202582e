"""GPTQ of an INT8 graph's weights against a plain computation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from builders.quantize.int8 import largest_under
from builders.quantize.linears import Group, groups_of, linears_of
from builders.quantize.rounding import JUDGED, gptq_weights, to_round_by
from builders.quantize.smoothquant import quantize_weight
from builders.spec import DeploymentSpec

K = 12


def _requests(lengths: Sequence[int]) -> list[dict[str, NDArray[np.int64]]]:
    random = np.random.default_rng(3)
    return [
        {"input_ids": random.integers(0, 40, (1, length)), "attention_mask": np.ones((1, length), np.int64)}
        for length in lengths
    ]


@pytest.fixture(scope="module")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float32], dict[str, Any]]:
    """Rows of a table, by two products that both read them; in fp32."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    table = (random.normal(size=(40, K)) @ random.normal(size=(K, K))).astype(np.float32)  # channels that go along
    weights = {name: random.normal(size=(K, wide)).astype(np.float32) for name, wide in (("first", 5), ("second", 3))}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
            helper.make_node("MatMul", ["tokens", "first"], ["one"]),
            helper.make_node("MatMul", ["tokens", "second"], ["two"]),
            helper.make_node("Cast", ["attention_mask"], ["unused"], to=TensorProto.FLOAT),
        ],
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
         for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", wide])
         for name, wide in (("one", 5), ("two", 3))],
        [numpy_helper.from_array(array, name) for name, array in {"table": table, **weights}.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), str(file))
    return file, table, weights


def _one_weight_after_the_other(weight: Any, scales: Any, hessian: Any) -> Any:
    """Optimal brain quantisation of rows in the order of their inputs' size: the inverse is made anew without each row
    that is done. Hassibi and Stork, 1993."""
    left = hessian.astype(np.float64) + np.eye(K) * 0.01 * np.diag(hessian).mean()
    order, weight = list(np.argsort(-np.diag(hessian), kind="stable")), weight.astype(np.float64).copy()
    found = np.zeros(weight.shape, np.int8)
    while order:
        inverse = np.linalg.inv(left[np.ix_(order, order)])
        first, rest = order[0], order[1:]
        found[first] = np.clip(np.rint(weight[first] / scales), -127, 127)
        error = (weight[first] - found[first] * scales) / inverse[0, 0]
        weight[rest] -= np.outer(inverse[1:, 0], error)
        order = rest
    return found


def test_weights_are_those_of_the_plain_computation_with_the_scales_of_the_nearest(tiny_graph: Any) -> None:
    file, table, weights = tiny_graph
    requests, factors = _requests([9] * 20), np.linspace(0.5, 2, K).astype(np.float32)
    model = ir.load(file)
    names = [str(node.inputs[1].name) for node in linears_of(model) if node.inputs[1] is not None]
    found = gptq_weights(file, groups_of(model), {0: factors}, requests, file)
    read = np.concatenate([table[each["input_ids"][0]] for each in requests]) / factors
    assert sorted(found) == [0, 1]
    for index, name in enumerate(names):
        nearest = quantize_weight(weights[name], factors, np.float32)
        wanted = _one_weight_after_the_other(weights[name] * factors[:, None], nearest.weight_scale, read.T @ read)
        assert np.array_equal(found[index].weight_scale, nearest.weight_scale)
        assert (found[index].weight == wanted).all()
        exact = read @ (weights[name] * factors[:, None])
        lost = [np.square(exact - read @ (each.weight * each.weight_scale)).sum() for each in (found[index], nearest)]
        assert lost[0] < 0.8 * lost[1]


def test_memory_for_hessians_is_bounded_by_more_runs(tiny_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from builders.quantize import rounding

    file, _, _ = tiny_graph
    model, ones, requests = ir.load(file), np.ones(K, np.float32), _requests([9] * 20)
    alone = [Group((0,), K * 5), Group((1,), K * 3)]
    at_once = gptq_weights(file, groups_of(model), {0: ones}, requests, file)
    monkeypatch.setattr(rounding, "HESSIAN_BYTES", 4 * K * K)
    in_turn = gptq_weights(file, alone, {0: ones, 1: ones}, requests, file)
    assert all(np.array_equal(at_once[index].weight, in_turn[index].weight) for index in (0, 1))


def test_texts_that_judge_are_not_rounded_by() -> None:
    requests = _requests([9] * 10)
    seen = to_round_by(requests)
    assert [id(each) for each in seen] == [id(each) for index, each in enumerate(requests) if index % JUDGED]
    assert len(to_round_by(_requests([6_000] * 40))) == 4  # 24,000 tokens


@pytest.mark.parametrize("total", range(1, 14))
def test_the_largest_count_is_found_from_any_guess(total: int) -> None:
    for right in range(total):
        for guess in range(total + 1):
            tried: list[int] = []
            found = largest_under(total, lambda count: tried.append(count) or count <= right, guess)  # noqa: B023
            assert found == right
            assert len(tried) == len(set(tried))
            assert all(0 < count < total for count in tried)
            if guess == right:
                assert len(tried) <= 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"precision": {"cpu": "fp32", "rounding": "gptq"}}, "precision.rounding says nothing to precision.cpu=fp32"),
        ({"precision": {"cpu": "bf16", "rounding": "nearest"}}, "precision.rounding says nothing to precision.cpu="),
        (
            {"model": {"source": "x", "task": "generation"}, "precision": {"cpu": "fp32", "rounding": "gptq"}},
            "it is for weights in integers; use w8 or w4, or remove it",
        ),
        (
            {"precision": {"cpu": "int8", "rounding": "awq"}},
            "precision.rounding=awq is for weights alone",
        ),
        ({"precision": {"cpu": "int8", "blocks": "asymmetric"}}, "precision.blocks=asymmetric says nothing to"),
        ({"precision": {"cpu": "fp32", "ranges": "mse"}}, "it is for weights alone; use w8 or w4, or remove it"),
        (
            {
                "model": {"source": "x", "task": "generation"},
                "precision": {"cpu": "w4", "gpu": "w4", "blocks": "asymmetric"},
            },
            "TensorRT takes no zero points of precision.gpu=w4",
        ),
        (
            {"precision": {"cpu": "w4", "blocks": "asymmetric", "qat": {"minutes": 1}}},
            "precision.qat trains no zero points",
        ),
        ({"precision": {"cpu": "int8", "rounding": "floor"}}, "precision.rounding"),
    ],
)
def test_where_nothing_is_rounded_or_in_no_such_way(spec: dict[str, Any], said: str) -> None:
    whole = {"name": "x", "model": {"source": "x", "task": "embedding"}, **spec}
    with pytest.raises(ValueError, match=said):
        DeploymentSpec.model_validate(whole)
