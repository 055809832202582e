"""All of it, to one Hugging Face folder."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.artifacts import file_digest
from builders.errors import InputError
from builders.judging import corpus
from builders.store.atomic import atomic_directory
from builders.training import curve, language, text
from builders.training.arithmetic import arithmetic, reproducible
from builders.training.recipe import TrainingProgress, TrainingRecipe, TrainingReport
from measure.small_model import judging

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def train_small_model(
    out: Path, report: Callable[[TrainingProgress], None] = lambda progress: None, recipe: TrainingRecipe | None = None
) -> TrainingReport:
    """Trains a Llama-shaped model and its tokenizer on Python's own text, and writes both to the new folder `out`.

    Without a recipe: the default one, shorter on a CPU without bf16. `out` holds what AutoModelForCausalLM and
    AutoTokenizer load, and beside it `training.json` (the report) and `training.html` (the loss curve). It appears
    whole or not at all. Raises InputError when it is there already, or when the split leaves too little text for one
    step.
    """
    import torch

    recipe = language.recipe_here() if recipe is None else recipe
    if out.exists():
        raise InputError(
            f"folder {out}",
            got="something that is there already",
            expected="a new folder",
            fix="remove it, or name another",
        )
    wall, cpu = time.monotonic(), time.process_time()
    learnt, held_out = text.split(corpus.documents(), recipe.held_out_share)
    tokenizer = text.train_tokenizer(learnt, recipe.vocabulary)
    stream, judged_stream = text.to_tokens(tokenizer, learnt), text.to_tokens(tokenizer, held_out)
    _require_text(stream, recipe.tokens_per_step + recipe.context, "to learn from")
    _require_text(judged_stream, language.CURVE_WINDOWS * recipe.context + recipe.context, "held out")
    with atomic_directory(out) as work, reproducible(recipe.seed):
        model = language.new_model(recipe)
        points = language.train(model, stream, judged_stream, recipe, report)
        model.eval()
        save_folder(model, tokenizer, recipe.context, work)
        found = TrainingReport(
            recipe=recipe,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            arithmetic=arithmetic(),
            documents=len(learnt),
            train_tokens=len(stream),
            epochs=recipe.steps * recipe.tokens_per_step / len(stream),
            curve=points,
            held_out=judging.judge(model, tokenizer, held_out, recipe.context),
            samples=judging.samples(model, tokenizer, recipe.seed),
            weights_sha256=file_digest(work / "model.safetensors"),
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=metadata.version("torch"),
            elapsed_s=round(time.monotonic() - wall, 1),
            cpu_s=round(time.process_time() - cpu, 1),
        )
        (work / "training.json").write_text(found.model_dump_json(indent=2) + "\n")
        (work / "training.html").write_text(curve.page(found))
    return found


def held_out_rows(folder: Path, wanted: Callable[[corpus.Document], bool] = lambda document: True) -> text.TokenIds:
    """The text that the model in `folder` never saw, as token ids [rows, context + 1]; each row stands alone. Of the
    documents that are `wanted`.

    The last token of a row is the first of the next, so that every token but the very first is judged once. What does
    not fill a row is left out.
    """
    from tokenizers import Tokenizer

    recipe = TrainingReport.model_validate_json((folder / "training.json").read_text()).recipe
    documents = [each for each in text.split(corpus.documents(), recipe.held_out_share)[1] if wanted(each)]
    stream = text.to_tokens(Tokenizer.from_file(str(folder / "tokenizer.json")), documents)
    return text.windows(stream, recipe.context)


def save_folder(model: Any, tokenizer: Tokenizer, context: int, folder: Path) -> None:
    """As transformers' own `save_pretrained` writes it: configuration, safetensors and a fast tokenizer."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    model.generation_config = GenerationConfig(bos_token_id=text.END_OF_TEXT_ID, eos_token_id=text.END_OF_TEXT_ID)
    with _no_progress_bars():
        model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written as 0600, and a server may run as another user
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=text.END_OF_TEXT,
        eos_token=text.END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without transformers' own bar for a file that takes a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _require_text(stream: text.TokenIds, least: int, use: str) -> None:
    if len(stream) <= least:
        raise InputError(
            f"Python's text {use}",
            got=f"{len(stream)} tokens",
            expected=f"more than {least}",
            fix="lower context or tokens_per_step, or change held_out_share",
        )
