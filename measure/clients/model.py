"""A language model that says what is known beforehand: small, and taught a few short talks by heart.

Random weights would do for log-probabilities, but never call a tool or end a text by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builders.errors import MachineError
from builders.judging.corpus import Document
from builders.store.atomic import atomic_directory
from builders.training import language, text
from builders.training.arithmetic import reproducible
from builders.training.recipe import TrainingRecipe
from measure.clients.asking import (
    ANSWER,
    BRIEF,
    CALLED,
    CITIES,
    HELLO,
    QUESTION,
    QUESTION_OF_TWO,
    STORY,
    TOOL,
    WELCOME,
)
from measure.small_model.folder import save_folder
from runtime.gateway.chat import ChatTemplate
from runtime.settings import ChatSettings

CONTEXT = 512
_SIZES = TrainingRecipe(vocabulary=512, hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, context=CONTEXT)
_STEPS, _RATE, _LOSS = 400, 0.005, 0.02
# Calls are written as Hermes and Qwen write them. Of tools it shows the names, so that what the model was taught does
# not hang on how a client words a schema.
TEMPLATE = """{% for tool in tools or [] %}tool: {{ tool.function.name }}
{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- if not loop.last %}

{% endif %}{% endfor %}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def make_model(out: Path) -> Path:
    """Writes the Hugging Face folder `out` if it is not there; returns it."""
    if out.is_dir():
        return out
    talks = _talks()
    tokenizer = text.train_tokenizer([Document("talks", tuple(map("".join, talks)))], _SIZES.vocabulary)
    sizes = _SIZES.model_copy(update={"vocabulary": tokenizer.get_vocab_size()})
    with atomic_directory(out) as work, reproducible(sizes.seed):
        model = language.new_model(sizes)
        # Apart, as they are when it is asked: together, a blank between them would be a token of both.
        rows = [(tokenizer.encode(asked).ids, tokenizer.encode(answer).ids) for asked, answer in talks]
        _learn(model, [(asked, [*answer, text.END_OF_TEXT_ID]) for asked, answer in rows])
        save_folder(model, tokenizer, CONTEXT, work)
        (work / "chat_template.jinja").write_text(TEMPLATE)
    return out


def _learn(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> None:
    """The answers by heart, in place. Raises MachineError where it does not get there."""
    import torch

    sizes = [(len(asked), len(asked) + len(answer)) for asked, answer in rows]
    longest = max(end for _, end in sizes)
    padding = [text.END_OF_TEXT_ID] * longest
    ids = torch.tensor([[*asked, *answer, *padding][:longest] for asked, answer in rows])  # [rows, longest]
    answered = torch.tensor([[begin <= place < end for place in range(1, longest)] for begin, end in sizes])
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    for _ in range(_STEPS):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[answered]  # [targets, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][answered])
        if loss.item() < _LOSS:
            model.eval()
            return
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    raise MachineError(
        "the model of the clients", got=f"a loss of {loss.item():.3f} after {_STEPS} steps", expected=f"under {_LOSS}",
        fix="report it: the seed is fixed",
    )  # fmt: skip


def _talks() -> list[tuple[str, str]]:
    """Prompts, as the template writes them, and answers."""
    template = ChatTemplate(ChatSettings(template=TEMPLATE, special_tokens={"eos_token": text.END_OF_TEXT}), 1 << 16)
    call = {"id": "1", "type": "function", "function": {"name": TOOL["name"], "arguments": {"city": CITIES[0]}}}
    asked = [_user(QUESTION), {"role": "assistant", "content": "", "tool_calls": [call]}]
    shown: list[dict[str, Any]] = [{"type": "function", "function": TOOL}]
    one, *_ = calls = [_written(city) for city in CITIES]
    return [
        (template.render([_user(HELLO)]), WELCOME),
        (template.render([_user(HELLO)], shown), WELCOME),
        (template.render([{"role": "system", "content": BRIEF}, _user(HELLO)]), WELCOME),
        (template.render([_user(QUESTION)], shown), one),
        (template.render([_user(QUESTION_OF_TWO)], shown), "\n".join(calls)),
        (template.render([*asked, {"role": "tool", "tool_call_id": "1", "content": CALLED}], shown), ANSWER),
        ("", STORY),
        ("", "Return the number of words in the file, and the number of its lines."),
    ]


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _written(city: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': TOOL['name'], 'arguments': {'city': city}})}\n</tool_call>"
