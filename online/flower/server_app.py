"""The rounds: Flower's FedAvg over the clients' weights, and their moments where the offer shares them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.numpy import load_file, save_file

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    for name in ("offer", "out"):
        if not settings[name]:
            raise ValueError(f"run config {name}: got nothing; expected a path; fix: --run-config '{name}=\"...\"'")
    folder, out, clients = Path(str(settings["offer"])), Path(str(settings["out"])), int(settings["clients"])
    text = (folder / "offer.json").read_text()
    offer = json.loads(text)
    first = ArrayRecord({name: Array(value) for name, value in load_file(folder / "weights.safetensors").items()})
    # One mean for weights and moments: another strategy is for offers with `online.federated.share_moments: false`.
    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients, train_metrics_aggr_fn=together
    )
    rounds = int(offer["plan"]["rounds"])
    done = strategy.start(
        grid, first, num_rounds=rounds, timeout=float(settings["timeout-s"]), train_config=ConfigRecord({"offer": text})
    )
    told = done.train_metrics_clientapp
    missing = [number for number in range(1, rounds + 1) if number not in told]
    if missing:
        raise RuntimeError(f"no client answered in round {missing[0]}; its reason stands above")
    facts = {
        "key": offer["key"],
        "rows": max(int(told[number]["rows"]) for number in told),
        "losses": [float(told[number]["loss"]) for number in sorted(told)],
    }
    partial = out.with_name(f".{out.name}.new")
    arrays = {name: array.numpy() for name, array in done.arrays.items()}
    save_file(arrays, partial, metadata={"trireme": json.dumps(facts)})
    partial.replace(out)


def together(replies: Sequence[RecordDict], weighted_by: str) -> MetricRecord:
    """Rows of all clients, and their mean loss by rows."""
    metrics: list[Any] = [record for reply in replies for record in reply.metric_records.values()]
    rows = sum(int(each[weighted_by]) for each in metrics)
    return MetricRecord({"rows": rows, "loss": sum(each["loss"] * each[weighted_by] for each in metrics) / rows})
