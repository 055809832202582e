"""A generator of random weights behind a real Triton, and a gateway before it: for every file that asks for text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer, processors

from builders import pipeline
from builders.pipeline import Build
from builders.spec import DeploymentSpec
from runtime.server.launch import TritonServer
from runtime.server.supervise import ready_server
from tests import generators
from tests.gateway.asking import gateway_ports
from tests.generation.setup import write_tokenizer

TEMPLATE = (
    "{# 世: more than ASCII #}{{ bos_token }}{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
)
LONGEST = 4096
CHANGES = {"max_position_embeddings": LONGEST, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A tiny model of random weights that goes on for long, with a chat template of its own; its tokens are bytes."""
    folder = tmp_path_factory.mktemp("chat")
    source = generators.save_generator(folder / "model", "llama", **CHANGES)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    fast = Tokenizer.from_file(str(write_tokenizer(source / "tokenizer.json")))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(source / "tokenizer.json"))
    spec = DeploymentSpec.model_validate(
        {
            "name": "tiny-lm",
            "model": {"source": str(source), "task": "generation", "max_length": LONGEST},
            "precision": {"cpu": "fp32", "calibration_samples": 32},
            "serving": {"queue_size": 2},
            "generation": {"slots": 2, "cache_lengths": [LONGEST]},
        }
    )
    return pipeline.build(spec, "cpu", folder / "build", "repository")


@pytest.fixture(scope="session")
def generator(llama: Build) -> Iterator[TritonServer]:
    assert llama.entry is not None
    with ready_server(llama.entry.repository) as running:
        yield running


@pytest.fixture(scope="session")
def text_ports(generator: TritonServer) -> Iterator[dict[str, int]]:
    options = ("--grpc-port", "0", "--repository", str(generator.repository), "--vllm-metrics")
    with gateway_ports("tiny-lm", generator.ports.http, generator.ports.metrics, *options) as found:
        yield found
