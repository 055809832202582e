"""How well a language model predicts held-out text: the graph against its checkpoint, and the budget for it.

The graph is run as it is served: token by token, through its caches. Graphs are judged with ONNX Runtime where they are
made, and once more by the executor that serves them where that is another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builders.artifacts import Checkpoint, GenerationQuality
from builders.errors import CheckpointError, InputError, QualityError
from runtime.session import open_session

if TYPE_CHECKING:
    import torch

    from runtime.step import StepExecutor

Ids = NDArray[np.int64]
Constants = Mapping[str, NDArray[Any]]  # inputs of a decoder graph that stay the same from step to step
ENCODER_FILE = "encoder.onnx"  # of an encoder-decoder, beside its decoder
ROWS, LENGTH = 32, 128  # of the measurement: 4064 predicted tokens


class DecoderSession:
    """A decoder graph in ONNX Runtime, with caches for `rows` texts that stand at positions of their own.

    `constants` are inputs that stay: what the encoder of an encoder-decoder left. `outputs` asks for further values of
    the graph. Not thread-safe.
    """

    def __init__(
        self,
        file: Path,
        rows: int,
        capacity: int,
        constants: Constants | None = None,
        outputs: Sequence[str] = (),
    ) -> None:
        import onnxruntime

        self._session = open_session(file, threads=os.cpu_count() or 1)
        self.description = f"ONNX Runtime {onnxruntime.__version__}"
        self.positions = np.zeros(rows, np.int64)
        self._names = ["logits", *outputs]
        self._constants = dict(constants or {})
        inputs = {item.name: item for item in self._session.get_inputs()}
        self._caches = {}
        for output in self._session.get_outputs():
            name = output.name.removeprefix("new_")
            if name != output.name and name in inputs:
                _, heads, slots, width = inputs[name].shape
                shape = (rows, heads, slots if isinstance(slots, int) else capacity, width)
                dtype = np.float16 if "float16" in inputs[name].type else np.float32
                self._caches[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))

    def step(self, ids: Ids, counts: Ids) -> list[NDArray[Any]]:
        """Logits [rows, vocabulary] behind the last token of each row, then the further outputs.

        `ids` [rows, length], right-padded; `counts` [rows] real tokens, at least one.
        """
        binding = self._session.io_binding()
        feeds = {"input_ids": ids, "write_indices": self.positions, "last_index": counts - 1, **self._constants}
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, cache in self._caches.items():  # read and written in place
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(f"new_{name}", cache)
        for name in self._names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        self.positions = self.positions + counts
        return [value.numpy() for value in binding.get_outputs()[-len(self._names) :]]  # in the order bound


def token_rows(checkpoint: Checkpoint, texts: Sequence[str], rows: int = ROWS, length: int = LENGTH) -> Ids:
    """[rows or fewer, length]: the texts one after another, each row begun as the checkpoint begins a text.

    Raises InputError when the texts do not fill one row, CheckpointError when the tokenizer knows more tokens than
    the model.
    """
    from tokenizers import Tokenizer

    facts = checkpoint.generation
    assert facts is not None
    tokenizer = Tokenizer.from_file(str(checkpoint.path("tokenizer.json")))
    ends = facts.eos_ids[:1]
    stream = [
        token
        for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for token in (*encoding.ids, *ends)
    ]
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= facts.vocabulary:
        raise CheckpointError(
            f"tokenizer.json of {checkpoint.source}", got=f"the token id {highest}",
            expected=f"ids under {facts.vocabulary}, the rows of the model's embedding",
            fix="copy the tokenizer that the model was trained with",
        )  # fmt: skip
    length = min(length, checkpoint.max_length)
    start = [] if facts.bos_id is None else [facts.bos_id]
    taken = length - len(start)
    count = min(rows, len(stream) // taken)
    if count == 0:
        raise InputError(
            "held-out texts", got=f"{len(stream)} tokens", expected=f"at least {taken}", fix="give more text"
        )
    return np.array([start + stream[row * taken : (row + 1) * taken] for row in range(count)], np.int64)


def encode(file: Path, source: Ids, lengths: Ids) -> dict[str, NDArray[Any]]:
    """What the decoder wants beside its own inputs, from the encoder graph in ONNX Runtime."""
    session = open_session(file)
    names = [item.name for item in session.get_outputs()]
    outputs = session.run(names, {"input_ids": source, "source_length": lengths})
    return {**dict(zip(names, outputs, strict=True)), "source_length": lengths}


def text_pairs(
    checkpoint: Checkpoint, texts: Sequence[str], rows: int = ROWS, length: int = LENGTH
) -> tuple[Ids, Ids, Ids]:
    """(source, its lengths, target): rows of text cut in two; sources of several lengths, padded on the right."""
    facts = checkpoint.generation
    assert facts is not None
    found = token_rows(checkpoint, texts, rows, length)
    count, half = len(found), found.shape[1] // 2
    lengths = np.maximum(half - np.arange(count) % half // 2, 1)
    source = np.where(np.arange(half) < lengths[:, None], found[:, :half], facts.pad_id)
    start = np.full((count, 1), facts.pad_id if facts.start_id is None else facts.start_id)
    return source, lengths, np.concatenate([start, found[:, half:]], axis=1)


def continuation_losses(
    file: Path, prompts: Ids, lengths: Ids, outputs: Ids, constants: Constants | None = None
) -> NDArray[np.float64]:
    """-log of the probability of each token of `outputs` [rows, tokens], given its row's prompt and those before it.

    `prompts` [rows, longest] are right-padded, `lengths` [rows] their real tokens. The prompts are one step.
    """
    count, tokens = outputs.shape
    session = DecoderSession(file, count, prompts.shape[1] + tokens, constants)
    ids, counts, losses = prompts, lengths, []
    for at in range(tokens):
        logits = session.step(ids, counts)[0].reshape(count, -1)
        losses.append(_losses(logits, outputs[:, at]))
        ids, counts = np.ascontiguousarray(outputs[:, at : at + 1]), np.ones(count, np.int64)
    return np.stack(losses, axis=1)


def graph_perplexity(file: Path, rows: Ids, constants: Constants | None = None) -> tuple[float, str]:
    """exp of the mean loss over every token of `rows` but the first, and what computed it."""
    count, length = rows.shape
    session = DecoderSession(file, count, length, constants)
    ones = np.ones(count, np.int64)
    return _by_token(rows, lambda at, ids: session.step(ids, ones)[0]), session.description


def executor_perplexity(executor: StepExecutor, capacities: Sequence[int], rows: Ids) -> float:
    """The same through the executor that serves, all rows at once. It needs as many rows as there are texts."""
    from runtime.generation.grouping import pool_for
    from runtime.step import Batch

    count, length = rows.shape
    pool = pool_for(length - 1, capacities)  # nothing follows the last token
    return _by_token(rows, lambda at, ids: executor.run([Batch(pool, 0, ids, np.full(count, at))])[0])


def _by_token(rows: Ids, step: Callable[[int, Ids], NDArray[Any]]) -> float:
    """exp of the mean loss; `step(at, ids)` gives the logits behind the tokens at one place of every row."""
    places = range(rows.shape[1] - 1)
    return _exp([_losses(step(at, np.ascontiguousarray(rows[:, at : at + 1])), rows[:, at + 1]) for at in places])


def _losses(logits: NDArray[Any], targets: Ids) -> NDArray[np.float64]:
    """-log softmax(logits)[target] of each row."""
    values = logits.astype(np.float64)
    peak = values.max(axis=-1, keepdims=True)
    log_sum = peak[:, 0] + np.log(np.exp(values - peak).sum(axis=-1))
    losses: NDArray[np.float64] = log_sum - np.take_along_axis(values, targets[:, None], axis=-1)[:, 0]
    return losses


def model_perplexity(model: torch.nn.Module, rows: Ids) -> float:
    """The same of a transformers causal language model, on whole rows and without a cache."""
    return _exp([_losses(model_logits(model, row[None])[0, :-1], row[1:]) for row in rows])


def logits_perplexity(logits: NDArray[np.float32], rows: Ids) -> float:
    """The same of given logits [rows, length, vocabulary]."""
    return _exp([_losses(each[:-1], row[1:]) for each, row in zip(logits, rows, strict=True)])


def model_logits(model: torch.nn.Module, rows: Ids) -> NDArray[np.float32]:
    """[rows, length, vocabulary] of a transformers causal language model."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(rows)).logits.float().numpy()  # type: ignore[no-any-return]


def _exp(losses: list[NDArray[np.float64]]) -> float:
    """exp of the mean; an infinite result is one that no budget passes."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(np.concatenate(losses))))


def within_budget(quality: GenerationQuality, max_ratio: float) -> bool:
    """Whether the graph is hardly more perplexed than the checkpoint. What is not a number never is."""
    return math.isfinite(quality.ratio) and quality.ratio <= max_ratio


def require_perplexity(qualities: Mapping[str, GenerationQuality], max_ratio: float, what: str) -> GenerationQuality:
    """The last of the attempts at one graph, each by what was tried. Raises QualityError with the figures of all when
    that one misses the budget."""
    *_, last = qualities.values()
    if within_budget(last, max_ratio):
        return last
    figures = "; ".join(f"{name}: {each.perplexity:.3f}, ratio {each.ratio:.4f}" for name, each in qualities.items())
    raise QualityError(
        f"{what} misses the perplexity budget on {last.tokens} held-out tokens ({last.executor}): {figures}; "
        f"{last.reference_perplexity:.3f} of the fp32 checkpoint, budget {max_ratio}. Choose a wider precision, give "
        "calibration texts closer to your traffic, or raise the budget knowingly"
    )
