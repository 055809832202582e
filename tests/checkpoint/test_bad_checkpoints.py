"""Checkpoints that would compute something else than they say: each is refused by name, and nothing is left behind."""

# ruff: noqa: E501 - rows of tables

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.checkpoint import load_checkpoint
from builders.errors import InputError
from builders.export.tokenizer import require_tokenizer
from builders.pipeline import one_file
from builders.spec import ModelSlice
from tests.generators import POSITIONS, save_generator

Edit = Callable[[Path], object]
Table = dict[str, tuple[str, str, Edit, str]]


@pytest.fixture(scope="module")
def sources(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: save_generator(tmp_path_factory.mktemp(kind) / kind, kind) for kind in ("llama", "t5")}
    return {"bert": tiny_bert, **made}


def _json(name: str, **changes: object) -> Edit:
    """`changes` laid over the file, which may not exist yet."""

    def edit(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **changes}))

    return edit


def _modules(*kinds: str) -> Edit:
    def edit(folder: Path) -> None:
        lines = [
            {"idx": at, "name": str(at), "path": f"{at}_{kind.rsplit('.', 1)[-1]}" if at else "", "type": kind}
            for at, kind in enumerate(
                f"sentence_transformers.models.{kind}" if "." not in kind else kind for kind in kinds
            )
        ]
        (folder / "modules.json").write_text(json.dumps(lines))

    return edit


def _all(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def _weights(change: Callable[[dict[str, Any]], object], file: str = "model.safetensors") -> Edit:
    def edit(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / file) if (folder / file).is_file() else {}
        change(tensors)
        (folder / file).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return edit


def _add_token(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 400, "content": "zebra"})
    (folder / "tokenizer.json").write_text(json.dumps(data))


def _template_id(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [401]
    (folder / "tokenizer.json").write_text(json.dumps(data))


def _sentencepiece_only(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "sentencepiece.bpe.model")


def _poison(tensors: dict[str, Any]) -> None:
    tensors["encoder.layer.1.output.dense.weight"][3, 2] = np.nan


def _silence(tensors: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"][:] = 0  # tied: every logit is 0


DENSE = {
    "in_features": 32,
    "out_features": 16,
    "bias": False,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
POOLED = ("Transformer", "Pooling")
# folder, task, what is wrong with it, and what the message says of: what | got | expected | fix
LOADED: Table = {
    "foreign code": ("bert", "embedding", _json("config.json", auto_map={"AutoModel": "x.Y"}),
                     "config.json: auto_map | for AutoModel | without code | remove auto_map"),
    "foreign tokenizer": ("bert", "embedding", _json("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
                          "tokenizer_config.json: auto_map | AutoTokenizer | without code | without it"),
    "bitsandbytes": ("bert", "embedding", _json("config.json", quantization_config={"load_in_4bit": True}),
                     "quantization_config | load_in_4bit | fp32, fp16 or bf16 | choose precision"),
    "gptq": ("llama", "generation", _json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
             "quantization_config | gptq | fp32 | that was quantised"),
    "awq": ("llama", "generation", _json("config.json", quantization_config={"quant_method": "awq"}), "quant | awq | | "),
    "relative positions": ("bert", "embedding", _json("config.json", position_embedding_type="relative_key_query"),
                           "position_embedding_type | relative_key_query | absolute | absolute"),
    "no padding id": ("bert", "embedding", _json("config.json", model_type="roberta", pad_token_id=None),
                      "pad_token_id | null | start after it | set the padding id"),
    "padding beyond the table": ("bert", "embedding", _json("config.json", pad_token_id=400),
                                 "pad_token_id | 400 | from 0 to 399 | right id"),
    "added token beyond the table": ("bert", "embedding", _add_token,
                                     "tokenizer.json | id 400 ('zebra') | under 400 | resize_token_embeddings"),
    "template beyond the table": ("bert", "reranking", _template_id, "tokenizer.json | id 401 | under 400 | copy"),
    "token of a decoder": ("llama", "generation", _add_token, "tokenizer.json | 'zebra' | under 400 | copy"),
    "token of an encoder-decoder": ("t5", "seq2seq", _add_token, "tokenizer.json | 'zebra' | under 400 | copy"),
    "end beyond the table": ("llama", "generation", _json("generation_config.json", eos_token_id=[3, 400]),
                             "eos_token_id | 400 | from 0 to 399 | right id"),
    "begin beyond the table": ("llama", "generation", _json("generation_config.json", bos_token_id=-1),
                               "bos_token_id | -1 | from 0 to 399 | right id"),
    "pad of a decoder": ("llama", "generation", _json("generation_config.json", pad_token_id=401), "pad_token_id|401||"),
    "start beyond the table": ("t5", "seq2seq", _all(_json("config.json", decoder_start_token_id=999),
                               _json("generation_config.json", decoder_start_token_id=999)),
                               "decoder_start_token_id | 999 | from 0 to 399 | right id"),
    "no start": ("t5", "seq2seq", _all(*(_json(name, decoder_start_token_id=None, bos_token_id=None)
                                         for name in ("config.json", "generation_config.json"))),
                 "decoder_start_token_id | null | begins with | set it"),
    "forced tokens": ("llama", "generation", _json("generation_config.json", suppress_tokens=[5]),
                      "suppress_tokens | [5] | follows the model | remove the key"),
    "experts": ("llama", "generation", _json("config.json", model_type="mixtral", num_local_experts=8),
                "mixtral | a mixture of experts | dense | dense model"),
    "experts with sinks": ("llama", "generation", _json("config.json", model_type="gpt_oss", num_local_experts=32),
                           "gpt_oss | a mixture of experts | dense | "),
    "latent attention": ("llama", "generation", _json("config.json", model_type="deepseek_v3", kv_lora_rank=512,
                         n_routed_experts=256), "deepseek_v3 | multi-head latent attention | each head | dense model"),
    "sentencepiece alone": ("bert", "embedding", _sentencepiece_only,
                            "checkpoint | no tokenizer.json | tokenizer.json | one of sentencepiece.bpe.model: python -c"),
    "tokenizer damaged": ("bert", "embedding", lambda folder: (folder / "tokenizer.json").write_text("{}"),
                          "tokenizer.json | | tokenizers library | copy the file again"),
    "two poolings": ("bert", "embedding", _json("1_Pooling/config.json", pooling_mode=["cls", "mean"]),
                     "pooling | cls + mean | one of mean | model.pooling"),
    "prompts left out of the pooling": ("bert", "embedding", _all(
        _json("1_Pooling/config.json", pooling_mode="mean", include_prompt=False),
        _json("config_sentence_transformers.json", prompts={"query": "q: "})), "include_prompt | false | pooled | "),
    "texts cut earlier": ("bert", "embedding", _all(_json("1_Pooling/config.json", pooling_mode="mean"),
                          _json("sentence_bert_config.json", max_seq_length=32)),
                          "max_length | 64 | at most 32 | set model.max_length: 32"),
    "tokenizer cuts earlier": ("bert", "classification", _json("tokenizer_config.json", model_max_length=48),
                               "max_length | 64 | at most 48, | raise the limit"),
    "settings of a transformer": ("bert", "embedding", _json("sentence_bert_config.json", query_length=32),
                                  "query_length | 32 | no settings | remove the key"),
    "another width": ("bert", "embedding", _json("1_Pooling/config.json", pooling_mode="mean", embedding_dimension=64),
                      "embedding dimension | 64 | 32 | copy"),
    "sparse vectors": ("bert", "embedding", _json("config_sentence_transformers.json", model_type="SparseEncoder"),
                       "config_sentence | SparseEncoder | a SentenceTransformer | dense"),
    "module code": ("bert", "embedding", _modules(*POOLED, "my_module.Extra"),
                    "modules.json | my_module.Extra | Transformer, Pooling, Dense | without it"),
    "pooled classifier": ("bert", "classification", _modules(*POOLED), "modules.json | Pooling | head | embedding"),
    "transformer elsewhere": ("bert", "embedding", lambda folder: (folder / "modules.json").write_text(json.dumps([
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}])),
        "modules.json | 0_Transformer | beside | move"),
    "dense of another width": ("bert", "embedding", _all(
        _modules(*POOLED, "Dense"), _json("1_Pooling/config.json", pooling_mode="mean"), _json("2_Dense/config.json", **DENSE),
        _weights(lambda w: w.update({"linear.weight": np.zeros((16, 31), np.float32)}), "2_Dense/model.safetensors")),
        "2_Dense | linear.weight [16, 31] | linear.weight [16, 32] | copy 2_Dense again"),
    "dense with an unknown activation": ("bert", "embedding", _all(
        _modules(*POOLED, "Dense"), _json("1_Pooling/config.json", pooling_mode="mean"),
        _json("2_Dense/config.json", **{**DENSE, "activation_function": "my.Swish"}),
        _weights(lambda w: w.update({"linear.weight": np.zeros((16, 32), np.float32)}), "2_Dense/model.safetensors")),
        "Dense | my.Swish | Tanh | another"),
    "prompt tuning": ("bert", "embedding", _json("adapter_config.json", peft_type="PROMPT_TUNING"),
                      "adapter_config.json: peft_type | PROMPT_TUNING | LORA | merge_and_unload"),
    "adapter without weights": ("bert", "embedding", _json("adapter_config.json", peft_type="LORA"),
                                "checkpoint | no adapter_model.safetensors | a file | copy the whole folder"),
    "adapter alone": ("bert", "embedding", lambda folder: [
        _json("adapter_config.json", peft_type="LORA", base_model_name_or_path="./gone")(folder),
        (folder / "config.json").unlink()], "base_model_name_or_path | './gone' (no such folder) | base model | path"),
    **{f"module {kind}": ("bert", "embedding", _modules("Transformer", kind), f"modules.json | {kind} | only | others")
       for kind in ("WeightedLayerPooling", "CNN", "LSTM", "WordWeights", "Router", "Asym", "SpladePooling")},
    **{f"input module {kind}": ("bert", "embedding", _modules(kind, "Pooling"), f"modules.json | {kind} | only | others")
       for kind in ("BoW", "StaticEmbedding", "CLIPModel", "WordEmbeddings")},
}  # fmt: skip
# The same where weights must be loaded to know it.
EXPORTED: Table = {
    "weights left over": ("bert", "embedding", _weights(lambda w: w.update(
        {"encoder.layer.0.attention.self.distance_embedding.weight": np.ones((159, 8), np.float32)})),
        "weights of | 1 that BertModel does not have (encoder.layer.0.attention.self.distance | all part | config.json"),
    "weights that are not numbers": ("bert", "embedding", _weights(_poison),
                                     "encoder.layer.1.output.dense.weight | 1 NaN and 0 infinite | numbers | copy"),
    "a dead model": ("llama", "generation", _weights(_silence), "weights of | all zero | tell texts apart | damaged"),
    "a token that was added later": ("bert", "embedding", _all(
        _json("added_tokens.json", zebra=399), _json("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
              added_tokens_decoder={"399": {"content": "zebra", "special": False}})),
        "tokenizer.json | 'zebra' | 400, as | save_pretrained"),
    "texts cut at their beginning": ("bert", "embedding", _json(
        "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", truncation_side="left"),
        "tokenizer.json | cut to 12 tokens | AutoTokenizer | "),
    "a tokenizer of another class": ("bert", "embedding", _json("tokenizer_config.json", tokenizer_class="BertTokenizer",
                                     do_lower_case=True), "tokenizer | | AutoTokenizer | "),
    "an adapter of another model": ("bert", "embedding", _all(
        _json("adapter_config.json", peft_type="LORA", r=2, target_modules=["query"]),
        _weights(lambda w: w.update({"base_model.model.x.lora_A.weight": np.ones((2, 32), np.float32)}),
                 "adapter_model.safetensors")), "adapter | unknown | BertModel | trained on"),
}  # fmt: skip


def _model(folder: Path, task: str) -> ModelSlice:
    pooling = "mean" if task == "embedding" and not (folder / "1_Pooling").is_dir() else None
    return ModelSlice.model_validate({"source": str(folder), "task": task, "max_length": 64, "pooling": pooling})


def _refused(refused: Callable[[ModelSlice], object], folder: Path, task: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        refused(_model(folder, task))
    assert caught.value.exit_code == 2
    parts = (caught.value.what, str(caught.value.got), caught.value.expected, caught.value.fix)
    for part, wanted in zip(parts, said.split("|"), strict=True):
        assert wanted.strip() in part, str(caught.value)
        assert part


@pytest.mark.parametrize("name", LOADED)
def test_the_files_alone_tell(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, task, edit, said = LOADED[name]
    folder = Path(shutil.copytree(sources[source], tmp_path / "checkpoint"))
    edit(folder)
    _refused(load_checkpoint, folder, task, said)


@pytest.mark.parametrize("name", EXPORTED)
def test_the_weights_tell(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, task, edit, said = EXPORTED[name]
    folder = Path(shutil.copytree(sources[source], tmp_path / "checkpoint"))
    edit(folder)
    (tmp_path / "out").mkdir()
    _refused(lambda model: one_file.export(model, "fp32", tmp_path / "out" / "graph.onnx"), folder, task, said)
    assert not list((tmp_path / "out").iterdir())


def test_the_models_that_the_table_breaks_are_sound(sources: dict[str, Path]) -> None:
    for source, task in (("bert", "embedding"), ("llama", "generation"), ("t5", "seq2seq")):
        assert load_checkpoint(_model(sources[source], task)).max_length == 64 <= POSITIONS


def test_the_advised_mend_of_a_folder_with_sentencepiece_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    """The command in the message works here: sentencepiece is installed with the rest."""
    import sentencepiece
    import transformers

    from builders.judging import corpus

    folder = Path(shutil.copytree(sources["t5"], tmp_path / "checkpoint"))
    (folder / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.texts(None, 200)), model_prefix=str(folder / "spiece"), vocab_size=260,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"one of spiece\.model: python -c .*AutoTokenizer.*save_pretrained"):
        load_checkpoint(_model(folder, "seq2seq"))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    checkpoint = load_checkpoint(_model(folder, "seq2seq"))
    require_tokenizer(checkpoint, corpus.texts(None, 16))
