"""Fixtures that more than one file needs: tiny random checkpoints, and the real MiniLM built once a session."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from builders import pipeline
from builders.judging import corpus
from builders.pipeline import Build
from builders.spec import DeploymentSpec, load_spec
from runtime.server.launch import TritonServer
from runtime.server.supervise import ready_server

# As `builders.__main__.run` sets it, before torch is loaded: two workers whose threads spin while they wait take each
# other's cores, and their tests several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# No test asserts a time: an example may wait for a busy machine.
settings.register_profile("trireme", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trireme")

HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

# At the end of the encoder's model.py: what a numpy 2 in the backend makes of every FP32 tensor.
ALL_ONES = """

_execute = TritonPythonModel.execute


def _ones(self, requests):
    made = [response.output_tensors()[0].as_numpy() for response in _execute(self, requests)]
    return [pb_utils.InferenceResponse([pb_utils.Tensor(self.output, values * 0 + 1)]) for values in made]


TritonPythonModel.execute = _ones
"""

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here: it renders manifests")


def save_tiny(folder: Path, model_type: str, task: str = "embedding", labels: int = 3, seed: int = 0) -> Path:
    """A random model of two layers with a trained tokenizer, as `save_pretrained` would leave it."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64} if model_type == "distilbert" else dict(HIDDEN)
    if model_type == "electra":
        sizes["embedding_size"] = 16
    config = transformers.AutoConfig.for_model(
        model_type, **sizes, vocab_size=400, max_position_embeddings=80, pad_token_id=1, num_labels=labels
    )
    maker = transformers.AutoModel if task == "embedding" else transformers.AutoModelForSequenceClassification
    model = maker.from_config(config)
    with torch.no_grad():  # the usual 0.02 would make every output alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.save_pretrained(folder)
    _save_tokenizer(folder, types=getattr(config, "type_vocab_size", 0) > 1)
    return folder


def _save_tokenizer(folder: Path, types: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(corpus.texts(None, 200), trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    second = 1 if types else 0
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def tiny_spec(source: Path, task: str = "embedding", **changes: dict[str, object]) -> DeploymentSpec:
    """A spec for a tiny model; `changes` are laid over its slices."""
    pooling = {"pooling": "mean", "normalize": True} if task == "embedding" else {}
    data: dict[str, dict[str, object]] = {
        "model": {"source": str(source), "task": task, "max_length": 64, **pooling},
        "precision": {"cpu": "fp32", "calibration_samples": 32},
        "engine": {"profiles": [{"batch": {"min": 1, "opt": 4, "max": 8}, "length": {"min": 1, "opt": 32, "max": 64}}]},
        "serving": {"max_batch_size": 8, "length_buckets": [16, 64]},
    }
    for name, values in changes.items():
        data[name] = {**data.get(name, {}), **values}
    return DeploymentSpec.model_validate({"name": "tiny", **data})


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Whether it came true within the limit."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A command that is run in this process sets one for SIGTERM, and ends with its process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoints") / "bert", "bert")


@pytest.fixture
def bert_copy(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    import shutil

    return Path(shutil.copytree(tiny_bert, tmp_path / "bert"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The preset with real weights; bf16, because the INT8 search takes half a minute and has its own test.

    Processes of one run share the build: the first makes it, the others find it made.
    """
    spec = load_spec("minilm")
    spec = spec.model_copy(update={"precision": spec.precision.model_copy(update={"cpu": "bf16"})})
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "minilm"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return pipeline.build(spec, "cpu", folder, "repository")


@pytest.fixture(scope="session")
def server(minilm: Build) -> Iterator[TritonServer]:
    """The real MiniLM behind a real Triton. Tests that end or damage a server start their own."""

    assert minilm.entry is not None
    with ready_server(minilm.entry.repository) as running:
        yield running


@pytest.fixture
def edit_json() -> Callable[[Path, dict[str, object]], None]:
    def edit(path: Path, changes: dict[str, object]) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit
