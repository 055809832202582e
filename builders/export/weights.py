"""Weights of a generative checkpoint, all of them and no random ones."""

from __future__ import annotations

from typing import Any

from builders.artifacts import Checkpoint
from builders.errors import CheckpointError


def load_weights(checkpoint: Checkpoint) -> Any:
    """The transformers model in fp32, eager and in evaluation mode.

    Raises CheckpointError when a weight is absent or of another shape, or when this transformers does not know the
    architecture.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    both = checkpoint.task == "seq2seq"
    loader = transformers.AutoModelForSeq2SeqLM if both else transformers.AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(
            checkpoint.directory,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, in our words
        )
    except (ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"weights of {checkpoint.source}", got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected=f"a model that transformers {transformers.__version__} knows without code from outside",
            fix="use a model type of this release",
        ) from error  # fmt: skip
    faults = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if faults:
        raise CheckpointError(
            f"weights of {checkpoint.source} for task {checkpoint.task}",
            got=f"{len(faults)} missing or of another shape ({', '.join(sorted(map(str, faults))[:4])})",
            expected=f"every weight of {type(model).__name__}, as config.json describes it",
            fix="choose the task that the checkpoint was trained for, and its own config.json",
        )
    return model.eval()
