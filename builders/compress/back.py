"""A folder of sentence-transformers whose vectors got narrower, with a Dense that makes them as wide as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from builders.artifacts import Checkpoint
from builders.checkpoint.sentence import MODULES, POOLING

_MODULES = "sentence_transformers.models"
_WIDTHS = ("embedding_dimension", "word_embedding_dimension")


def lead_back(checkpoint: Checkpoint, width: int, weights: Path, out: Path) -> None:
    """`out` is a copy of `checkpoint`'s folder with a transformer `width` wide. The Dense of these `weights`, from
    `width` to the checkpoint's own, comes right behind the pooling; what stood there comes behind it."""
    file = out / MODULES
    modules = sorted(json.loads(file.read_text()), key=lambda one: one["idx"]) if file.is_file() else _plain(checkpoint)
    place = next((one["path"] for one in modules if one["type"].endswith(".Pooling")), None)
    if place is None:  # a spec says how to pool
        place = POOLING
        modules.insert(1, {"name": "pooling", "path": place, "type": f"{_MODULES}.Pooling"})
    pooling = out / place / "config.json"
    said = json.loads(pooling.read_text()) if pooling.is_file() else {"pooling_mode": checkpoint.pooling}
    said |= {name: width for name in _WIDTHS if name in said} or {_WIDTHS[1]: width}
    pooling.parent.mkdir(parents=True, exist_ok=True)
    pooling.write_text(json.dumps(said, indent=2) + "\n")
    dense = out / f"{checkpoint.hidden_size}_Dense"  # the others are called by their place
    dense.mkdir()
    shutil.copyfile(weights, dense / "model.safetensors")
    config = {
        "in_features": width, "out_features": checkpoint.hidden_size, "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }  # fmt: skip
    (dense / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    behind = next(number for number, one in enumerate(modules, 1) if one["path"] == place)
    modules.insert(behind, {"name": "back", "path": dense.name, "type": f"{_MODULES}.Dense"})
    numbered = [{**one, "idx": number} for number, one in enumerate(modules)]
    file.write_text(json.dumps(numbered, indent=2) + "\n")


def _plain(checkpoint: Checkpoint) -> list[dict[str, str]]:
    """Of a folder without modules, whose spec says what is done to a vector."""
    kinds = ["Transformer", *(["Normalize"] if checkpoint.normalize else [])]
    paths = {"Transformer": "", "Normalize": "Normalize"}
    return [{"name": kind.lower(), "path": paths[kind], "type": f"{_MODULES}.{kind}"} for kind in kinds]
