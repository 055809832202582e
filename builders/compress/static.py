"""The baseline without layers: each token has one vector, whatever stands beside it, and a text is their mean.

A token's vector is the mean of its last states in the original, over calibration text. Of a token that the text holds
seldom or never, a linear map of its input embedding, fitted to those that it does hold, stands in. Frequent tokens
weigh less (Arora et al. 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings"). No layer is left, so it
is about a hundred times as fast: what a compressed model has over it is what its layers are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from builders.compress.texts import Batch

if TYPE_CHECKING:
    import torch

TOKENS = 20_000  # of calibration text
_RIDGE = 1e-2  # of the mean square of the inputs
_SEEN = 0.5  # times that the map counts as having been seen, beside the token's own
_FREQUENT = 1e-3  # the share of a text's tokens at which a token weighs half


def token_vectors(model: Any, batches: Sequence[Batch]) -> torch.Tensor:
    """[vocabulary, hidden]."""
    import torch

    with torch.no_grad():
        inputs = model.get_input_embeddings().weight.double()
        counts = torch.zeros(len(inputs), dtype=torch.float64)
        sums = torch.zeros(len(inputs), model.config.hidden_size, dtype=torch.float64)
        for batch in batches:
            real = batch["attention_mask"].bool()
            ids, states = batch["input_ids"][real], model(**batch).last_hidden_state[real].double()
            counts.index_add_(0, ids, torch.ones(len(ids), dtype=torch.float64))
            sums.index_add_(0, ids, states)
        known = torch.nn.functional.pad(inputs, (0, 1), value=1.0)
        gram = known.T @ (counts[:, None] * known)
        damping = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        mapped = known @ torch.linalg.solve(gram + damping, known.T @ sums)
        shares = (counts + 1) / (counts.sum() + len(counts))
        weights = _FREQUENT / (_FREQUENT + shares) / (counts + _SEEN)
        found: torch.Tensor = ((sums + _SEEN * mapped) * weights[:, None]).float()
        return found


def as_encoder(vectors: torch.Tensor, config: Any) -> Any:
    """A module that an export takes for the original's: its last states are the tokens' own vectors."""
    import torch

    class StaticEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.vectors = config, torch.nn.Embedding(len(vectors), vectors.shape[1], _weight=vectors)

        def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=self.vectors(input_ids))

    return StaticEncoder().eval()
