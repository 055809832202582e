"""A version directory of a model repository -> an engine that can run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtime.errors import BadEnvironment, BadRequest
from runtime.generation.cache import SlotCache
from runtime.generation.engine import GenerationEngine
from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor
from runtime.generation.interface import Asked
from runtime.generation.request import Limits, Tokens
from runtime.generation.scheduler import Scheduler
from runtime.prefix import Prefix
from runtime.ranks.hosts import Hosts
from runtime.rows import CacheShape
from runtime.settings import GeneratorModelSettings
from runtime.step import StepExecutor
from runtime.tokenizer_file import open_tokenizer

TOKENIZER_FILE = "tokenizer.json"


class TextTokenizer:
    """A `tokenizer.json` as it is: special tokens as its template says, nothing truncated, nothing padded."""

    def __init__(self, file: Path, vocabulary: int, max_length: int = 1 << 30) -> None:
        """Raises BadEnvironment for a file that is none, or that knows tokens which the model does not."""
        self.fast = open_tokenizer(file)
        largest = max(self.fast.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= vocabulary:
            raise BadEnvironment(
                f"{file.name} has token {largest}, the model {vocabulary} tokens; they do not belong together"
            )
        self._prefix, self._max_length = Prefix(self.fast, max_length), max_length

    def prompt(self, asked: Asked) -> Tokens:
        """[length]. Raises BadRequest for a text without tokens, or with more than the model takes: the library
        sees no more of it than that takes to tell. Other threads run meanwhile."""
        if asked.ids is not None:
            return asked.ids
        text, longer = self._prefix.cut(asked.text or "")
        if longer:
            raise BadRequest(
                f"text_input has {len(asked.text or '')} characters, which are too many: this model takes at most "
                f"{self._max_length} tokens, and at most {self._prefix.most} characters"
            )
        # `encode` would keep Python's lock for as long as it runs.
        ids = np.array(self.fast.encode_batch([text], add_special_tokens=asked.special_tokens)[0].ids, np.int64)
        if not len(ids):
            raise BadRequest("text_input has no tokens of this model")
        return ids

    def echo(self, asked: Asked) -> str:
        """The prompt's text, where the answer is to begin with it."""
        if not asked.echo:
            return ""
        return str(self.fast.decode(asked.ids.tolist())) if asked.ids is not None else asked.text or ""


def open_engine(
    settings: GeneratorModelSettings, directory: Path, device: int = 0, hosts: Hosts | None = None
) -> tuple[GenerationEngine, TextTokenizer]:
    """`hosts`: those that the model's ranks run on; None is this one. Raises BadEnvironment where the files do not fit
    each other or this machine, ServerFault for ranks that fail.
    """
    executor = open_executor(settings, settings.paths(directory), device, hosts)
    try:
        limits = _limits(settings, executor.vocabulary)
        tokenizer = TextTokenizer(directory / TOKENIZER_FILE, executor.vocabulary, limits.max_length)
    except BaseException:
        executor.close()  # rank processes would live on
        raise
    scheduler = Scheduler(
        SlotCache(settings.capacities, settings.slots, settings.kept),
        chunk_tokens=settings.chunk_tokens,
        queue_size=settings.queue_size,
        call_cost=executor.call_cost,
        stages=executor.stages,
        encoder=settings.decoder_start_id is not None,
        every=executor.every,
    )
    return GenerationEngine(executor, scheduler, limits, tokenizer.fast), tokenizer


def _limits(settings: GeneratorModelSettings, vocabulary: int) -> Limits:
    """Raises BadEnvironment for ids that the model does not have."""
    limits = Limits(
        vocabulary=vocabulary,
        max_length=min(settings.max_length, settings.capacities[-1]),
        default_max_tokens=settings.default_max_tokens,
        end_ids=settings.end_ids,
        decoder_start_id=settings.decoder_start_id,
    )
    start = settings.decoder_start_id
    if start is not None and not 0 <= start < vocabulary:
        raise BadEnvironment(f"outputs start with token {start}; token ids of this model are 0 to {vocabulary - 1}")
    if settings.end_ids and not limits.possible_end_ids:
        ids = ", ".join(map(str, settings.end_ids))
        raise BadEnvironment(
            f"outputs end with token {ids}, and token ids of this model are 0 to {vocabulary - 1}: none would end; set "
            "eos_token_id in the checkpoint's generation_config.json and build again"
        )
    return limits


def open_executor(
    settings: GeneratorModelSettings, files: Mapping[str, Path], device: int = 0, hosts: Hosts | None = None
) -> StepExecutor:
    """`files` by the keys of `settings.files`. Raises as `open_engine`."""
    if hosts is not None and not {"ranks", "engines"} & files.keys():
        hosts.require(ranks=1)
    threads = settings.cores
    rows = settings.slots + settings.kept
    if settings.executor == "onnxruntime":
        return OnnxRuntimeStepExecutor(
            files["decoder"],
            settings.capacities,
            rows,
            encoder=files.get("encoder"),
            threads=threads,
            spinning=settings.spinning,
        )
    if settings.executor == "openvino":
        from runtime.generation.executor.openvino import OpenVinoStepExecutor

        return OpenVinoStepExecutor(files["decoder"], settings.capacities, rows, threads=threads)
    if settings.executor == "ranks":
        from runtime.generation.executor.rank_processes import RankStepExecutor

        cache = settings.rank_cache
        if cache is None:
            raise BadEnvironment("settings.json has no rank_cache; run `trireme build` again")
        shape = CacheShape(cache.heads, cache.head_dim, cache.dtype)
        return RankStepExecutor(
            files["ranks"],
            settings.capacities,
            rows,
            shape=shape,
            vocabulary=cache.vocabulary,
            threads=threads,
            hosts=hosts,
        )
    if "engines" in files:
        from runtime.tensorrt.rank_executor import TensorRtRankExecutor

        return TensorRtRankExecutor(files["engines"], settings.capacities, rows, device=device, hosts=hosts)
    from runtime.tensorrt.executor import TensorRtStepExecutor

    return TensorRtStepExecutor(files, settings.capacities, rows, flavour=settings.executor, device=device)
