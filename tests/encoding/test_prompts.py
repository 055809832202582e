"""Prompts of sentence-transformers: the default one is put before each text, a request may name another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import pipeline
from builders.checkpoint import load_checkpoint
from builders.errors import CheckpointError
from builders.judging.vectors import sample_requests, tokenizer_settings
from builders.spec import ModelSlice
from runtime.encoding.tokenizer import Tokenizer, read_prompt_name
from runtime.errors import BadRequest
from runtime.server.supervise import ready_server
from tests.conftest import tiny_spec

PROMPTS = {"prompts": {"query": "return the ", "passage": "", "document": "a class "}, "default_prompt_name": "query"}
TEXT = "value of a string"


@pytest.fixture
def prompted(bert_copy: Path) -> Path:
    (bert_copy / "config_sentence_transformers.json").write_text(json.dumps(PROMPTS))
    return bert_copy


def _model(folder: Path, **more: object) -> ModelSlice:
    base = {"source": str(folder), "task": "embedding", "max_length": 64, "pooling": "mean"}
    return ModelSlice.model_validate({**base, **more})


def _tokenizer(folder: Path, **more: object) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.json", tokenizer_settings(load_checkpoint(_model(folder, **more))))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text], prompts=[""])[0].ids


@pytest.mark.parametrize(
    ("name", "prompt"), [(None, "return the "), ("document", "a class "), ("passage", ""), ("", "")]
)
def test_the_spec_names_the_prompt_or_the_checkpoint_does(prompted: Path, name: str | None, prompt: str) -> None:
    tokenizer = _tokenizer(prompted, prompt_name=name)
    assert tokenizer.encode([TEXT])[0].ids == _ids(tokenizer, prompt + TEXT)


def test_checks_and_calibration_see_the_prompt(prompted: Path) -> None:
    feeds = sample_requests(load_checkpoint(_model(prompted)), [TEXT])[0]
    assert feeds["input_ids"][0].tolist() == _ids(_tokenizer(prompted), "return the " + TEXT)


def test_the_digest_follows_the_prompts(prompted: Path) -> None:
    before = load_checkpoint(_model(prompted)).digest
    (prompted / "config_sentence_transformers.json").write_text(json.dumps({**PROMPTS, "prompts": {"query": "b"}}))
    assert load_checkpoint(_model(prompted)).digest != before


def test_a_prompt_that_is_not_there(prompted: Path, edit_json: Callable[[Path, dict[str, object]], None]) -> None:
    with pytest.raises(CheckpointError, match=r"model.prompt_name: got 'other'; expected one of \['document'"):
        load_checkpoint(_model(prompted, prompt_name="other"))
    edit_json(prompted / "config_sentence_transformers.json", {"default_prompt_name": "gone"})
    with pytest.raises(CheckpointError, match="default_prompt_name: got 'gone'"):
        load_checkpoint(_model(prompted))
    with pytest.raises(BadRequest, match="prompt_name is 'other'; this model has document, passage, query"):
        _tokenizer(prompted, prompt_name="query").prompt("other")
    with pytest.raises(BadRequest, match="send the name of a prompt"):
        read_prompt_name('{"prompt_name": 3}')


def test_texts_are_lower_cased_where_the_checkpoint_says_so(bert_copy: Path) -> None:
    plain = _tokenizer(bert_copy)
    assert _ids(plain, "Return The VALUE") != _ids(plain, "return the value")
    (bert_copy / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": true}')
    lowered = _tokenizer(bert_copy)
    assert _ids(lowered, "Return The VALUE") == _ids(plain, "return the value")


def test_a_service_takes_the_prompt_of_each_request(prompted: Path, tmp_path: Path) -> None:
    built = pipeline.build(tiny_spec(prompted), "cpu", tmp_path / "build", "repository")
    assert built.entry is not None
    with ready_server(built.entry.repository) as server:
        import tritonclient.grpc as client

        def ask(text: str, **parameters: str) -> Any:
            given = client.InferInput("text", [1, 1], "BYTES")
            given.set_data_from_numpy(np.array([[text.encode()]], np.object_))
            with client.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}") as connection:
                return connection.infer("tiny", [given], parameters=parameters or None).as_numpy("embedding")[0]

        bare = ask(TEXT, prompt_name="passage")
        assert np.allclose(ask(TEXT), ask("return the " + TEXT, prompt_name="passage"), atol=1e-5)
        assert np.allclose(ask(TEXT, prompt_name="document"), ask("a class " + TEXT, prompt_name="passage"), atol=1e-5)
        assert not np.allclose(ask(TEXT), bare, atol=1e-3)
        with pytest.raises(client.InferenceServerException, match="this model has document, passage, query"):
            ask(TEXT, prompt_name="other")
