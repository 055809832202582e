"""Folders of sentence-transformers, old and new: what stands behind the encoder is part of the graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.checkpoint import load_checkpoint
from builders.export.encoder import export_encoder
from builders.export.sentence import pool
from builders.judging import corpus
from builders.judging.vectors import graph_outputs, sample_requests
from builders.spec import POOLINGS, ModelSlice

TEXTS = [*corpus.texts(None, 6), "short"]
TYPE = "sentence_transformers.base.modules"


def _write(folder: Path, name: str, data: object) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(data))


def _modules(folder: Path, *kinds: str) -> None:
    lines = [
        {"idx": at, "name": str(at), "path": f"{at}_{kind}" if at else "", "type": f"{TYPE}.{kind.lower()}.{kind}"}
        for at, kind in enumerate(kinds)
    ]
    _write(folder, "modules.json", lines)


def _model(folder: Path, **more: object) -> ModelSlice:
    return ModelSlice.model_validate({"source": str(folder), "task": "embedding", "max_length": 64, **more})


def _states(folder: Path, model: ModelSlice) -> list[Any]:
    """[length, 32] of each text, by transformers and without padding."""
    import torch
    import transformers

    encoder = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        return [
            encoder(**{name: torch.from_numpy(array) for name, array in feeds.items()}).last_hidden_state[0]
            for feeds in sample_requests(load_checkpoint(model), TEXTS)
        ]


def _exported(model: ModelSlice, out: Path) -> np.ndarray[Any, Any]:
    out.mkdir()
    checkpoint = load_checkpoint(model)
    graph = export_encoder(checkpoint, "fp32", TEXTS, out)
    assert graph.outputs[0].dims == ("batch", checkpoint.width)
    return graph_outputs(graph.file_path, sample_requests(checkpoint, TEXTS), checkpoint)


@pytest.mark.parametrize(
    ("declared", "mode"),
    [
        ({"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": ["lasttoken"]}, "lasttoken"),
        ({"word_embedding_dimension": 32, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "max"),
        ({"pooling_mode_cls_token": True, "pooling_mode": "weightedmean"}, "weightedmean"),  # the new key goes first
        ({"word_embedding_dimension": 32}, "mean"),
    ],
)
def test_both_spellings_of_pooling(bert_copy: Path, declared: dict[str, object], mode: str) -> None:
    _write(bert_copy, "1_Pooling/config.json", declared)
    assert load_checkpoint(_model(bert_copy)).pooling == mode


@pytest.mark.parametrize("mode", POOLINGS)
def test_every_pooling_sees_tokens_and_no_padding(mode: str) -> None:
    import torch

    def of_tokens(x: torch.Tensor) -> torch.Tensor:  # [length, width], as the papers write it
        place = torch.arange(1.0, len(x) + 1)[:, None]
        return {
            "cls": x[0], "lasttoken": x[-1], "max": x.amax(0), "mean": x.sum(0) / len(x),
            "mean_sqrt_len_tokens": x.sum(0) / len(x) ** 0.5, "weightedmean": (x * place).sum(0) / place.sum(),
        }[mode]  # fmt: skip

    hidden = torch.randn(3, 7, 5) - 3  # negative: a zero of the padding would win a maximum
    mask = (torch.arange(7)[None] < torch.tensor([7, 1, 4])[:, None]).long()
    expected = torch.stack([of_tokens(hidden[row, :count]) for row, count in enumerate((7, 1, 4))])
    assert torch.allclose(pool(hidden, mask, mode), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["lasttoken", "max"])
def test_poolings_in_a_graph(bert_copy: Path, tmp_path: Path, mode: str) -> None:
    _write(bert_copy, "1_Pooling/config.json", {"embedding_dimension": 32, "pooling_mode": mode})
    model = _model(bert_copy)
    states = _states(bert_copy, model)
    expected = np.stack([(each[-1] if mode == "lasttoken" else each.amax(0)).numpy() for each in states])
    assert np.abs(_exported(model, tmp_path / "out") - expected).max() < 1e-5


def test_several_modules_in_their_order(bert_copy: Path, tmp_path: Path) -> None:
    """Normalize before Dense is another function than after it."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    first, norm, second = torch.nn.Linear(32, 24), torch.nn.LayerNorm(24), torch.nn.Linear(24, 10, bias=False)
    torch.nn.init.normal_(norm.weight)
    _modules(bert_copy, "Transformer", "Pooling", "Normalize", "Dense", "Dropout", "LayerNorm", "Dense", "Normalize")
    _write(bert_copy, "1_Pooling/config.json", {"embedding_dimension": 32, "pooling_mode": "mean"})
    dense = {"in_features": 32, "out_features": 24, "bias": True}
    _write(bert_copy, "3_Dense/config.json", {**dense, "activation_function": "torch.nn.modules.activation.GELU"})
    _write(bert_copy, "5_LayerNorm/config.json", {"dimension": 24})
    _write(bert_copy, "6_Dense/config.json", {"in_features": 24, "out_features": 10, "bias": False})  # Tanh
    for name, prefix, module in (
        ("3_Dense", "linear", first),
        ("5_LayerNorm", "norm", norm),
        ("6_Dense", "linear", second),
    ):
        weights = {f"{prefix}.{key}": value for key, value in module.state_dict().items()}
        save_file(weights, bert_copy / name / "model.safetensors")
    model = _model(bert_copy)
    checkpoint = load_checkpoint(model)
    assert (checkpoint.width, checkpoint.normalize, len(checkpoint.head)) == (10, True, 5)
    assert load_checkpoint(_model(bert_copy, normalize=False)).normalize is False
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        means = unit(torch.stack([each.mean(0) for each in _states(bert_copy, model)]))
        inner = norm(torch.nn.functional.gelu(first(means)))
        expected = unit(torch.tanh(second(inner))).numpy()
    assert np.abs(_exported(model, tmp_path / "out") - expected).max() < 1e-5
    (bert_copy / "6_Dense" / "config.json").write_text('{"in_features": 24, "out_features": 10, "bias": false, "a": 1}')
    assert load_checkpoint(model).digest != checkpoint.digest


def test_a_head_in_fp16_and_served_width(bert_copy: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from builders.repository.encoder_config import EncoderInterface

    _modules(bert_copy, "Transformer", "Pooling", "Dense")
    _write(bert_copy, "1_Pooling/config.json", {"embedding_dimension": 32, "pooling_mode": "cls"})
    _write(bert_copy, "2_Dense/config.json", {"in_features": 32, "out_features": 16, "bias": False})
    save_file({"linear.weight": torch.randn(16, 32)}, bert_copy / "2_Dense" / "model.safetensors")
    checkpoint = load_checkpoint(_model(bert_copy))
    (tmp_path / "out").mkdir()
    graph = export_encoder(checkpoint, "fp16", TEXTS, tmp_path / "out")
    assert graph.quality.worst_cosine > 0.9999  # type: ignore[union-attr]
    assert EncoderInterface.of(checkpoint).width == 16


def test_an_older_head_is_a_pickle_that_must_be_asked_for(bert_copy: Path, tmp_path: Path) -> None:
    import torch

    from builders.errors import CheckpointError

    _modules(bert_copy, "Transformer", "Pooling", "Dense")
    _write(bert_copy, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    _write(bert_copy, "2_Dense/config.json", {"in_features": 32, "out_features": 4, "bias": False})
    weight = torch.randn(4, 32)
    torch.save({"linear.weight": weight}, bert_copy / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*allow_pickle: true"):
        load_checkpoint(_model(bert_copy))
    model = _model(bert_copy, allow_pickle=True)
    means = np.stack([each.mean(0).numpy() for each in _states(bert_copy, model)])
    assert np.abs(_exported(model, tmp_path / "out") - np.tanh(means @ weight.numpy().T)).max() < 1e-5


def test_the_packaged_minilm_says_the_same_in_the_new_files(
    tmp_path: Path, edit_json: Callable[[Path, dict[str, object]], None]
) -> None:
    import shutil

    from builders.checkpoint.source import locate

    folder = Path(
        shutil.copytree(locate(ModelSlice(source="packaged:all-MiniLM-L6-v2", task="embedding")), tmp_path / "m")
    )
    _modules(folder, "Transformer", "Pooling", "Normalize")
    _write(
        folder, "1_Pooling/config.json", {"embedding_dimension": 384, "pooling_mode": "mean", "include_prompt": True}
    )
    _write(folder, "sentence_bert_config.json", {
        "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}})  # fmt: skip
    _write(folder, "config_sentence_transformers.json", {
        "model_type": "SentenceTransformer", "prompts": {"query": "", "document": ""}, "default_prompt_name": None,
        "similarity_fn_name": "cosine"})  # fmt: skip
    found = load_checkpoint(_model(folder))
    assert (found.pooling, found.normalize, found.prompts, found.width) == ("mean", True, None, 384)
