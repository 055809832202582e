"""What is trained, and what training has to tell."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, model_validator

from builders.errors import SpecError
from runtime.record import Record

SMALLEST_VOCABULARY = 257  # every byte, and the end of a text


class TrainingRecipe(Record):
    """Sizes, schedule and seed. The defaults take about three minutes on two idle cores with bf16 arithmetic.

    All widths divide by 4, so that the model can be sharded over 2 or 4 ranks, and by 32, the block of weight-only
    quantisation. Raises SpecError for sizes that make no Llama.
    """

    vocabulary: int = Field(default=4096, ge=SMALLEST_VOCABULARY)
    hidden: int = Field(default=256, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=8, ge=1)
    kv_heads: int = Field(default=4, ge=1)
    ffn: int = Field(default=768, ge=8)
    context: int = Field(default=512, ge=8)
    steps: int = Field(default=420, ge=1)
    tokens_per_step: int = Field(default=2048, ge=8)
    short_share: float = Field(default=0.8, ge=0, le=1)  # of the steps see half the context: attention costs less
    learning_rate: float = Field(default=0.005, gt=0, lt=1)
    held_out_share: float = Field(default=0.05, gt=0, lt=1)  # of the documents
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> TrainingRecipe:
        if self.hidden % (2 * self.heads):
            raise _refused("hidden", self.hidden, f"a multiple of 2 x heads = {2 * self.heads}: rotary halves a head")
        if self.heads % self.kv_heads:
            raise _refused("kv_heads", self.kv_heads, f"a divisor of heads = {self.heads}")
        if self.tokens_per_step % self.context:
            raise _refused("tokens_per_step", self.tokens_per_step, f"a multiple of context = {self.context}")
        if self.context % 2:
            raise _refused("context", self.context, "an even number: the first steps see half of it")
        return self

    def window(self, step: int) -> int:
        """Tokens of one window at this step; a batch is `tokens_per_step // window` windows."""
        return self.context // 2 if step < self.short_share * self.steps else self.context

    def rate(self, step: int) -> float:
        """Learning rate: a linear rise over a twentieth of the steps, then a linear fall that ends at zero."""
        rise = max(1, self.steps // 20)
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        return self.learning_rate * (self.steps - step) / (self.steps - rise + 1)


def _refused(name: str, got: object, expected: str) -> SpecError:
    return SpecError(f"recipe.{name}", got=got, expected=expected, fix="change one of the two")


@dataclass(frozen=True)
class TrainingProgress:
    """What is under way: `step` of `steps` is done, which are None where time is the bound; `share` of the whole."""

    step: int
    steps: int | None
    loss: float  # of the last step
    held_out_loss: float | None  # of the last time it was measured
    share: float


class LossPoint(Record):
    """The mean loss of the training steps since the point before, and that of held-out text, where there is some."""

    step: int
    tokens: int
    train: float
    held_out: float | None


class HeldOut(Record):
    """Over all documents that neither the tokenizer nor the model saw. `nats` is the sum over `tokens`."""

    documents: int
    tokens: int
    bytes: int
    nats: float
    perplexity_per_token: float
    perplexity_per_byte: float


class Sample(Record):
    prompt: str
    completion: str


class TrainingReport(Record):
    """Saved as `training.json` beside the weights."""

    recipe: TrainingRecipe
    parameters: int
    arithmetic: str  # "bfloat16" or "float32"
    documents: int
    train_tokens: int
    epochs: float
    curve: tuple[LossPoint, ...]
    held_out: HeldOut
    samples: tuple[Sample, ...]
    weights_sha256: str  # of model.safetensors; the same for the same recipe, Python, torch, processor and cores
    threads: int
    python: str
    torch: str
    elapsed_s: float
    cpu_s: float
