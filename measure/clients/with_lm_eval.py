"""lm-evaluation-harness with tasks of our own: likelihoods and greedy answers, against transformers' own."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from measure.clients.asking import Asks, ServedPair, require, same

CLIENT = "lm_eval"
_NEAR = 0.02  # of a sum of log-probabilities: other kernels, fp32
_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
{more}
"""
_GENERATE = """generation_kwargs: {until: ["<|endoftext|>"], max_gen_toks: %d, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]"""


def asks(served: ServedPair) -> Asks:
    # It counts tokens with the checkpoint's tokenizer and reads rows from files: nothing is fetched.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": served.key}

    def likelihoods() -> None:
        for as_tokens in (True, False):
            rows = [{"context": one, "continuation": other} for one, other, _, _ in served.likelihoods]
            found = _samples(served, "likelihoods", "loglikelihood", rows, "metric_list: [{metric: acc}]", as_tokens)
            for sample, (_, _, expected, greedy) in zip(found, served.likelihoods, strict=True):
                [own, likeliest] = sample["filtered_resps"][0]
                require(abs(float(own) - expected) < _NEAR, f"{own} instead of {expected}")
                same(str(likeliest), str(greedy))

    def greedy() -> None:
        rows = [{"context": prompt, "continuation": text} for prompt, text, _ in served.greedy]
        more = _GENERATE % served.greedy[0][2]
        found = _samples(served, "greedy", "generate_until", rows, more, as_tokens=True)
        same([one["filtered_resps"][0] for one in found], [text for _, text, _ in served.greedy])

    return {"loglikelihood is transformers'": likelihoods, "generate_until is transformers'": greedy}


def _samples(
    served: ServedPair, name: str, kind: str, rows: list[dict[str, str]], more: str, as_tokens: bool
) -> list[dict[str, Any]]:
    """In the order of the rows."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        lines = Path(folder) / "rows.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (Path(folder) / f"{name}.yaml").write_text(_TASK.format(name=name, rows=lines, kind=kind, more=more))
        arguments = {
            "model": "talker", "base_url": f"{served.text}/v1/completions", "tokenizer": served.folder,
            "tokenizer_backend": "huggingface", "tokenized_requests": as_tokens, "max_length": 512, "max_retries": 1,
        }  # fmt: skip
        got = simple_evaluate(
            model="local-completions", model_args=arguments, tasks=[name], log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
        )  # fmt: skip
        found: list[dict[str, Any]] = sorted(got["samples"][name], key=lambda one: int(one["doc_id"]))
        return found
