"""`widths.json`: heads, feed-forward width and ranks of each layer, where a checkpoint's layers are not all alike.

A config.json of transformers cannot say "8 heads of 32 at a hidden size of 384": there, a head is hidden / heads wide.
So a checkpoint that was made smaller keeps the original's config.json, but for the number of layers, with this
manifest beside it; and what loads it builds the model of these widths. transformers by itself refuses such a folder,
since the shapes are not those of config.json.

A language model's config.json does say how wide a head is, so heads and neurons are written there, and a manifest is
needed only where layers differ. Its heads are the same number in each: the cache has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from builders.checkpoint.codebooks import weight_shapes
from builders.checkpoint.reading import parse, size
from builders.errors import CheckpointError, UnsupportedError
from runtime.record import Record

FILE = "widths.json"
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")  # encoders
DECODERS = ("llama",)


@dataclass(frozen=True)
class LayerLayout:
    """Where the layers stand in the model without its head, and their matrices in each."""

    layers: str
    parts: Mapping[str, str]


_BERT = LayerLayout(
    "encoder.layer",
    {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
    },
)
_LLAMA = LayerLayout(
    "layers",
    {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_output": "self_attn.o_proj",
        "gate": "mlp.gate_proj",  # the product with which neurons are multiplied
        "ffn_in": "mlp.up_proj",
        "ffn_out": "mlp.down_proj",
    },
)
_LAYOUTS = {**dict.fromkeys(FAMILIES, _BERT), **dict.fromkeys(DECODERS, _LLAMA)}


def parts_of(model_type: str) -> Mapping[str, str]:
    """The modules of a layer that are matrices, by part."""
    return _LAYOUTS[model_type].parts


class LayerWidths(Record):
    """One layer. `ranks`: the matrices, by part, that are products of two."""

    heads: int = Field(ge=1)
    ffn: int = Field(ge=1)
    ranks: dict[str, int] = Field(default_factory=dict)

    def sizes(self, part: str, hidden: int, head_size: int, group: int = 1) -> tuple[int, int]:
        """(inputs, outputs) of one part; `group` heads of queries share one of keys and values."""
        attention = self.heads * head_size
        return {
            "query": (hidden, attention),
            "attention_output": (attention, hidden),
            "gate": (hidden, self.ffn),
            "ffn_in": (hidden, self.ffn),
            "ffn_out": (self.ffn, hidden),
        }.get(part, (hidden, attention // group))


class Widths(Record):
    """All layers, from the first. `group`: heads of queries that share one of keys and values."""

    version: Literal[1] = 1
    model_type: str
    hidden: int = Field(ge=1)
    head_size: int = Field(ge=1)
    group: int = Field(default=1, ge=1)
    layers: tuple[LayerWidths, ...] = Field(min_length=1)

    def matrices(self) -> Iterator[tuple[int, str, tuple[int, int]]]:
        """(layer, part, sizes) of each."""
        for number, layer in enumerate(self.layers):
            for part in parts_of(self.model_type):
                yield number, part, layer.sizes(part, self.hidden, self.head_size, self.group)


def widths_of_config(config: Mapping[str, Any], folder: Path) -> Widths:
    """What config.json alone says: all layers alike. Raises UnsupportedError for other families."""
    model_type = str(config.get("model_type"))
    if model_type not in _LAYOUTS:
        raise UnsupportedError(
            f"compress: checkpoint {folder}", got=f"model type {model_type}", expected=f"one of {', '.join(_LAYOUTS)}",
            fix="remove compress from the spec, or use a model of these types",
        )  # fmt: skip
    hidden, heads, layers, ffn = (
        size(folder, dict(config), name)
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    )
    group, head_size = 1, hidden // heads
    if model_type in DECODERS:
        group = heads // int(config.get("num_key_value_heads") or heads)
        head_size = int(config.get("head_dim") or head_size)
    layer = LayerWidths(heads=heads, ffn=ffn)
    return Widths(model_type=model_type, hidden=hidden, head_size=head_size, group=group, layers=(layer,) * layers)


def said_in_config(widths: Widths) -> dict[str, Any]:
    """What a config.json can say of these widths."""
    found: dict[str, Any] = {"num_hidden_layers": len(widths.layers)}
    if widths.model_type in FAMILIES:  # there, heads are said by how wide one is
        found |= {"hidden_size": widths.hidden, "num_attention_heads": widths.hidden // widths.head_size}
    else:
        heads, ffn = widths.layers[0].heads, {layer.ffn for layer in widths.layers}
        found |= {
            "num_attention_heads": heads, "num_key_value_heads": heads // widths.group, "head_dim": widths.head_size,
        }  # fmt: skip
        found |= {"intermediate_size": ffn.pop()} if len(ffn) == 1 else {}
    return found


def read_widths(folder: Path, config: Mapping[str, Any], weights: Iterable[Path] = ()) -> Widths | None:
    """The manifest, where the folder has one. Raises CheckpointError for one that is damaged, of a later release, or
    another model's than config.json and the headers of `weights` describe."""
    path = folder / FILE
    if not path.is_file():
        return None
    if config.get("model_type") not in _LAYOUTS:
        raise _refused(path, f"a model of type {config.get('model_type')} beside it")
    try:
        found = Widths.model_validate(parse(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise _refused(path, f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from error
    plain = widths_of_config(config, folder)
    for name in ("model_type", "hidden", "head_size", "group"):
        if getattr(found, name) != getattr(plain, name):
            raise _refused(path, f"{name} {getattr(found, name)}, where config.json says {getattr(plain, name)}")
    if len(found.layers) != len(plain.layers):
        raise _refused(path, f"{len(found.layers)} layers, where config.json says {len(plain.layers)}")
    if found.model_type in DECODERS and {layer.heads for layer in found.layers} != {plain.layers[0].heads}:
        raise _refused(path, f"layers of other heads than the {plain.layers[0].heads} of config.json")
    unknown = sorted({part for layer in found.layers for part in layer.ranks} - set(parts_of(found.model_type)))
    if unknown:
        raise _refused(path, f"ranks of {', '.join(unknown)}, which no layer has")
    _require_shapes(path, found, weights)
    return found


def _require_shapes(path: Path, widths: Widths, weights: Iterable[Path]) -> None:
    there: dict[str, tuple[int, ...]] = {}
    start, parts = f"{_LAYOUTS[widths.model_type].layers}.", parts_of(widths.model_type)
    for file in weights:
        if file.suffix == ".safetensors":
            found = weight_shapes(file)
            there |= {name.partition(start)[2]: shape for name, shape in found.items() if start in name}
    for number, part, (inputs, outputs) in widths.matrices():
        name, rank = f"{number}.{parts[part]}", widths.layers[number].ranks.get(part)
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
    """The ModuleList of a model's layers, with or without a head around it."""
    base = getattr(model, model.base_model_prefix, model)
    return base.get_submodule(_LAYOUTS[model.config.model_type].layers)


def part_of(model: Any, layer: Any, part: str) -> Any:
    """The module of one part of one of `layers_of(model)`."""
    return layer.get_submodule(parts_of(model.config.model_type)[part])


def widths_of_model(model: Any) -> Widths:
    """As the modules are."""
    config, parts = model.config, parts_of(model.config.model_type)
    decodes = config.model_type in DECODERS
    head_size = int(getattr(config, "head_dim", None) or 0) if decodes else 0
    head_size = head_size or config.hidden_size // config.num_attention_heads
    layers = []
    for layer in layers_of(model):
        ranks = {part: found[0].out_features for part in parts if _is_thin(found := part_of(model, layer, part))}
        heads = last_linear(part_of(model, layer, "query")).out_features // head_size
        ffn = last_linear(part_of(model, layer, "ffn_in")).out_features
        layers.append(LayerWidths(heads=heads, ffn=ffn, ranks=ranks))
    return Widths(
        model_type=config.model_type,
        hidden=config.hidden_size,
        head_size=head_size,
        group=config.num_attention_heads // config.num_key_value_heads if decodes else 1,
        layers=tuple(layers),
    )


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
    layers, parts = layers_of(model), parts_of(widths.model_type)
    del layers[len(widths.layers) :]
    for name, value in said_in_config(widths).items():
        setattr(model.config, name, value)
    if widths.model_type in FAMILIES:
        for number, layer in enumerate(widths.layers):
            attention = layers[number].attention.self
            attention.num_attention_heads, attention.all_head_size = layer.heads, layer.heads * widths.head_size
    for number, part, (inputs, outputs) in widths.matrices():
        parent, _, name = parts[part].rpartition(".")
        biased = last_linear(layers[number].get_submodule(parts[part])).bias is not None
        made = _product(inputs, outputs, widths.layers[number].ranks.get(part), biased)
        setattr(layers[number].get_submodule(parent), name, made)


def _product(inputs: int, outputs: int, rank: int | None, biased: bool) -> Any:
    import torch

    if rank is None:
        return torch.nn.Linear(inputs, outputs, bias=biased)
    return torch.nn.Sequential(torch.nn.Linear(inputs, rank, bias=False), torch.nn.Linear(rank, outputs, bias=biased))
