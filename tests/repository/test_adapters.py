"""LoRA adapters are merged into the weights that they were trained on: beside these, or in a folder of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.checkpoint import load_checkpoint
from builders.errors import CheckpointError
from builders.export.weights import load_encoder, load_weights
from builders.spec import ModelSlice
from tests.generators import eager_logits, save_generator

IDS = [5, 9, 30, 7, 11]


def _adapt(base: Path, out: Path, loader: str, **options: Any) -> Any:
    """Saves a random adapter of the model in `base`, as peft does, and returns the adapted model."""
    import peft
    import torch
    import transformers

    torch.manual_seed(1)
    model = getattr(transformers, loader).from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **options))
    adapted.save_pretrained(out)
    return adapted.eval()


def _model(folder: Path, task: str) -> ModelSlice:
    return ModelSlice.model_validate(
        {"source": str(folder), "task": task, "max_length": 64, "pooling": "mean" if task == "embedding" else None}
    )


def _hidden(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS]))[0].numpy()


@pytest.mark.parametrize("alone", [False, True])
def test_an_encoder_with_its_adapter(bert_copy: Path, tmp_path: Path, alone: bool) -> None:
    plain = _hidden(load_encoder(load_checkpoint(_model(bert_copy, "embedding"))))
    folder = tmp_path / "adapter" if alone else bert_copy
    adapted = _adapt(bert_copy, folder, "AutoModel", target_modules=["query", "value"])
    before = load_checkpoint(_model(folder, "embedding"))
    assert before.directory == bert_copy.resolve()
    merged = _hidden(load_encoder(before))
    assert np.abs(merged - _hidden(adapted)).max() < 1e-5
    assert np.abs(merged - plain).max() > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4}))
    assert load_checkpoint(_model(folder, "embedding")).digest != before.digest


def test_a_head_that_the_adapter_brings(bert_copy: Path, tmp_path: Path) -> None:
    """The base has no classifier; the adapter's is used, and without it the task is refused as before."""
    out, loader = tmp_path / "adapter", "AutoModelForSequenceClassification"
    lora = {"task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["classifier"]}
    adapted = _adapt(bert_copy, out, loader, **lora)
    found = load_encoder(load_checkpoint(_model(out, "classification")))
    import torch

    with torch.no_grad():
        same = adapted(input_ids=torch.tensor([IDS])).logits.numpy()
    assert np.abs(_hidden(found) - same).max() < 1e-5
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        load_encoder(load_checkpoint(_model(bert_copy, "classification")))


def test_a_language_model_with_its_adapter(tmp_path: Path) -> None:
    base = save_generator(tmp_path / "llama", "llama")
    plain = eager_logits(load_weights(load_checkpoint(_model(base, "generation"))), input_ids=IDS)
    adapted = _adapt(base, base, "AutoModelForCausalLM", task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    merged = eager_logits(load_weights(load_checkpoint(_model(base, "generation"))), input_ids=IDS)
    assert np.abs(merged - eager_logits(adapted, input_ids=IDS)).max() < 1e-4
    assert np.abs(merged - plain).max() > 1e-2


def test_a_tokenizer_of_its_own_is_refused(bert_copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    _adapt(bert_copy, out, "AutoModel", target_modules=["query"])
    shutil.copy(bert_copy / "tokenizer.json", out)
    assert load_checkpoint(_model(out, "embedding")).adapter == out.resolve()
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"a tokenizer\.json that differs"):
        load_checkpoint(_model(out, "embedding"))
