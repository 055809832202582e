"""What a folder of sentence-transformers says beside the weights: modules, pooling, prompts, lower-casing, length.

Both generations of its files are read: `pooling_mode_mean_tokens: true` of old, `pooling_mode: mean` since 5.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.artifacts import HeadLayer, Prompts
from builders.checkpoint.reading import parse, read_json, read_optional
from builders.checkpoint.weights import one_file, shapes
from builders.errors import CheckpointError, UnsupportedError
from builders.spec import POOLINGS, ModelSlice

MODULES, TRANSFORMER, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
POOLING = "1_Pooling"  # where it is when no modules.json says so
_BUILT = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken", "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}  # fmt: skip
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "ELU", "LeakyReLU", "Mish", "Softplus")
# Of the Transformer module's file: what says nothing about the vectors of a text.
_HARMLESS = ("unpad_inputs", "modality_config", "module_output_name", "cache_dir", "backend", "tokenizer_name_or_path")
_READ = ("max_seq_length", "do_lower_case", "transformer_task")


@dataclass(frozen=True)
class Module:
    """One line of modules.json: `kind` is the class's own name, `folder` where its files lie."""

    kind: str
    folder: Path


@dataclass(frozen=True)
class Sentence:
    """How token states become one vector, and what is done to a text before it is tokenised. Empty for other folders.

    `files` are the JSON and weight files that this was read from.
    """

    pooling: str | None = None
    head: tuple[HeadLayer, ...] = ()
    prompts: Prompts | None = None
    lower_case: bool = False
    max_length: int | None = None
    files: tuple[Path, ...] = ()


def read_sentence(folder: Path, model: ModelSlice, hidden_size: int) -> Sentence:
    """Raises CheckpointError for modules that do not fit each other, UnsupportedError for those that are not built."""
    modules = _modules(folder)
    _check_modules(folder, model, modules)
    settings, prompts = read_optional(folder / TRANSFORMER), _prompts(folder, model)
    _check_settings(folder, settings)
    files = [folder / name for name in (MODULES, TRANSFORMER, PROMPTS) if (folder / name).is_file()]
    common = Sentence(
        prompts=prompts,
        lower_case=bool(settings.get("do_lower_case")),
        max_length=settings.get("max_seq_length"),
        files=tuple(files),
    )
    if model.task != "embedding":
        return common
    pooling, pooling_file = _pooling(folder, model, modules, hidden_size, prompts)
    head = _head(folder, model, modules, hidden_size)
    read = [*pooling_file, *(folder / name for layer in head for name in layer.files)]
    return Sentence(pooling, head, prompts, common.lower_case, common.max_length, tuple(dict.fromkeys([*files, *read])))


def _modules(folder: Path) -> tuple[Module, ...]:
    file = folder / MODULES
    data = parse(file) if file.is_file() else []
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise CheckpointError(str(file), got=type(data).__name__, expected="a list of modules", fix="copy it again")
    found = []
    for item in sorted(data, key=lambda item: int(item.get("idx", 0))):
        kind = str(item.get("type", ""))
        if not kind.startswith("sentence_transformers."):
            raise UnsupportedError(
                f"{file}: module {item.get('name')}", got=f"{kind}, code of the checkpoint's own",
                expected=f"modules of sentence-transformers: {', '.join(_BUILT)}", fix="use a checkpoint without it",
            )  # fmt: skip
        found.append(Module(kind.rsplit(".", 1)[-1], folder / str(item.get("path", ""))))
    return tuple(found)


def _check_modules(folder: Path, model: ModelSlice, modules: Sequence[Module]) -> None:
    kinds = [module.kind for module in modules]
    foreign = [
        kind for kind in kinds if kind not in (_BUILT if model.task == "embedding" else ("Transformer", "Dropout"))
    ]
    if foreign:
        raise UnsupportedError(
            f"{folder / MODULES} for task {model.task}", got=f"the module {foreign[0]}",
            expected=f"only {', '.join(_BUILT)}" if model.task == "embedding" else "a Transformer with its own head",
            fix="use a checkpoint of these modules: without this one the outputs would be others"
            if foreign[0] not in _BUILT
            else "set model.task: embedding",
        )  # fmt: skip
    if not kinds:
        return
    ordered = kinds[0] == "Transformer" and kinds.count("Transformer") == 1 and kinds.count("Pooling") <= 1
    if not ordered or ("Pooling" in kinds and "Pooling" in kinds[2:]):
        raise UnsupportedError(
            f"{folder / MODULES}", got=" -> ".join(kinds),
            expected="Transformer -> Pooling, then what works on vectors", fix="use a checkpoint of this order",
        )  # fmt: skip
    if modules[0].folder != folder:
        raise UnsupportedError(
            f"{folder / MODULES}", got=f"the Transformer in {modules[0].folder.name}",
            expected="it beside modules.json",
            fix=f"move the files of {modules[0].folder.name} up, and set its path to an empty string",
        )  # fmt: skip


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    task = settings.get("transformer_task", "feature-extraction")
    other = next((key for key in settings if key not in (*_READ, *_HARMLESS) and settings[key]), None)
    if task not in ("feature-extraction", "sequence-classification") or other:
        key = other or "transformer_task"
        raise UnsupportedError(
            f"{folder / TRANSFORMER}: {key}", got=repr(settings[key])[:80],
            expected="a text encoder with no settings of this kind",
            fix="remove the key if vectors without it are right",
        )  # fmt: skip


def _prompts(folder: Path, model: ModelSlice) -> Prompts | None:
    """None where there is nothing to put before a text. `model.prompt_name` goes before the checkpoint's default."""
    data = read_optional(folder / PROMPTS)
    kind = data.get("model_type", "SentenceTransformer")
    if (model.task == "embedding" and kind != "SentenceTransformer") or data.get("truncate_dim"):
        raise UnsupportedError(
            f"{folder / PROMPTS}", got=f"model_type {kind}, truncate_dim {data.get('truncate_dim')}",
            expected="a SentenceTransformer with whole vectors", fix="use a dense embedding model",
        )  # fmt: skip
    texts = {str(name): str(text or "") for name, text in (data.get("prompts") or {}).items()}
    default = data.get("default_prompt_name")
    if model.task != "embedding":
        if default and texts.get(default):
            raise UnsupportedError(
                f"{folder / PROMPTS}: default_prompt_name", got=repr(default),
                expected=f"no default prompt for task {model.task}", fix="remove it, and send the prompt in the text",
            )  # fmt: skip
        return None
    chosen = default if model.prompt_name is None else model.prompt_name or None
    if chosen is not None and chosen not in texts:
        named = "model.prompt_name" if model.prompt_name else f"{folder / PROMPTS}: default_prompt_name"
        raise CheckpointError(
            named, got=repr(chosen),
            expected=f"one of {sorted(texts)}" if texts else "none: the checkpoint has no prompts",
            fix="name one of the checkpoint's prompts, or leave it out",
        )  # fmt: skip
    return Prompts(texts=texts, default=chosen) if any(texts.values()) else None


def _pooling(
    folder: Path, model: ModelSlice, modules: Sequence[Module], hidden_size: int, prompts: Prompts | None
) -> tuple[str, list[Path]]:
    """The mode, and the file that says it. The spec's own `model.pooling` goes before the file's."""
    place = next((module.folder for module in modules if module.kind == "Pooling"), folder / POOLING)
    file = place / "config.json"
    declared = read_json(file) if file.is_file() else {}
    if declared.get("include_prompt", True) is False and prompts is not None:
        raise UnsupportedError(
            f"{file}: include_prompt", got="false, with prompts", expected="prompts that are pooled with the text",
            fix="use a checkpoint without it",
        )  # fmt: skip
    width = declared.get("embedding_dimension", declared.get("word_embedding_dimension", hidden_size))
    if width != hidden_size:
        raise CheckpointError(
            f"{file}: embedding dimension", got=width, expected=f"{hidden_size}, the hidden size of config.json",
            fix="copy the folder again",
        )  # fmt: skip
    if model.pooling:
        return model.pooling, [file] if declared else []
    if not declared:
        raise CheckpointError(
            f"pooling of {folder}",
            got=f"no {place.name}/config.json",
            expected="to know how tokens become one vector",
            fix=f"set model.pooling ({', '.join(POOLINGS)}) as the model was trained",
        )
    modes = _modes(declared)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise CheckpointError(
            f"pooling of {folder}", got=" + ".join(modes), expected=f"one of {', '.join(POOLINGS)}",
            fix="set model.pooling to one of these if that is acceptable",
        )  # fmt: skip
    return modes[0], [file]


def _modes(declared: dict[str, Any]) -> list[str]:
    """sentence-transformers' own reading: `pooling_mode` first, then the flags of old; mean when nothing is said."""
    mode = declared.get("pooling_mode")
    if mode is not None:
        return [str(item) for item in (mode if isinstance(mode, list) else [mode])]
    flags = [key for key, on in declared.items() if key.startswith("pooling_mode_") and on is True]
    return [_LEGACY_MODES.get(key, key) for key in flags] or ["mean"]


def _head(folder: Path, model: ModelSlice, modules: Sequence[Module], hidden_size: int) -> tuple[HeadLayer, ...]:
    """What follows the pooling. `model.normalize` settles the last step, whatever modules.json says of it."""
    width, layers = hidden_size, []
    for module in modules:
        if module.kind in ("Dense", "LayerNorm"):
            layers.append(_weighted(folder, module, model.allow_pickle, width))
            width = layers[-1].width
        elif module.kind == "Normalize":
            layers.append(HeadLayer(kind="normalize", width=width))
    if model.normalize is False and layers and layers[-1].kind == "normalize":
        layers.pop()
    if model.normalize and not (layers and layers[-1].kind == "normalize"):
        layers.append(HeadLayer(kind="normalize", width=width))
    return tuple(layers)


def _weighted(folder: Path, module: Module, allow_pickle: bool, width: int) -> HeadLayer:
    file = module.folder / "config.json"
    config = read_json(file)
    weights = one_file(module.folder, "model", allow_pickle)
    names = tuple(str(path.relative_to(folder)) for path in (file, weights))
    if module.kind == "LayerNorm":
        layer = HeadLayer(kind="layernorm", width=width, files=names)
        expected: dict[str, tuple[int, ...]] = {"norm.weight": (width,), "norm.bias": (width,)}
    else:
        layer = _dense(file, config, names)
        bias = {"linear.bias": (layer.width,)} if layer.bias else {}
        expected = {"linear.weight": (layer.width, width), **bias}
    found = shapes(weights) if weights.suffix == ".safetensors" else expected  # a pickle is looked at when it is loaded
    if found != expected:
        raise CheckpointError(
            f"weights {weights}", got=", ".join(f"{name} {list(found[name])}" for name in sorted(found)),
            expected=", ".join(f"{name} {list(shape)}" for name, shape in expected.items()),
            fix=f"copy {module.folder.name} again; it does not follow the module before it",
        )  # fmt: skip
    return layer


def _dense(file: Path, config: dict[str, Any], names: tuple[str, ...]) -> HeadLayer:
    activation = str(config.get("activation_function") or "torch.nn.modules.activation.Tanh")
    name = activation.rsplit(".", 1)[-1]
    source, target = config.get("module_input_name"), config.get("module_output_name")
    unusual = [f"features {item}" for item in (source, target) if item not in (None, "sentence_embedding")]
    unusual += ["use_residual"] if config.get("use_residual") else []
    if not activation.startswith("torch.nn.") or name not in ACTIVATIONS:
        unusual.append(activation)
    if unusual:
        raise UnsupportedError(
            f"{file}: Dense", got=unusual[0],
            expected=f"a product on the vector with one of torch's {', '.join(ACTIVATIONS)}",
            fix="use another checkpoint",
        )  # fmt: skip
    return HeadLayer(
        kind="dense", width=int(config.get("out_features", 0)), bias=bool(config.get("bias", True)),
        activation=name, files=names,
    )  # fmt: skip
