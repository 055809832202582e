"""A client: what it learns, it learns in Trireme's environment, whose packages Flower's do not get along with.

Its SuperNode's `--node-config` names that environment's `trireme`, the client's own spec and its text.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.numpy import load_file, save_file

app = ClientApp()
_WANTED = ("trireme", "spec", "build-dir")
_LESSON_S = 3600


@app.train()
def train(message: Message, context: Context) -> Message:
    own, config = context.node_config, message.content["config"]
    for name in _WANTED:
        if name not in own:
            raise ValueError(f"node config {name}: got nothing; expected a path; fix: --node-config '{name}=\"...\"'")
    with TemporaryDirectory(prefix="trireme-flower-") as scratch:
        offer, before, after = (Path(scratch, name) for name in ("offer.json", "before", "after"))
        offer.write_text(str(config["offer"]))
        save_file({name: array.numpy() for name, array in message.content["arrays"].items()}, before)
        command = [
            str(own["trireme"]), "online", "federate", "lesson", str(own["spec"]), "--build-dir", str(own["build-dir"]),
            "--offer", str(offer), "--weights", str(before), "--out", str(after),
            "--round", str(config["server-round"]),
            *(("--texts", str(own["texts"])) if "texts" in own else ()),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LESSON_S, check=False)
        if done.returncode:
            raise RuntimeError(f"trireme online federate lesson ended with {done.returncode}: {done.stderr[-1000:]}")
        learnt = json.loads(done.stdout.splitlines()[-1])
        arrays = ArrayRecord({name: Array(value) for name, value in load_file(after).items()})
    metrics = MetricRecord({"num-examples": learnt["rows"], "loss": learnt["loss"]})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
