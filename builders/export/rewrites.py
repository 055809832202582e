"""A Hugging Face model seen by the exporter: attention, cache writes, rotary embeddings and norms as single operators.

transformers spells these out in many small tensor operations, which no runtime puts together again. Each replacement
is first run beside what it replaces; where the two differ, the model's own code stays. `exportable` takes everything
back when it ends, also after a failure: parts of it are process-wide.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from builders.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

IMPLEMENTATION = "trireme_onnx"
Attention = Callable[..., tuple["torch.Tensor", None]]
_SHORT = 8  # tokens: a text on which rotary angles that depend on the length show themselves


@contextmanager
def exportable(model: Any, positions: int, attention: Attention) -> Iterator[None]:
    """Within: `attention` serves the model's attention interface, and `positions` rotary angles lie in a table.

    Raises UnsupportedError for rotary angles that no table can hold.
    """
    from transformers import AttentionInterface

    with ExitStack() as undo:
        before = model.config._attn_implementation
        undo.callback(model.set_attn_implementation, before)
        undo.callback(AttentionInterface._global_mapping.pop, IMPLEMENTATION)
        AttentionInterface.register(IMPLEMENTATION, attention)
        model.set_attn_implementation(IMPLEMENTATION)
        rotary: dict[str, list[Any]] = {}
        for module in model.modules():
            forward = _linear(module) or _rms_norm(module) or _gelu(module)
            if forward is not None:
                replace(undo, module, "forward", forward)
            elif type(module).__name__.endswith("RotaryEmbedding"):
                rotary.setdefault(type(module).__module__, []).append(module)
        for source, modules in rotary.items():
            _place_rotary(undo, sys.modules[source], modules, positions, model.dtype)
        yield


@contextmanager
def last_tokens(model: Any, last_index: torch.Tensor) -> Iterator[None]:
    """Within, the model's head sees [batch, 1, hidden]: row b's token `last_index[b]` alone."""
    import torch

    def gather(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = arguments[0]
        # Not take_along_dim: it would freeze the dynamic dimensions.
        return (torch.gather(hidden, 1, last_index[:, None, None].expand(-1, 1, hidden.shape[2])),)

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()


def replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an attribute for as long as `undo` lives. One that the class gave the instance is uncovered again."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def operator_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, None]:
    """ONNX Attention: [batch, heads, length, head_dim] -> [batch, length, heads, head_dim].

    `mask` is boolean (True: attend) or added to the scores, [batch, 1 or heads, length, slots]. Fewer key and value
    heads than queries are grouped by the operator itself.
    """
    import torch

    output = torch.onnx.ops.attention(query, key, value, mask, scale=scale, softcap=softcap or 0.0)[0]
    return output.transpose(1, 2), None


def cache_layers(caches: Sequence[torch.Tensor], write_indices: torch.Tensor | None) -> list[Any]:
    """Cache layers for transformers over (key, value, key, value, ...), each [batch, kv_heads, slots, head_dim].

    New keys and values are written in place with TensorScatter, row b from slot `write_indices[b]` on. Without
    `write_indices` the caches are only read, as cross attention does.
    """
    import torch
    from transformers.cache_utils import CacheLayerMixin

    def write(cache: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache, update, write_indices),
            {"axis": -2, "mode": "linear"},
            dtype=cache.dtype,
            shape=cache.shape,
            version=24,
        )

    class GraphLayer(CacheLayerMixin):  # type: ignore[misc]
        is_compileable = True

        def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True

        def lazy_initialization(self, *_: Any) -> None:
            """The caches are given."""

        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
            if (keys.shape[1], keys.shape[3]) != (self.keys.shape[1], self.keys.shape[3]) or keys.shape != values.shape:
                raise UnsupportedError(
                    "keys and values of a layer", got=f"{tuple(keys.shape)} and {tuple(values.shape)}",
                    expected=f"kv_heads and head_dim of config.json, as in {tuple(self.keys.shape)}",
                    fix="use a model whose layers all keep keys and values of one shape",
                )  # fmt: skip
            self.keys, self.values = write(self.keys, keys), write(self.values, values)
            return self.keys, self.values

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.keys.shape[2], 0

        def get_seq_length(self) -> int:
            return 0  # positions are given to the model, row by row

        def get_max_length(self) -> int:
            return int(self.keys.shape[2])

    return [GraphLayer(*caches[at : at + 2]) for at in range(0, len(caches), 2)]


def _linear(module: Any) -> Callable[..., Any] | None:
    """GPT-2's Conv1D is `x @ weight + bias`, written with reshapes that keep a quantised product from being found."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, Conv1D):
        return None
    return lambda x: x @ module.weight + module.bias


def _rms_norm(module: Any) -> Callable[..., Any] | None:
    """RMSNormalization for a module that computes it, with the weight as it is or, in Gemma, one more."""
    import torch

    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    plain = isinstance(weight, torch.Tensor) and weight.ndim == 1 and getattr(module, "bias", None) is None
    if not plain or not isinstance(epsilon, float) or type(module).__module__.startswith("torch."):
        return None  # torch's own norms are exported well
    assert isinstance(weight, torch.Tensor)
    probe = _noise((2, 3, len(weight)), weight.dtype)
    with torch.no_grad():
        expected = module(probe)
        for scale in (weight.detach(), (1 + weight.detach().float()).to(weight.dtype)):
            if _agree(torch.nn.functional.rms_norm(probe, weight.shape, scale, epsilon), expected):
                return lambda x, scale=scale: torch.nn.functional.rms_norm(x, weight.shape, scale, epsilon)
    return None


def _gelu(module: Any) -> Callable[..., Any] | None:
    """Gelu, for the activations that spell its tanh form out."""
    import torch

    if type(module).__name__ not in ("NewGELUActivation", "FastGELUActivation"):
        return None
    probe = _noise((64,), torch.float32)
    if not _agree(torch.nn.functional.gelu(probe, approximate="tanh"), module(probe)):
        return None
    return lambda x: torch.nn.functional.gelu(x, approximate="tanh")


def _place_rotary(undo: ExitStack, source: Any, modules: Sequence[Any], positions: int, dtype: torch.dtype) -> None:
    """Angles from a table, and RotaryEmbedding in place of the model's own rotation where that is the common one.

    `source` is the Python module that defines `modules` and the function that rotates.
    """

    tables = [
        {kind: _angles(module, positions, dtype, kind) for kind in getattr(module, "layer_types", None) or [None]}
        for module in modules
    ]
    rotate = getattr(source, "apply_rotary_pos_emb", None)
    if rotate is None or not all(_halves(rotate, *angles) for table in tables for angles in table.values()):
        return

    def rotated(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    replace(undo, source, "apply_rotary_pos_emb", rotated)
    for module, table in zip(modules, tables, strict=True):
        replace(undo, module, "forward", _from_table(table))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RotaryEmbedding over as much of a head as there are angles for; what lies behind passes through.

    Some models cut the rest off before they call their function (Phi); in others it does so itself (GPT-NeoX,
    Nemotron). The operator has an attribute for it, but cut apart the graph is the same for both.
    """
    import torch

    width = 2 * cos.shape[-1]
    if width == x.shape[-1]:
        return torch.onnx.ops.rotary_embedding(x, cos, sin)
    return torch.cat([torch.onnx.ops.rotary_embedding(x[..., :width], cos, sin), x[..., width:]], dim=-1)


def _from_table(table: dict[str | None, tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., Any]:
    """(cos, sin) of the first half of a head, [batch, length, head_dim / 2]; the second half repeats the first."""
    import torch

    halves = {kind: [part[:, : part.shape[1] // 2].contiguous() for part in angles] for kind, angles in table.items()}

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> tuple[torch.Tensor, ...]:
        return tuple(torch.nn.functional.embedding(position_ids, part) for part in halves[layer_type])

    return forward


def _angles(module: Any, positions: int, dtype: torch.dtype, kind: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [positions, head_dim], by the model's own code."""
    import torch

    def table(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            cos, sin = module(torch.zeros(1, dtype=dtype), torch.arange(count)[None], *([kind] if kind else []))
        return cos[0], sin[0]

    short, whole = table(min(_SHORT, positions)), table(positions)
    if not all(
        torch.allclose(a.float(), b[: len(a)].float(), rtol=1e-4, atol=1e-7) for a, b in zip(short, whole, strict=True)
    ):
        raise UnsupportedError(
            f"rotary angles of {type(module).__name__}",
            got=f"angles that change with the length of the text within {positions} tokens",
            expected="one angle a position, because a graph keeps the keys of earlier steps",
            fix="set model.max_length to the length that the checkpoint was first trained with, or less",
        )
    return whole


def _halves(rotate: Any, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether `rotate(q, k, cos, sin)` turns the first half of a head against the second, as RotaryEmbedding does.

    A function that takes wider heads than it has angles for must let the rest pass; one that refuses them is never
    called with any.
    """
    if list(inspect.signature(rotate).parameters)[:4] != ["q", "k", "cos", "sin"] or cos.shape[1] % 2:
        return False
    width = cos.shape[1]
    return _agrees_on(rotate, cos, sin, width) is True and _agrees_on(rotate, cos, sin, width + 2) is not False


def _agrees_on(rotate: Any, cos: torch.Tensor, sin: torch.Tensor, width: int) -> bool | None:
    """On heads of this width; None where the function does not take them."""
    length, half = min(_SHORT, len(cos)), cos.shape[1] // 2
    q, k = _noise((1, 3, length, width), cos.dtype), _noise((1, 2, length, width), cos.dtype)
    try:
        expected = rotate(q, k, cos[None, :length], sin[None, :length])
    except (RuntimeError, ValueError, IndexError):  # shapes that do not fit: another kind of angles, or of heads
        return None
    halves = [part[None, :length, :half] for part in (cos, sin)]
    return all(y.shape == x.shape and _agree(_rotate(x, *halves), y) for x, y in zip((q, k), expected, strict=True))


def _noise(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _agree(candidate: torch.Tensor, expected: torch.Tensor) -> bool:
    import torch

    limit = 1e-5 if expected.dtype == torch.float32 else 4e-3  # half precision rounds in another order
    return bool((candidate - expected).abs().max() <= limit * expected.abs().max())
