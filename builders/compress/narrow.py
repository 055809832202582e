"""A student of another hidden width: it starts from some of the teacher's dimensions, and leads back to its width.

Dimensions are picked, not rotated: a LayerNorm computes the same of dimensions in another order, but not of rotated
ones. What the others held is taken up by the matrices that read, as far as the picked ones tell it (least squares).
Heads and neurons stay as they are.

`BACK`, a Dense behind the pooling, makes vectors of the teacher's width, so that what users have stored can still be
compared; states after the last layer are compared through it too. The losses between other layers have a projection
each. All are trained with the student, and only `BACK` stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.checkpoint.widths import Widths, first_linear, last_linear, layers_of, part_of, widths_of_model
from builders.compress import losses, prune
from builders.compress.importance import Forward
from builders.compress.inputs import Inputs, observed
from builders.compress.texts import Batch

if TYPE_CHECKING:
    import torch

BACK = "back.safetensors"
FIT_TOKENS = 20_000  # of text behind each least-squares fit
_RIDGE = 1e-4  # of the mean variance
_READS = {"query": "layer", "key": "layer", "value": "layer", "ffn_in": "middle"}  # and where in a layer


@dataclass(frozen=True)
class Narrow:
    """`forward` makes vectors of the teacher's width. `hidden`: a projection for each pair of layers that is compared.
    `trained` is one module of all that learns."""

    forward: Forward
    back: Any
    hidden: Sequence[Any]
    trained: Any

    def write(self, file: Path) -> None:
        """The weights of `back`, as a Dense of sentence-transformers has them."""
        from safetensors.torch import save_file

        save_file({f"linear.{name}": value.contiguous() for name, value in self.back.state_dict().items()}, file)


def narrowed(
    model: Any,
    width: int,
    as_forward: Callable[[Any], Forward],
    teacher: tuple[Any, Forward],
    batches: Sequence[Batch],
    pairs: Sequence[tuple[int, int]] = (),
) -> Narrow:
    """`model`, made `width` wide in place. `pairs`: layers of it and of the teacher whose states are compared."""
    import torch

    with torch.no_grad():
        pick(model, width, as_forward(model), batches)
        last = len(layers_of(model)) - 1, len(layers_of(teacher[0])) - 1
        looking: Any = as_forward(model)
        looking.head = torch.nn.Identity()  # a Dense of the teacher's own cannot take these vectors yet
        back, *hidden = _projections(model, looking, teacher, [last, *pairs], batches)
    forward: Any = as_forward(model)
    forward.head.insert(0, back)
    trained = torch.nn.ModuleDict({"model": model, "back": back, "hidden": torch.nn.ModuleList(hidden)})
    return Narrow(forward, back, hidden, trained.eval())


def pick(model: Any, width: int, forward: Forward, batches: Sequence[Batch]) -> None:
    """The model of `width` of its hidden dimensions, in place: those from which the others are told best. With all of
    them it computes what it did."""
    widths = widths_of_model(model)
    modules = {
        (number, place): first_linear(part_of(model, layer, part))
        for number, layer in enumerate(layers_of(model))
        for part, place in _READS.items()
        if part in ("query", "ffn_in")
    }
    states = observed(modules, forward, batches)
    kept = _told_best(sum(found.covariance for found in states.values()), width)
    if width < widths.hidden:
        for number, layer in enumerate(layers_of(model)):
            for part, place in _READS.items():
                _take_up(part_of(model, layer, part), states[number, place], kept)
    _become(model, widths, kept)


def _told_best(covariance: Any, width: int) -> torch.Tensor:
    """The dimensions of a pivoted Cholesky decomposition, in rising order: each the one with the most variance that
    those before do not tell."""
    import torch

    left, chosen = covariance.clone(), list[int]()
    for _ in range(width):
        free = left.diagonal().clone()
        free[chosen] = -torch.inf
        best = int(free.argmax())
        chosen.append(best)
        if left[best, best] > 0:
            column = left[:, best] / left[best, best].sqrt()
            left -= column[:, None] * column
    return torch.tensor(sorted(chosen))


def _take_up(module: Any, read: Inputs, kept: torch.Tensor) -> None:
    """Least squares for what reads all dimensions: the picked columns, and the bias, also stand for the others."""
    import torch

    covariance = read.covariance
    ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(len(kept), dtype=covariance.dtype)
    told = torch.linalg.solve(covariance[kept][:, kept] + ridge, covariance[kept]).T  # [hidden, width]
    told[kept] = torch.eye(len(kept), dtype=told.dtype)
    first, last = first_linear(module), last_linear(module)
    shift = first.weight.double() @ (read.mean - told @ read.mean[kept])
    columns = first.weight.double() @ told
    last.bias += shift if first is last else last.weight.double() @ shift
    first.weight.zero_()
    first.weight[:, kept] = columns.to(first.weight.dtype)


def _become(model: Any, widths: Widths, kept: torch.Tensor) -> None:
    """The picked rows and columns of all that is as wide as the hidden states."""
    import torch

    def taken(value: torch.Tensor, dim: int) -> torch.Tensor:
        return value.detach().index_select(dim, kept)

    def norms(of: Any) -> None:
        for module in of.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight, module.bias = (torch.nn.Parameter(taken(v, 0)) for v in (module.weight, module.bias))
                module.normalized_shape = (len(kept),)

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight, module.embedding_dim = torch.nn.Parameter(taken(module.weight, 1)), len(kept)
    norms(model)
    pooler = getattr(model, "pooler", None)  # no weight of an embedding, but a part of the module
    if pooler is not None:
        pooler.dense = torch.nn.Linear(len(kept), len(kept))
    for layer in layers_of(model):
        for part in _READS:
            _cut(first_linear(part_of(model, layer, part)), kept, 1)
        for part in ("attention_output", "ffn_out"):
            _cut(last_linear(part_of(model, layer, part)), kept, 0)
    prune.become(model, widths.model_copy(update={"hidden": len(kept)}), model.state_dict())


def _cut(linear: Any, kept: torch.Tensor, dim: int) -> None:
    import torch

    linear.weight = torch.nn.Parameter(linear.weight.detach().index_select(dim, kept))
    if dim == 0 and linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias.detach().index_select(0, kept))


def _projections(
    model: Any, forward: Forward, teacher: tuple[Any, Forward], pairs: Sequence[tuple[int, int]],
    batches: Sequence[Batch],
) -> list[Any]:  # fmt: skip
    """From the states of one layer to those of another, with the least squared error over tokens."""
    import torch

    own, its = (losses.Wanted(sorted({pair[side] for pair in pairs})) for side in (0, 1))
    sums: list[Any] = [(0, 0)] * len(pairs)
    for batch in batches:
        seen, wanted = losses.look(model, forward, batch, own), losses.look(*teacher, batch, its)
        for number, (one, other) in enumerate(pairs):
            x = torch.nn.functional.pad(seen.states[one], (0, 1), value=1.0)
            squares, products = sums[number]
            sums[number] = squares + (x.T @ x).double(), products + (x.T @ wanted.states[other]).double()
    return [_projection(*found) for found in sums]


def _projection(squares: torch.Tensor, products: torch.Tensor) -> Any:
    import torch

    class Projection(torch.nn.Linear):
        """In fp32, like the pooling before it, whatever the rest is trained in."""

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(states.float(), self.weight.float(), self.bias.float())

    ridge = torch.eye(len(squares), dtype=squares.dtype) * _RIDGE * squares.diagonal().mean()
    ridge[-1, -1] = 0  # of the bias
    found = torch.linalg.solve(squares + ridge, products).float()
    made = Projection(len(squares) - 1, products.shape[1])
    with torch.no_grad():
        made.weight.copy_(found[:-1].T)
        made.bias.copy_(found[-1])
    return made
