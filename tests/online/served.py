"""A model of a few lines in a repository of ours, in several versions: no weights, so a server starts soon."""

from __future__ import annotations

import hashlib
from pathlib import Path

from runtime.proof.record import PROOF_FILE, EncoderProof
from runtime.settings import ServerSettings

SECRET = "a-secret-of-this-test"
TEXTS = tuple((f"text {number}",) for number in range(8))
_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        texts = [row[0] for row in pb_utils.get_input_tensor_by_name(request, "text").as_numpy()]
        vectors = np.array([[len(text), sum(text) % 97, 1] for text in texts], np.float32)
        {change}
        count = np.full((len(texts), 1), 1, np.int32)
        made = {"embedding": vectors, "token_count": count, "truncated": count > 1}.items()
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in made])
"""
_CONFIG = """name: "tiny"
backend: "python"
max_batch_size: 8
input { name: "text" data_type: TYPE_STRING dims: 1 }
output { name: "embedding" data_type: TYPE_FP32 dims: 3 }
output { name: "token_count" data_type: TYPE_INT32 dims: 1 }
output { name: "truncated" data_type: TYPE_BOOL dims: 1 }
instance_group { count: 1 kind: KIND_CPU }
"""
SOUND = "pass"
WRONG = "vectors[:, 0] = -vectors[:, 0]"
BROKEN = "raise RuntimeError('no such weight')"
FAILS_LATER = "\n        if any(text.startswith(b'asked') for text in texts): raise RuntimeError('a text of clients')"


def add_version(repository: Path, version: int, change: str = SOUND) -> ServerSettings:
    """As a build publishes it: the newest is current."""
    folder = repository / "tiny" / str(version)
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(_MODEL.replace("{change}", change))
    rows = [(float(len(text)), float(sum(text.encode()) % 97), 1.0) for (text,) in TEXTS]
    proof = EncoderProof(
        inputs=("text",), output="embedding", by_label=False, texts=TEXTS, reference=tuple(rows), rows_per_request=4,
        min_mean_cosine=0.999, min_worst_cosine=0.999,
    )  # fmt: skip
    (folder / PROOF_FILE).write_text(proof.model_dump_json())
    (repository / "tiny" / "config.pbtxt").write_text(_CONFIG)
    digest = hashlib.sha256((folder / PROOF_FILE).read_bytes()).hexdigest()
    settings = ServerSettings(
        ensemble="tiny", models=("tiny",), version=version, response_cache_bytes=0, rate_limited=False,
        content_digest=str(version), proof_digest=digest,
    )  # fmt: skip
    settings.save(repository)
    return settings
