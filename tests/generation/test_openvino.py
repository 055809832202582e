"""OpenVINO's paged attention says what the graph says: any batch, any place, whatever lay in the cache before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders.artifacts import OnnxGraph
from builders.export.decoder import export_decoder
from builders.quantize.products import write_quantised
from builders.quantize.weight_only import recipe_of
from runtime.errors import BadEnvironment, ServerFault
from runtime.generation.engine import GenerationEngine, generate
from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor
from runtime.generation.executor.openvino import OpenVinoStepExecutor
from runtime.generation.request import SamplingParams
from runtime.session import open_session
from runtime.step import Batch, Copy, Logits, Row, Tokens
from tests.generation.setup import engine_over, prompts, real_engine
from tests.generators import DECODERS, TEXTS, WINDOW, generator_checkpoint, save_generator

pytest_plugins = ("tests.generation.fixtures",)

GREEDY = SamplingParams(max_tokens=20)
CAPACITY, ROWS = 100, 5  # no whole number of blocks
ROW = st.integers(0, ROWS - 1)
Graph = Callable[[str], Path]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Each kind exported once."""
    done: dict[str, OnnxGraph] = {}

    def export(kind: str) -> Path:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            (folder / "graph").mkdir()
            checkpoint = generator_checkpoint(save_generator(folder / "checkpoint", kind))
            done[kind] = export_decoder(checkpoint, "fp32", TEXTS, folder / "graph")
        return done[kind].file_path

    return export


def _poisoned(graph: Path, capacities: tuple[int, ...] = (CAPACITY,), rows: int = ROWS) -> OpenVinoStepExecutor:
    """What is read before it was written would show in every number."""
    executor = OpenVinoStepExecutor(graph, capacities, rows, threads=2)
    for cache in executor._caches:
        cache[:] = np.nan
    return executor


def _engine(graph: Path, slots: int, chunk: int = 16, capacities: tuple[int, ...] = (64,)) -> GenerationEngine:
    return engine_over(_poisoned(graph, capacities, slots + 2), capacities, slots, chunk=chunk)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "qwen2" else ()) for kind in DECODERS]
)  # Qwen2 is a Llama with biases, and is compared with its own model in tests/export
def test_every_kind_agrees_with_onnx_runtime(graph: Graph, kind: str) -> None:
    """Mistral's window is passed."""
    paged, plain = _poisoned(graph(kind)), OnnxRuntimeStepExecutor(graph(kind), (CAPACITY,), ROWS, threads=2)
    random, filled = np.random.default_rng(0), np.zeros(ROWS, np.int64)
    for step in range(60):
        row = step % ROWS
        chunk = random.integers(4, paged.vocabulary, (1, int(random.integers(1, 12))))
        alone = Batch(0, row, chunk, filled[row : row + 1].copy())
        filled[row] += chunk.shape[1]
        batches = [alone]
        if row:  # beside it, the rows before it decode in the same step
            batches.append(Batch(0, 0, random.integers(4, paged.vocabulary, (row, 1)), filled[:row].copy()))
            filled[:row] += 1
        if filled.max() > CAPACITY:
            break
        for got, expected in zip(paged.run(batches), plain.run(batches), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert filled.max() > 2 * WINDOW


@pytest.mark.parametrize(("slots", "chunk"), [(1, 64), (8, 16), (5, 3), (32, 64)])
def test_output_is_that_of_one_request_at_a_time(decoder_graph: Path, slots: int, chunk: int) -> None:
    asked = prompts(24)
    engine = _engine(decoder_graph, slots, chunk)
    got = generate(engine, asked, GREEDY)
    engine.scheduler.cache.check_integrity()
    assert got == generate(real_engine(decoder_graph, (64,), 1, chunk=64), asked, GREEDY)
    assert generate(engine, asked[::-1], GREEDY) == got[::-1]
    assert engine.counters.reused_tokens > 0


def test_several_lengths_of_rows(decoder_graph: Path) -> None:
    asked = prompts(12)
    got = generate(_engine(decoder_graph, 6, 4, capacities=(16, 40, 64)), asked, GREEDY)
    assert got == generate(_engine(decoder_graph, 1), asked, GREEDY)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1), st.integers(1, CAPACITY - 1)), max_size=6)
)
def test_a_copied_row_goes_on_like_its_source(decoder_graph: Path, copies: list[tuple[int, int, int]]) -> None:
    paged = _poisoned(decoder_graph)
    random = np.random.default_rng(1)
    texts = [random.integers(3, paged.vocabulary, CAPACITY) for _ in range(ROWS)]
    for row, text in enumerate(texts):
        paged.run([Batch(0, row, text[None], np.zeros(1, np.int64))])
    for source, target, tokens in copies:
        paged.copy([Copy(Row(0, source), Row(0, target), tokens)])
        texts[target] = np.concatenate([texts[source][:tokens], texts[target][tokens:]])
        paged.run([Batch(0, target, texts[target][None, tokens:], np.array([tokens]))])
    fresh = _poisoned(decoder_graph)
    for row, text in enumerate(texts):
        expected = fresh.run([Batch(0, row, text[None], np.zeros(1, np.int64))])[0].copy()
        got = paged.run([Batch(0, row, text[None, -1:], np.array([CAPACITY - 1]))])[0]
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_weights_in_few_bits_stay_in_few_bits(graph: Graph, precision: str, tmp_path: Path) -> None:
    """The products are taken with the stored weights, whose dequantisation is folded into them."""
    file = tmp_path / "graph.onnx"
    write_quantised(graph("llama"), recipe_of(int(precision[1]), "nearest"), {}, file)
    paged = _poisoned(file)
    kinds = {
        (str(node.get_rt_info()["layerType"].astype(str)), str(node.get_rt_info()["runtimePrecision"].astype(str)))
        for node in paged._model.get_runtime_model().get_ops()
    }
    assert ("FullyConnected", f"i{precision[1:]}") in kinds
    tokens = np.arange(4, 34)
    got = paged.run([Batch(0, 0, tokens[None], np.zeros(1, np.int64))])[0].ravel()
    exact, rounded = (_logits(file, tokens, level) for level in ("1", "4"))
    # How a CPU takes these products differs: without VNNI, OpenVINO leaves the activations in fp32. ONNX Runtime's own
    # rounding of activations to 8 bits is the yardstick of what may be lost.
    lost, allowed = (np.linalg.norm(logits - exact) / np.linalg.norm(exact) for logits in (got, rounded))
    assert lost < 1.25 * allowed
    assert allowed < 0.1


def _logits(graph: Path, tokens: Tokens, accuracy_level: str) -> Logits:
    """By ONNX Runtime. Level 4 rounds the activations of products with weights in few bits to 8 bits, 1 does not."""
    session = open_session(graph, entries=[("session.qdq_matmulnbits_accuracy_level", accuracy_level)])
    caches = {
        item.name: np.zeros((1, item.shape[1], CAPACITY, item.shape[3]), np.float32)
        for item in session.get_inputs()
        if "cache" in item.name
    }
    feeds = {
        "input_ids": tokens[None],
        "write_indices": np.zeros(1, np.int64),
        "last_index": np.array([len(tokens) - 1]),
    }
    logits: Logits = session.run(["logits"], {**feeds, **caches})[0].ravel()
    return logits


def test_a_row_ends_where_the_next_begins(decoder_graph: Path) -> None:
    with pytest.raises(ServerFault, match="129 tokens in a row of 128"):
        _poisoned(decoder_graph).run([Batch(0, 0, np.full((1, 129), 5), np.zeros(1, np.int64))])


def test_a_reset_forgets(decoder_graph: Path) -> None:
    engine = _engine(decoder_graph, 2)
    first = generate(engine, prompts(2), GREEDY)
    engine.executor.reset()
    engine.scheduler.cache.clear()
    assert generate(engine, prompts(2), GREEDY) == first


def test_what_cannot_be_paged_is_refused(graph: Graph, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(graph("llama")))
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("softcap", 30.0))
    onnx.save(model, str(tmp_path / "capped.onnx"))
    with pytest.raises(BadEnvironment, match=r"a soft cap cannot be paged; set serving\.executor: onnxruntime"):
        OpenVinoStepExecutor(tmp_path / "capped.onnx", (64,), 2, threads=1)
    for name, said in (("GreaterOrEqual", "made by GreaterEqual, and not causal"), ("swapped", "made by LessEqual")):
        model = onnx.load(str(graph("llama")))
        for node in model.graph.node:
            if node.op_type == "LessOrEqual":
                turned = list(node.input[::-1])
                if name == "swapped":
                    del node.input[:]
                    node.input.extend(turned)
                else:
                    node.op_type = name
        onnx.save(model, str(tmp_path / "backwards.onnx"))
        with pytest.raises(BadEnvironment, match=said):
            OpenVinoStepExecutor(tmp_path / "backwards.onnx", (64,), 2, threads=1)
