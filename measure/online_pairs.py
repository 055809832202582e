"""`make bench-online-pairs`: an embedding model that finds docstrings meets man pages.

Pairs of one domain are what the real MiniLM can do: first lines of Python's docstrings, which look for the rest. Pairs
of another are the feedback: what man pages say in one line of their subject looks for what they say at length (where a
machine has none, fields of the Kubernetes API look for theirs). The same pairs are learnt naively, and as the
loop learns them.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from builders.__main__ import run
from builders.errors import MachineError
from builders.judging.corpus import Document
from builders.spec import DeploymentSpec, load_spec
from builders.store.processor import this_processor
from measure.other_text import kubernetes_descriptions, man_pages
from online.gate.verdict import GateBudget, GateVerdict
from online.learner.update import update_version
from online.loop.first import adopt
from online.loop.gathered import split_rows
from online.loop.learning import judge_update
from online.loop.settings import budget_of, online_of, recipe_of
from online.loop.steps import shares_text
from online.tasks.embedding import pair_document

_PAIRS = 1000
_QUERY, _BODY = 15, 40  # characters at least
_LONGEST = 600  # characters of a description: more than is read
_SECTION = re.compile(r"^([A-Z][A-Z ]+)\n(.*?)(?=^[A-Z][A-Z ]+$|\Z)", re.MULTILINE | re.DOTALL)
_ANYTHING = GateBudget(max_forgetting=1e9, max_fall=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="online learning of an embedding model, on real pairs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-5)
    arguments = parser.parse_args()
    spec = _spec(arguments.steps, arguments.rate)
    recipe, budget = recipe_of(spec), budget_of(online_of(spec).gate)
    name, documents = new_pairs()
    with tempfile.TemporaryDirectory(prefix="trireme-") as folder:
        first = Path(folder) / "1"
        _, task = adopt(spec, first)
        learnt, held_out = split_rows(documents, online_of(spec).learner.held_out_share, task)
        print(f"new pairs: {name}; {len(learnt)} to learn from, {len(held_out)} held out", flush=True)
        naive = recipe.model_copy(update={"replay_share": 0.0})
        for way, how, bounds in (("naively", naive, _ANYTHING), ("as the loop", recipe, budget)):
            out = Path(folder) / way.replace(" ", "-")
            report = update_version(task, first, "new", learnt, held_out, out, how, budget=bounds)
            verdict = judge_update(task, first, "new", held_out, out, budget)
            _print(way, report.step.share, report.cpu_s, verdict)
    print(this_processor().name)


def new_pairs() -> tuple[str, list[Document]]:
    """What they are of, and pairs in a mixed, stable order. Raises MachineError where there are too few of any."""
    for name, found in (("man pages", man_pairs()), ("the Kubernetes API", kubernetes_pairs())):
        pairs = list(islice(found, _PAIRS))
        if len(pairs) >= _PAIRS // 2:
            return name, pairs
    raise MachineError(
        "pairs of another domain", got="no man pages, and no schemas of Kubernetes", expected=f"{_PAIRS // 2} pairs",
        fix="install man pages, or Trireme with the extra `kubernetes`",
    )  # fmt: skip


def man_pairs() -> Iterator[Document]:
    """The summary behind the dash of NAME, and how DESCRIPTION begins."""
    for page in man_pages():
        sections = dict(_SECTION.findall(page.passages[0]))
        summary = re.split(r"\s-+\s", _words(sections.get("NAME", "")), maxsplit=1)[-1]
        yield from _pair(summary, _words(sections.get("DESCRIPTION", "")))


def kubernetes_pairs() -> Iterator[Document]:
    """The first sentence of a description, and the rest of it."""
    for kind in kubernetes_descriptions():
        for description in kind.passages[0].split("\n"):
            first, _, rest = description.partition(". ")
            yield from _pair(_words(first), _words(rest))


def _pair(query: str, body: str) -> Iterator[Document]:
    if len(query) >= _QUERY and len(body) >= _BODY:
        made = pair_document(query, body[:_LONGEST], "")
        if isinstance(made, Document):
            yield made


def _words(text: str) -> str:
    return " ".join(text.split())


def _spec(steps: int, rate: float) -> DeploymentSpec:
    learner = {"steps": steps, "rows": 32, "window": 64, "learning_rate": rate}
    spec = load_spec("minilm").model_dump(mode="json", exclude_none=True)
    return DeploymentSpec.model_validate({**spec, "online": {"learner": learner}})


def _print(way: str, share: float, cpu_s: float, verdict: GateVerdict) -> None:
    assert verdict.new is not None
    (old,) = verdict.old
    print(f"{way}: {share:.0%} of the update taken, {cpu_s:.0f} s of CPU to train it", flush=True)
    for name, change in (("new", verdict.new), ("earlier", old)):
        print(f"  {name}: perplexity {change.before:.3f} -> {change.after:.3f} ({change.change:+.1%}, "
              f"{change.low:+.1%} to {change.high:+.1%}){shares_text(change)}", flush=True)  # fmt: skip
    print(f"  gate: {'; '.join(one.why for one in verdict.objections) or 'passes'}", flush=True)


if __name__ == "__main__":
    run(main)
