"""The autoscalers' expressions, evaluated by Prometheus' own promtool: a queue that is empty is zero, and not nothing.

An autoscaler that misses one of its metrics never takes a pod away.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.manifests.render import K8S
from builders.manifests.scaling import scaler
from builders.manifests.sizing import size
from tests.manifests.test_overlay import spec_with

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here: the package prometheus has it"
)
COMPONENTS = K8S / "components"
PODS = ("minilm-serving-5d-aa", "minilm-serving-5d-bb")
LABELS = 'namespace="minilm",pod="%s",model="minilm"'
QUEUE = "trireme_queue_microseconds_per_request"


def adapter(name: str) -> str:
    """An adapter rule as it asks Prometheus about these pods: https://github.com/kubernetes-sigs/prometheus-adapter."""
    rules = yaml.safe_load((COMPONENTS / "autoscaling-hpa" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (rule,) = (rule for rule in rules if rule["name"]["as"] == name)
    series = rule["seriesQuery"].partition("{")[0]
    query = rule["metricsQuery"].replace("<<.Series>>", series).replace("<<.GroupBy>>", "pod")
    return str(query.replace("<<.LabelMatchers>>", f'namespace="minilm",pod=~"{"|".join(PODS)}"'))


def keda() -> dict[str, str]:
    spec = spec_with(kubernetes={"scaling": {"by": "keda"}})
    (patch,) = (item for item in scaler(spec, size(spec, "cpu")) if item.file == "scaled-object.yaml")
    triggers = next(row["value"] for row in patch.content if row["path"] == "/spec/triggers")
    return {row["name"]: row["metadata"]["query"] for row in triggers}


def alert(record: str) -> str:
    rules = yaml.safe_load((COMPONENTS / "monitoring" / "rules.yaml").read_text())["spec"]["groups"][0]["rules"]
    (text,) = (rule["expr"] for rule in rules if record in (rule.get("record"), rule.get("alert")))
    return str(text).replace('namespace="trireme",pod=~"serving-.*"', 'namespace="minilm"')


def judged(series: dict[str, str], expected: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """promtool evaluates each expression at the tenth minute of the series, a sample each 15 s; rates are not exact."""
    rows = [
        {"series": f"{name}{{{LABELS % pod}{extra}}}", "values": values}
        for key, values in series.items()
        for name, _, extra in [key.partition(",")]
        for extra in [f",{extra}" if extra else ""]
        for pod in PODS
    ]
    tests = [
        {"expr": f"round({expr}, 0.01)", "eval_time": "10m", "exp_samples": samples}
        for expr, samples in expected.items()
    ]
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"tests": [{"interval": "15s", "input_series": rows, "promql_expr_test": tests}]}))
    command = ["promtool", "test", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def each(value: float, by: str = "pod") -> list[dict[str, Any]]:
    names = [f'{{pod="{pod}"}}' if by == "pod" else f'{{namespace="minilm", pod="{pod}"}}' for pod in PODS]
    return [{"labels": name, "value": value} for name in names]


@needs_promtool
@pytest.mark.parametrize(
    ("requests", "waited_us", "mean"),
    [("50x60", "900x60", 0.0), ("0+100x60", "0+20000x60", 200.0)],
    ids=["idle", "busy"],
)
def test_the_queue_of_each_pod(requests: str, waited_us: str, mean: float, tmp_path: Path) -> None:
    series = {
        "nv_inference_request_success": requests,
        "nv_inference_queue_duration_us": waited_us,
        "nv_inference_pending_request_count": "0x60",
    }
    triggers = keda()
    judged(
        series,
        {
            adapter(QUEUE): each(mean),
            adapter("trireme_pending_requests"): each(0),
            triggers["queue-microseconds-per-request"]: [{"labels": "{}", "value": mean}],
            triggers["pending-requests"]: [{"labels": "{}", "value": 0}],
            alert("trireme:queue_microseconds_per_request"): each(mean, "both"),
        },
        tmp_path,
    )


@needs_promtool
@pytest.mark.parametrize(("reason", "fires"), [("CANCELED", False), ("OTHER", True)])
def test_a_caller_who_hangs_up_is_no_error(reason: str, fires: bool, tmp_path: Path) -> None:
    """Two of a hundred requests."""
    series = {
        "nv_inference_request_success": "0+98x60",
        f'nv_inference_request_failure,reason="{reason}"': "0+2x60",
        'nv_inference_request_failure,reason="REJECTED"': "0x60",
    }
    found = [{"labels": '{namespace="minilm", model="minilm"}', "value": 0.02}] if fires else []
    judged(series, {alert("TriremeErrors"): found}, tmp_path)


def test_every_quotient_has_a_fallback() -> None:
    """Without promtool too: what divides, or compares away, says after `or` what holds when that leaves nothing."""
    rules = yaml.safe_load((COMPONENTS / "autoscaling-hpa" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    component = yaml.safe_load((COMPONENTS / "autoscaling-keda" / "scaled-object.yaml").read_text())["spec"]["triggers"]
    queries = [rule["metricsQuery"] for rule in rules]
    queries += [*keda().values(), *(row["metadata"]["query"] for row in component)]
    dividing = [query for query in queries if re.search(r"\s/\s|[<>=]\s*\d", query)]
    assert len(dividing) == 3
    assert all(re.search(r"\bor (0 \*|vector\(0\))", query) for query in dividing)
