"""A checkpoint's weights as a model of transformers: all of them, no random ones, and none left over."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builders.artifacts import Checkpoint
from builders.checkpoint import codebooks, widths
from builders.checkpoint.weights import CODEBOOKS
from builders.errors import CheckpointError, TriremeError, UnsupportedError
from builders.export.lora import provided, with_adapter

# Weights that a file may hold although the task does not use them, and why that is right.
_UNUSED = {
    "embedding": (
        (r"(^|\.)pooler\.", "an embedding pools the tokens' states itself"),
        (r"^(cls|lm_head|vocab_transform|vocab_layer_norm|vocab_projector|generator_predictions|generator_lm_head"
         r"|discriminator_predictions|pre_classifier|classifier|qa_outputs)\.", "the head of another task"),
    ),
    "classification": (
        (r"(^|\.)pooler\.", "a head that takes the first token's state itself, such as RoBERTa's"),
        (r"^(cls|lm_head|vocab_transform|vocab_layer_norm|vocab_projector|generator_predictions|generator_lm_head"
         r"|discriminator_predictions|qa_outputs)\.", "the head of another task"),
    ),
    "generation": ((r"^(v_head|score)\.", "a head of training that scores whole answers"),),
    "seq2seq": (),
}  # fmt: skip
_BUFFERS = r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias)$"  # constants, which older releases saved


def load_encoder(checkpoint: Checkpoint) -> Any:
    """The transformers model in fp32 and in evaluation mode. Raises as `load_weights`."""
    import transformers

    if checkpoint.task == "embedding":  # never uses the pooler
        return _load(transformers.AutoModel, checkpoint, absent=r"^pooler\.")
    return _load(transformers.AutoModelForSequenceClassification, checkpoint)


def load_weights(checkpoint: Checkpoint) -> Any:
    """The same of a language model, eager.

    Raises CheckpointError when a weight is absent, of another shape, not a number or not part of the model, or when
    this transformers does not know the architecture.
    """
    import transformers

    both = checkpoint.task == "seq2seq"
    loader = transformers.AutoModelForSeq2SeqLM if both else transformers.AutoModelForCausalLM
    return _load(loader, checkpoint, attn_implementation="eager")


def _load(loader: Any, checkpoint: Checkpoint, absent: str = r"^$", **options: str) -> Any:
    """`absent`: weights that the task does without."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with _base_files(checkpoint) as folder:
        try:
            if (folder / widths.FILE).is_file():
                model, info = _of_own_widths(loader, folder, **options)
            else:
                model, info = loader.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    output_loading_info=True,
                    local_files_only=True,
                    ignore_mismatched_sizes=True,  # reported below, in our words
                    **options,
                )
        except TriremeError:
            raise
        except Exception as error:  # whatever a model's own constructor makes of a config.json that is not its own
            raise CheckpointError(
                f"weights of {checkpoint.source}", got=f"{type(error).__name__}: {_first_line(error)}",
                expected=f"a model that transformers {transformers.__version__} knows without code from outside",
                fix="use a model type of this release, with the config.json and weights that belong together",
            ) from error  # fmt: skip
    known = re.compile("|".join((absent, *provided(checkpoint))))
    missing = sorted(key for key in map(str, info["missing_keys"]) if not known.search(key))
    _require_all(checkpoint, model, missing, sorted(str(key[0]) for key in info["mismatched_keys"]))
    _require_used(checkpoint, model, map(str, info["unexpected_keys"]))
    model = with_adapter(model, checkpoint)
    _require_finite(checkpoint, model)
    return model.eval()


def _of_own_widths(loader: Any, folder: Path, **options: str) -> tuple[Any, dict[str, Any]]:
    """A checkpoint whose layers are as `widths.json` says, and what `from_pretrained` would report of it."""
    import torch
    import transformers
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    model = loader.from_config(config, dtype=torch.float32, **options)
    found = widths.read_widths(folder, config.to_dict(), [folder / "model.safetensors"])
    assert found is not None
    widths.reshape(model, found)
    state, wanted = load_file(folder / "model.safetensors"), model.state_dict()
    wrong = [
        (name, value.shape) for name, value in state.items() if name in wanted and value.shape != wanted[name].shape
    ]
    fit = {name: value.float() for name, value in state.items() if name in wanted and value.shape == wanted[name].shape}
    model.load_state_dict(fit, strict=False)
    unexpected = [name for name in state if name not in wanted]
    tied = set(model.all_tied_weights_keys or ())  # one tensor with another that is there
    return model, {
        "missing_keys": [name for name in wanted if name not in state and name not in tied],
        "mismatched_keys": wrong,
        "unexpected_keys": unexpected,
    }


@contextmanager
def _base_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The recorded files and no others: what is loaded is what was hashed, and transformers, which would put an adapter
    on the model by itself and leave it unmerged, sees none. Codebooks are expanded."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="trireme-") as folder:
        for record in checkpoint.files:
            source, target = checkpoint.path(record.name), Path(folder) / record.name
            if source.is_file() and not source.name.startswith("adapter_"):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source.resolve())
        if (Path(folder) / CODEBOOKS).is_file():
            save_file(codebooks.expanded(Path(folder)), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        yield Path(folder)


def _require_all(checkpoint: Checkpoint, model: Any, missing: list[str], mismatched: list[str]) -> None:
    if missing or mismatched:
        raise CheckpointError(
            f"weights of {checkpoint.source} for task {checkpoint.task}",
            got=f"{len(missing)} missing, {len(mismatched)} of another shape "
            f"({', '.join([*missing, *mismatched][:4])})",
            expected=f"every weight of {type(model).__name__}, as config.json describes it",
            fix="choose the task that the checkpoint was trained for, and its own config.json",
        )


def _require_used(checkpoint: Checkpoint, model: Any, unexpected: Iterable[str]) -> None:
    task = "classification" if checkpoint.task == "reranking" else checkpoint.task
    known = re.compile("|".join((_BUFFERS, *(pattern for pattern, _ in _UNUSED[task]))))
    left = sorted(key for key in unexpected if not known.search(key))
    if left:
        raise CheckpointError(
            f"weights of {checkpoint.source} for task {checkpoint.task}",
            got=f"{len(left)} that {type(model).__name__} does not have ({', '.join(left[:4])})",
            expected="weights that are all part of the model: without them it would compute something else",
            fix="use the config.json that the weights were saved with, or a model type that has them",
        )


def _require_finite(checkpoint: Checkpoint, model: Any) -> None:
    import torch

    wrong = next((name for name, value in model.named_parameters() if not torch.isfinite(value).all()), None)
    if wrong is not None:
        value = dict(model.named_parameters())[wrong].detach()
        raise CheckpointError(
            f"weights of {checkpoint.source}: {wrong}",
            got=f"{int(torch.isnan(value).sum())} NaN and {int(torch.isinf(value).sum())} infinite values",
            expected="numbers",
            fix="copy the weights again, or take a checkpoint from before the training broke",
        )


def require_sound(outputs: Any, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError when the eager model's own outputs [texts or tokens, ...] cannot be compared with."""
    import numpy as np

    fault = None
    if not np.isfinite(outputs).all():
        fault = "NaN or infinite outputs"
    elif not np.abs(outputs).max() > 0:
        fault = "outputs that are all zero"
    if fault:
        raise CheckpointError(
            f"weights of {checkpoint.source}", got=f"{fault} of the eager model itself, in fp32",
            expected="numbers that tell texts apart",
            fix="run the checkpoint with transformers: its weights are damaged, or its config.json is another's",
        )  # fmt: skip


def require_interface(model: Any, checkpoint: Checkpoint) -> None:
    """Raises UnsupportedError for a model whose attention cannot be exchanged."""
    if not model._supports_attention_backend:
        raise UnsupportedError(
            f"attention of {checkpoint.source} ({checkpoint.model_type})", got="code of its own",
            expected="transformers' attention interface", fix="use one of a newer kind: llama, qwen, mistral, gemma",
        )  # fmt: skip


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
