"""fp32 or fp16 graph -> weights of matrix products in 8 or 4 bits, in blocks with one scale each: of 128 weights where
they have 8 bits, of 32 where they have 4. Decoding reads every weight for each token, so it is bytes that count.

Eight bits round to the nearest step. Four bits may also be rounded by GPTQ, in a graph whose inputs AWQ has scaled, or
by both; what comes nearest to the reference on calibration texts by which nothing was rounded is taken. Where that
misses the budget on held-out texts, the head, which is read in full at every step, gets eight bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx_ir as ir

from builders.artifacts import Checkpoint, GenerationQuality, OnnxGraph, WeightRounding
from builders.errors import ParityError
from builders.graph import record_graph, require_standard
from builders.judging.language import Step, side_by_side
from builders.judging.perplexity import (
    ENCODER_FILE,
    Constants,
    DecoderSession,
    Ids,
    encode,
    graph_perplexity,
    require_perplexity,
    text_pairs,
    token_rows,
    within_budget,
)
from builders.quantize import awq
from builders.quantize.blocks import BLOCK, SYMMETRIC, Bits, BlockForm, Blocks
from builders.quantize.products import WeightRecipe, compensate, find_products, write_quantised
from builders.quantize.rounding import JUDGED
from builders.quantize.scales import Floats
from builders.spec import PrecisionSlice, Rounding, WeightRounder

_LONGEST: dict[Bits, int] = {8: 128, 4: BLOCK}
_METHODS: dict[WeightRounder, str] = {
    "nearest": "round to nearest", "gptq": "GPTQ", "awq": "AWQ", "awq+gptq": "AWQ and GPTQ",
}  # fmt: skip
_SAME = 1e-3  # relative: what scaling inputs may change of a graph's outputs before anything is rounded
_CHECKED = 2  # rows on which that is checked

Progress = Callable[[str], None]


class Subject(Protocol):
    """A model by its graph files. What it reads to be rounded by is not what it is judged by."""

    def hessians(self, file: Path, names: Collection[str]) -> dict[str, Floats]:
        """X^T X [K, K] of the named activations of a graph, on texts to round by."""

    def loss(self, file: Path) -> float:
        """How far a graph is from the reference on texts by which nothing is rounded: the less, the better."""

    def outputs(self, file: Path) -> Floats:
        """Of a few texts."""


def recipe_of(bits: Bits, method: WeightRounder, form: BlockForm = SYMMETRIC) -> WeightRecipe:
    return WeightRecipe(_METHODS[method], bits, bits, "gptq" in method, _LONGEST[bits], "awq" in method, form)


def form_of(precision: PrecisionSlice) -> BlockForm:
    return BlockForm(precision.blocks == "asymmetric", precision.ranges)


def methods(bits: Bits, asked: Rounding) -> tuple[WeightRounder, ...]:
    """To be tried. Eight bits lose too little to tell one from another."""
    if asked != "auto":
        return (asked,)
    return ("nearest",) if bits == 8 else tuple(_METHODS)


@dataclass
class WeightWriter:
    """The forms of one graph, `source`, by recipe. What they share is made once: AWQ's factors, found in `reference`,
    its fp32 form; and GPTQ's weights, in the graph as it is and in the one that is scaled."""

    source: Path
    reference: Path
    subject: Subject
    work: Path
    ranks: int = 1
    progress: Progress = lambda message: None
    _factors: list[Floats | None] | None = None
    _blocks: dict[bool, dict[int, Blocks]] = field(default_factory=dict)

    def write(self, recipe: WeightRecipe, target: Path) -> None:
        self.progress(recipe.name)
        scaled = self._scaled(recipe) if recipe.awq else self.reference
        blocks = self._compensated(recipe, scaled) if recipe.gptq else {}
        source = self.source
        if recipe.awq:
            source = scaled if self.source == self.reference else self.work / "scaled-source.onnx"
            if source != scaled and not source.exists():
                awq.write_folded(self.source, self._factors or [], source)
        write_quantised(source, recipe, blocks, target, self.ranks)
        require_standard(target)

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return find_products(ir.load(self.source))[0].dtype

    def _scaled(self, recipe: WeightRecipe) -> Path:
        file = self.work / "scaled.onnx"
        if self._factors is None:
            self._factors = awq.search(
                self.reference, self.subject.hessians, recipe, self._dtype, self.ranks, self.progress
            )  # fmt: skip
            awq.write_folded(self.reference, self._factors, file)
            self._require_same(file)
        return file

    def _compensated(self, recipe: WeightRecipe, scaled: Path) -> dict[int, Blocks]:
        if recipe.awq not in self._blocks:
            self._blocks[recipe.awq] = compensate(
                scaled, self.subject.hessians, recipe, self.progress, self._dtype, self.ranks
            )
        return self._blocks[recipe.awq]

    def _require_same(self, file: Path) -> None:
        expected, found = self.subject.outputs(self.reference), self.subject.outputs(file)
        off = float(np.nan_to_num(np.abs(found - expected), nan=np.inf).max() / max(np.abs(expected).max(), 1e-30))
        if off > _SAME:
            raise ParityError(
                f"{self.reference.name} with scaled inputs of its products computes something else: outputs differ by "
                f"{off:.2g} of the largest, where {_SAME} is rounding"
            )


def choose(
    writer: WeightWriter, bits: Bits, asked: Rounding, target: Path, form: BlockForm = SYMMETRIC
) -> tuple[WeightRecipe, WeightRounding]:
    """The method that the spec asks for; or, of all, the one whose graph is nearest to the reference on texts by which
    nothing was rounded. `target` is written over."""
    tried = methods(bits, asked)
    losses: dict[str, float] = {}
    if len(tried) > 1:
        for method in tried:
            writer.write(recipe_of(bits, method, form), target)
            losses[method] = writer.subject.loss(target)
        writer.progress(", ".join(f"{_METHODS[name]} {losses[name]:.5g}" for name in tried))
    taken = min(tried, key=lambda name: losses.get(name, 0.0))
    return recipe_of(bits, taken, form), WeightRounding(asked=asked, taken=taken, losses=losses)


@dataclass
class _Decoder:
    """A language model. Its texts become rows of tokens when they are asked for; beside `reference`, the fp32 graph,
    lies its encoder, if it has one."""

    checkpoint: Checkpoint
    texts: Sequence[str]
    reference: Path

    @cached_property
    def _seen(self) -> tuple[Ids, Constants]:
        texts = [text for number, text in enumerate(self.texts) if number % JUDGED]
        return _material(self.checkpoint, texts, self.reference.parent)

    @cached_property
    def _judged(self) -> tuple[Ids, Constants]:
        return _material(self.checkpoint, self.texts[::JUDGED], self.reference.parent)

    def hessians(self, file: Path, names: Collection[str]) -> dict[str, Floats]:
        return decoder_hessians(file, names, *self._seen)

    def loss(self, file: Path) -> float:
        """Divergence of next-token probabilities. Few tokens tell it, where a perplexity may be lower by chance."""
        (rows, constants), ones = self._judged, np.ones(len(self._judged[0]), np.int64)

        def step_of(graph: Path) -> Step:
            session = DecoderSession(graph, len(rows), rows.shape[1], constants)
            return lambda _, ids: session.step(ids, ones)[0]

        return float(side_by_side(rows, step_of(self.reference), step_of(file)).divergence.mean())

    def outputs(self, file: Path) -> Floats:
        rows, constants = self._seen
        few = {name: array[:_CHECKED] for name, array in constants.items()}
        session = DecoderSession(file, len(rows[:_CHECKED]), rows.shape[1], few)
        counts = np.full(len(rows[:_CHECKED]), rows.shape[1] - 1)
        found = [session.step(np.ascontiguousarray(rows[:_CHECKED, :-1]), counts)[0]]
        found += [session.step(np.ascontiguousarray(rows[:_CHECKED, -1:]), np.ones_like(counts))[0]]
        logits: Floats = np.concatenate(found).astype(np.float32)
        return logits


def quantize_weights(
    graph: OnnxGraph,
    reference: OnnxGraph,
    checkpoint: Checkpoint,
    precision: Literal["w8", "w4"],
    max_ratio: float,
    calibration_texts: Sequence[str],
    held_out_texts: Sequence[str],
    out: Path,
    progress: Progress = lambda message: None,
    ranks: int = 1,
    rounding: Rounding = "auto",
    form: BlockForm = SYMMETRIC,
) -> OnnxGraph:
    """Writes the decoder `graph` with quantised weights into `out`; `reference` is its fp32 form;
    `ranks` will share every product.

    The encoder of an encoder-decoder comes along in eight bits: it runs once a text, and is not bound by bytes.
    Raises QualityError with the figures when the perplexity on the held-out texts is not within `max_ratio` of the
    reference's; UnsupportedError when there is too little to quantise.
    """
    file = out / graph.file
    if checkpoint.task == "seq2seq":
        write_quantised(graph.path(ENCODER_FILE), recipe_of(8, "nearest"), {}, out / ENCODER_FILE)
        require_standard(out / ENCODER_FILE)
    progress("measuring the reference")
    expected, _ = graph_perplexity(reference.file_path, *_material(checkpoint, held_out_texts, reference.directory))
    rows, constants = _material(checkpoint, held_out_texts, out)
    bits: Bits = 8 if precision == "w8" else 4
    with tempfile.TemporaryDirectory(prefix="trireme-weights-") as work:
        subject = _Decoder(checkpoint, calibration_texts, reference.file_path)
        writer = WeightWriter(graph.file_path, reference.file_path, subject, Path(work), ranks, progress)
        recipe, chosen = choose(writer, bits, rounding, file, form)
        tried: dict[str, GenerationQuality] = {}
        for each in dict.fromkeys((recipe, _wider_head(recipe))):
            writer.write(each, file)
            perplexity, executor = graph_perplexity(file, rows, constants)
            tried[each.name] = GenerationQuality(
                perplexity=perplexity, reference_perplexity=expected, tokens=rows[:, 1:].size, executor=executor
            )
            if within_budget(tried[each.name], max_ratio):
                break
    quality = require_perplexity(tried, max_ratio, f"{precision} graph of {checkpoint.source}")
    return record_graph(out, precision, quality, graph.digest, graph.file).model_copy(update={"rounding": chosen})


def _wider_head(recipe: WeightRecipe) -> WeightRecipe:
    return replace(recipe, name=f"{recipe.name}, head in 8 bits", head_bits=8) if recipe.bits == 4 else recipe


def _material(checkpoint: Checkpoint, texts: Sequence[str], folder: Path) -> tuple[Ids, Constants]:
    """Rows of tokens to predict, and what the encoder in `folder` makes of their sources, if there is one."""
    if checkpoint.task != "seq2seq":
        return token_rows(checkpoint, texts), {}
    source, lengths, target = text_pairs(checkpoint, texts)
    return target, encode(folder / ENCODER_FILE, source, lengths)


def decoder_hessians(
    source: Path, names: Collection[str], rows: Ids, constants: Constants | None = None
) -> dict[str, Floats]:  # fmt: skip
    """X^T X of the named activations over every token of `rows`, read token by token as the graph is served."""
    model = ir.load(source)
    values = {value.name: value for node in model.graph for value in node.outputs if value.name in names}
    model.graph.outputs.extend(values.values())
    found: dict[str, Floats] = {}
    with tempfile.TemporaryDirectory(prefix="trireme-calibration-") as folder:
        probe = Path(folder) / "probe.onnx"
        ir.save(model, probe, external_data="probe.onnx.data")
        session = DecoderSession(probe, len(rows), rows.shape[1], constants, list(map(str, values)))
        for at in range(rows.shape[1]):
            _, *read = session.step(np.ascontiguousarray(rows[:, at : at + 1]), np.ones(len(rows), np.int64))
            for name, array in zip(values, read, strict=True):
                tokens = array.reshape(-1, array.shape[-1]).astype(np.float32)
                product: Floats = tokens.T @ tokens
                found[str(name)] = found[str(name)] + product if name in found else product
    return found
