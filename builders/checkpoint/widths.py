"""`widths.json`: heads, feed-forward width and ranks of each layer, where a checkpoint's layers are not all alike.

A config.json of transformers cannot say "8 heads of 32 at a hidden size of 384": there, a head is hidden / heads wide.
So a checkpoint that was made smaller keeps the original's config.json, but for the number of layers, with this
manifest beside it; and what loads it builds the model of these widths. transformers by itself refuses such a folder,
since the shapes are not those of config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from builders.checkpoint.codebooks import weight_shapes
from builders.checkpoint.reading import parse, size
from builders.errors import CheckpointError, UnsupportedError
from runtime.record import Record

FILE = "widths.json"
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")  # whose layers have the modules of `PARTS`
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
}
_LAYER = "encoder.layer."


class LayerWidths(Record):
    """One layer. `ranks`: the matrices, by the names in `PARTS`, that are products of two."""

    heads: int = Field(ge=1)
    ffn: int = Field(ge=1)
    ranks: dict[str, int] = Field(default_factory=dict)

    def sizes(self, part: str, hidden: int, head_size: int) -> tuple[int, int]:
        """(inputs, outputs) of one of `PARTS`."""
        attention = self.heads * head_size
        return {
            "attention_output": (attention, hidden),
            "ffn_in": (hidden, self.ffn),
            "ffn_out": (self.ffn, hidden),
        }.get(part, (hidden, attention))


class Widths(Record):
    """All layers, from the first."""

    version: Literal[1] = 1
    model_type: str
    hidden: int = Field(ge=1)
    head_size: int = Field(ge=1)
    layers: tuple[LayerWidths, ...] = Field(min_length=1)

    def matrices(self) -> Iterator[tuple[int, str, tuple[int, int]]]:
        """(layer, part, sizes) of each."""
        for number, layer in enumerate(self.layers):
            for part in PARTS:
                yield number, part, layer.sizes(part, self.hidden, self.head_size)


def widths_of_config(config: Mapping[str, Any], folder: Path) -> Widths:
    """What config.json alone says: all layers alike. Raises UnsupportedError for other families than `FAMILIES`."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"compress: checkpoint {folder}", got=f"model type {model_type}", expected=f"one of {', '.join(FAMILIES)}",
            fix="remove compress from the spec, or use a model of these types",
        )  # fmt: skip
    hidden, heads, layers, ffn = (
        size(folder, dict(config), name)
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    )
    layer = LayerWidths(heads=heads, ffn=ffn)
    return Widths(model_type=model_type, hidden=hidden, head_size=hidden // heads, layers=(layer,) * layers)


def read_widths(folder: Path, config: Mapping[str, Any], weights: Iterable[Path] = ()) -> Widths | None:
    """The manifest, where the folder has one. Raises CheckpointError for one that is damaged, of a later release, or
    another model's than config.json and the headers of `weights` describe."""
    path = folder / FILE
    if not path.is_file():
        return None
    if config.get("model_type") not in FAMILIES:
        raise _refused(path, f"a model of type {config.get('model_type')} beside it")
    try:
        found = Widths.model_validate(parse(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise _refused(path, f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from error
    plain = widths_of_config(config, folder)
    for name in ("model_type", "hidden", "head_size"):
        if getattr(found, name) != getattr(plain, name):
            raise _refused(path, f"{name} {getattr(found, name)}, where config.json says {getattr(plain, name)}")
    if len(found.layers) != len(plain.layers):
        raise _refused(path, f"{len(found.layers)} layers, where config.json says {len(plain.layers)}")
    unknown = sorted({part for layer in found.layers for part in layer.ranks} - set(PARTS))
    if unknown:
        raise _refused(path, f"ranks of {', '.join(unknown)}, which no layer has")
    _require_shapes(path, found, weights)
    return found


def _require_shapes(path: Path, widths: Widths, weights: Iterable[Path]) -> None:
    there: dict[str, tuple[int, ...]] = {}
    for file in weights:
        if file.suffix == ".safetensors":
            found = weight_shapes(file)
            there |= {name.partition(_LAYER)[2]: shape for name, shape in found.items() if _LAYER in name}
    for number, part, (inputs, outputs) in widths.matrices():
        name, rank = f"{number}.{PARTS[part]}", widths.layers[number].ranks.get(part)
        wanted = {f"{name}.weight": (outputs, inputs)}
        if rank is not None:
            wanted = {f"{name}.0.weight": (rank, inputs), f"{name}.1.weight": (outputs, rank)}
        for tensor, shape in wanted.items():
            if there.get(tensor) != shape:
                raise _refused(path, f"{tensor} of shape {list(shape)}, where the weights have {there.get(tensor)}")


def _refused(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        f"width manifest {path}", got=got, expected="the one that `trireme compress` wrote with these weights",
        fix="copy the whole folder again; a file of that name from elsewhere does not belong into a checkpoint",
    )  # fmt: skip


def layers_of(model: Any) -> Any:
    """The ModuleList of an encoder's layers, with or without a head around it."""
    return getattr(model, model.base_model_prefix, model).encoder.layer


def widths_of_model(model: Any) -> Widths:
    """As the modules are."""
    config = model.config
    layers = []
    for layer in layers_of(model):
        ranks = {part: found[0].out_features for part in PARTS if _is_thin(found := layer.get_submodule(PARTS[part]))}
        ffn = last_linear(layer.get_submodule(PARTS["ffn_in"])).out_features
        layers.append(LayerWidths(heads=layer.attention.self.num_attention_heads, ffn=ffn, ranks=ranks))
    head_size = config.hidden_size // config.num_attention_heads
    return Widths(model_type=config.model_type, hidden=config.hidden_size, head_size=head_size, layers=tuple(layers))


def _is_thin(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Sequential)


def first_linear(module: Any) -> Any:
    """What reads the inputs: the matrix itself, or the first of a product of two."""
    return module[0] if _is_thin(module) else module


def last_linear(module: Any) -> Any:
    """What makes the outputs, bias included."""
    return module[-1] if _is_thin(module) else module


def reshape(model: Any, widths: Widths) -> None:
    """Gives `model` these widths, in place. Matrices whose shape changes come out with no values to rely on: the state
    that belongs to these widths is to be loaded next."""
    layers = layers_of(model)
    del layers[len(widths.layers) :]
    model.config.num_hidden_layers = len(widths.layers)
    for number, layer in enumerate(widths.layers):
        attention = layers[number].attention.self
        attention.num_attention_heads, attention.all_head_size = layer.heads, layer.heads * widths.head_size
    for number, part, (inputs, outputs) in widths.matrices():
        parent, _, name = PARTS[part].rpartition(".")
        made = _product(inputs, outputs, widths.layers[number].ranks.get(part))
        setattr(layers[number].get_submodule(parent), name, made)


def _product(inputs: int, outputs: int, rank: int | None) -> Any:
    import torch

    if rank is None:
        return torch.nn.Linear(inputs, outputs)
    return torch.nn.Sequential(torch.nn.Linear(inputs, rank, bias=False), torch.nn.Linear(rank, outputs))
