"""A model as a checkpoint's folder: config.json, model.safetensors, and all other files of the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builders.artifacts import Checkpoint
from builders.checkpoint import codebooks, load_checkpoint
from builders.checkpoint import widths as manifest
from builders.checkpoint.weights import CODEBOOKS
from builders.compress.back import lead_back
from builders.compress.cluster import coded, encode
from builders.spec import ModelSlice, StepSlice

LOG = "compression.json"  # steps, in their order, with what was found on the way
_LEFT = ("adapter_config.json", "config.json", manifest.FILE, codebooks.FILE, LOG)


def save(
    model: Any, checkpoint: Checkpoint, asked: ModelSlice, step: StepSlice, notes: list[str], out: Path,
    pages: Sequence[Path] = (), back: Path | None = None,
) -> Checkpoint:  # fmt: skip
    """Writes `model`, made of `checkpoint` by `step`, into `out`; what stands behind its pooling is copied, and so are
    `pages`. `back`, where there is such a file, holds the Dense that makes a narrower model's vectors as wide as the
    checkpoint's. Layers that are all as config.json says need no manifest."""
    from safetensors.torch import save_file

    for record in checkpoint.files:
        top = "/" not in record.name
        if top and (record.name in _LEFT or record.name.endswith((".safetensors", ".bin"))):
            continue  # settings that change, and weights, an adapter's among them: it is merged by now
        (out / record.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.path(record.name), out / record.name)
    for page in pages:
        shutil.copyfile(page, out / page.name)
    found = manifest.widths_of_model(model)
    config = json.loads(checkpoint.path("config.json").read_text())
    config.pop("torch_dtype", None)
    config |= {**manifest.said_in_config(found), "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if found != manifest.widths_of_config(config, out):
        (out / manifest.FILE).write_text(found.model_dump_json(indent=2) + "\n")
    steps = json.loads(checkpoint.path(LOG).read_text()) if checkpoint.path(LOG).is_file() else []
    steps.append({"step": step.model_dump(mode="json", exclude_none=True), "notes": notes})
    (out / LOG).write_text(json.dumps(steps, indent=2) + "\n")
    unused = "pooler." if checkpoint.task == "embedding" else "\0"  # an embedding pools the tokens' states itself
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())  # one with the table of words, which is saved
    state = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(unused) and name not in tied
    }
    matrices = {} if step.cluster is None else coded(model, step.cluster)
    for name, matrix in matrices.items():
        state |= codebooks.stored(name, *encode(state.pop(name), matrix), matrix.bits)
    if matrices:
        said = codebooks.Codebooks(matrices=matrices)
        (out / codebooks.FILE).write_text(said.model_dump_json(indent=2) + "\n")
    save_file(state, out / (CODEBOOKS if matrices else "model.safetensors"), metadata={"format": "pt"})
    if back is not None and back.is_file():
        lead_back(checkpoint, found.hidden, back, out)
    made = load_checkpoint(asked.model_copy(update={"source": str(out), "revision": None, "allow_pickle": False}))
    return made.model_copy(update={"source": f"{checkpoint.source} after {step.name}"})
