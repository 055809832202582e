"""How token states become one vector: in the graph, and apart from it in numpy, as what the graph is compared with.

Each of sentence-transformers' poolings, and the modules behind it, in fp32 whatever the encoder computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builders.artifacts import Checkpoint, HeadLayer
from builders.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Vectors = NDArray[np.float32]


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """[batch, length, width] float32 -> [batch, width]. The mask [batch, length] is 1 for tokens, which stand left."""
    import torch

    if pooling == "cls":
        return hidden[:, 0]
    seen = mask[..., None].float()
    if pooling == "lasttoken":
        last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)[..., None].expand(-1, 1, hidden.shape[2])
        return torch.gather(hidden, 1, last)[:, 0]
    if pooling == "max":
        return torch.where(seen > 0, hidden, torch.finfo(torch.float32).min).amax(1)
    if pooling == "weightedmean":
        seen = seen * torch.arange(1, hidden.shape[1] + 1, dtype=torch.float32)[None, :, None]
    count = seen.sum(1).clamp(min=1.0)
    return (hidden * seen).sum(1) / (count.sqrt() if pooling == "mean_sqrt_len_tokens" else count)


_OF_A_ROW: dict[str, Callable[[Vectors], Vectors]] = {
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.max(axis=0),
    "mean": lambda states: states.mean(axis=0),
    "mean_sqrt_len_tokens": lambda states: states.sum(axis=0) / np.sqrt(len(states)),
    "weightedmean": lambda states: np.average(states, axis=0, weights=np.arange(1, len(states) + 1)),
}


def reference_vectors(
    hidden: Vectors, counts: Sequence[int], checkpoint: Checkpoint, layers: Sequence[torch.nn.Module]
) -> Vectors:
    """The same without padding, text by text: `hidden` [texts, length, width] with `counts` tokens each."""
    assert checkpoint.pooling is not None
    of_a_row = _OF_A_ROW[checkpoint.pooling]
    vectors = np.stack([of_a_row(hidden[row, :count]) for row, count in enumerate(counts)])
    for layer, module in zip(checkpoint.head, layers, strict=True):
        vectors = _reference_layer(vectors, layer, module)
    return vectors.astype(np.float32)


def _reference_layer(vectors: Vectors, layer: HeadLayer, module: Any) -> Vectors:
    if layer.kind == "normalize":
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)  # type: ignore[no-any-return]
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(np.ascontiguousarray(vectors, np.float32))).numpy()  # type: ignore[no-any-return]


def head_modules(checkpoint: Checkpoint) -> list[torch.nn.Module]:
    """What stands behind the pooling, in its order, with the checkpoint's weights."""
    import torch

    class Normalize(torch.nn.Module):
        def forward(self, vectors: torch.Tensor) -> torch.Tensor:
            length: torch.Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
            return vectors / length.clamp(min=1e-12)

    made: list[torch.nn.Module] = []
    width = checkpoint.hidden_size
    for layer in checkpoint.head:
        if layer.kind == "normalize":
            made.append(Normalize())
        elif layer.kind == "layernorm":
            made.append(_with_weights(torch.nn.LayerNorm(width), "norm", layer, checkpoint))
        else:
            linear = _with_weights(torch.nn.Linear(width, layer.width, bias=layer.bias), "linear", layer, checkpoint)
            made.append(torch.nn.Sequential(linear, getattr(torch.nn, layer.activation)()))
        width = layer.width
    return [module.eval() for module in made]


def _with_weights(module: torch.nn.Module, prefix: str, layer: HeadLayer, checkpoint: Checkpoint) -> torch.nn.Module:
    import torch
    from safetensors.torch import load_file

    file = checkpoint.path(layer.files[-1])
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    named = {name.removeprefix(f"{prefix}."): value.float() for name, value in tensors.items()}
    try:
        module.load_state_dict(named)
    except RuntimeError as error:
        raise CheckpointError(
            f"weights {file}", got=" ".join(str(error).split())[:200], expected=f"those of its config.json ({prefix})",
            fix="copy its folder again",
        ) from error  # fmt: skip
    wrong = next((name for name, value in named.items() if not torch.isfinite(value).all()), None)
    if wrong is not None:
        raise CheckpointError(
            f"weights {file}: {prefix}.{wrong}", got="NaN or infinite values", expected="numbers", fix="copy it again"
        )
    return module
