"""The generator's figures under the names that vLLM gives them, for dashboards and endpoint pickers that know these."""

from __future__ import annotations

from runtime.gateway.counters import heading
from runtime.prometheus import metric_lines

_PREFIX = "trireme_generation_"
_GAUGES = {
    "running": ("num_requests_running",), "waiting": ("num_requests_waiting",),
    "cache_use": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
}  # fmt: skip
_COUNTERS = {"prompt_tokens_total": "prompt_tokens_total", "output_tokens_total": "generation_tokens_total"}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
}  # fmt: skip


def vllm_page(page: str) -> str:
    """Empty for a page without a generator's figures. `page` is Triton's."""
    kinds: dict[str, str] = {}
    lines: dict[str, list[str]] = {}

    def add(name: str, kind: str, ending: str, labels: dict[str, str], value: float) -> None:
        kinds[name] = kind
        shown = ",".join([f'model_name="{labels["model"]}"', *(f'le="{one}"' for one in [labels.get("le")] if one)])
        lines.setdefault(name, []).append(f"vllm:{name}{ending}{{{shown}}} {value:.17g}")

    for metric, labels, value in metric_lines(page, _PREFIX):
        for name in _GAUGES.get(metric, ()):
            add(name, "gauge", "", labels, value)
        if metric in _COUNTERS:
            add(_COUNTERS[metric], "counter", "", labels, value)
        stem, _, ending = metric.rpartition("_")
        for name in _HISTOGRAMS.get(stem, ()):
            add(name, "histogram", f"_{ending}", labels, value)
    said = "The figure of trireme_generation_* under vLLM's name"
    return "".join("\n".join([*heading(f"vllm:{name}", kinds[name], said), *text, ""]) for name, text in lines.items())
