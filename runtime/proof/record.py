"""What a published version carries to prove itself where it serves: inputs, the fp32 reference's outputs, the budget.

It lies as `proof.json` in the version directory of the model that clients ask (the ensemble, or the generator), and the
server's settings hold its digest, so it travels with the version and a torn or foreign one is noticed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from runtime.errors import BadEnvironment
from runtime.proof.judging import EncoderBudget, Figure, encoder_figures, generator_figures
from runtime.settings import ServerSettings, Settings

PROOF_FILE = "proof.json"


class _Record(Settings):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EncoderProof(_Record):
    """`texts[i]` has a string for each of `inputs` (two for rerankers), `reference[i]` is the row of `output`.

    `rows_per_request` is what the model's batch size allows.
    """

    kind: Literal["encoder"] = "encoder"
    inputs: tuple[str, ...]
    output: str
    by_label: bool
    texts: tuple[tuple[str, ...], ...]
    reference: tuple[tuple[float, ...], ...]
    rows_per_request: int
    min_mean_cosine: float
    min_worst_cosine: float
    max_logit_error: float | None = None

    def judge(self, outputs: NDArray[np.float32]) -> tuple[Figure, ...]:
        """`outputs` [texts, width], in the order of `texts`."""
        budget = EncoderBudget(self.min_mean_cosine, self.min_worst_cosine, self.by_label, self.max_logit_error)
        return encoder_figures(np.array(self.reference, np.float32), outputs, budget)


class ProofRow(_Record):
    """A prompt, tokens that follow it, and the reference's log-probability of each of these, given those before."""

    prompt: str
    output: tuple[int, ...]
    logprobs: tuple[float, ...]


class GeneratorProof(_Record):
    """`at_once`: rows that may wait in the model's queue together."""

    kind: Literal["generator"] = "generator"
    rows: tuple[ProofRow, ...]
    at_once: int
    max_perplexity_ratio: float

    def judge(self, logprobs: list[list[float]]) -> tuple[Figure, ...]:
        """`logprobs` of each row's output, in the order of `rows`."""
        found = [value for row in logprobs for value in row]
        return generator_figures([v for row in self.rows for v in row.logprobs], found, self.max_perplexity_ratio)


Proof = EncoderProof | GeneratorProof
_READER: TypeAdapter[Proof] = TypeAdapter(Annotated[Proof, Field(discriminator="kind")])


def require_proof(settings: ServerSettings) -> str:
    """The digest of the version's proof. Raises BadEnvironment for a version of a release that made none."""
    if settings.proof_digest is None:
        raise BadEnvironment(
            f"version {settings.version} of {settings.ensemble} carries no proof: an earlier release published it; "
            "run `trireme build` again"
        )
    return settings.proof_digest


def load_proof(repository: Path, settings: ServerSettings) -> Proof:
    """The proof of the version that `settings` name. Raises BadEnvironment where it is missing, torn or another's."""
    wanted = require_proof(settings)
    path = repository / settings.ensemble / str(settings.version) / PROOF_FILE
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadEnvironment(f"{path}: {error.strerror}; run `trireme build` again") from error
    digest = hashlib.sha256(text).hexdigest()
    if digest != wanted:
        raise BadEnvironment(
            f"{path}: digest {digest[:12]}, and {wanted[:12]} was published with version {settings.version}; "
            "run `trireme build` again"
        )
    try:
        return _READER.validate_json(text)
    except ValidationError as error:
        raise BadEnvironment(f"{path}: not a proof of this release; run `trireme build` again ({error})") from error
