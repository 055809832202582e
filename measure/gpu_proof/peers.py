"""vLLM on the same shape, where it is installed: what the field decodes with."""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from measure.gpu_proof.decoders import decode_case
from measure.gpu_proof.record import Row
from measure.gpu_proof.roofline import Limits, against, decode_work
from measure.gpu_proof.setting import Budget, NotRun, Setting

_ROOM = 0.85  # of the GPU's memory


def measure(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    """Weights are random there too (`load_format="dummy"`), so no checkpoint of 16 GB is written."""
    if importlib.util.find_spec("vllm") is None:
        raise NotRun("no module vllm")
    if setting.dry:
        raise NotRun("vLLM is measured on a GPU only")
    vllm: Any = importlib.import_module("vllm")
    folder = setting.scratch / "vllm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_config(setting)))
    llm = vllm.LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="float16",
        max_model_len=max(setting.contexts), gpu_memory_utilization=_ROOM,
    )  # fmt: skip
    random = np.random.default_rng(0)
    for context in setting.contexts:
        for rows in setting.decode_rows:
            if budget.left_s < 10:
                yield Row(decode_case(setting, rows, context), "vLLM", reason="time")
                continue
            new = min(setting.steps, context // 2)
            ids = random.integers(0, setting.decoder.vocabulary, (rows, context - new)).tolist()
            prompts = [{"prompt_token_ids": row} for row in ids]
            times = []
            for count in (1, new):  # the same prompts twice: what is common to both is no decode step
                began = time.perf_counter()
                chosen = vllm.SamplingParams(max_tokens=count, min_tokens=count, temperature=0)
                llm.generate(prompts, chosen, use_tqdm=False)
                times.append(time.perf_counter() - began)
            seconds = (times[1] - times[0]) / (new - 1)
            figures, facts = against(decode_work(setting.decoder, rows, context, setting.value_bytes), seconds, limits)
            axes = {"batch": rows, "context": context}
            figures["tokens_per_s"] = rows / seconds
            yield Row(decode_case(setting, rows, context), "vLLM", axes, figures, facts, note="from its own loop")


def _config(setting: Setting) -> dict[str, object]:
    shape = setting.decoder
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "torch_dtype": "float16",
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": max(setting.contexts),
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
