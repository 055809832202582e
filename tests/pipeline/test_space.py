"""What a search may choose, the steps that this stands for, and which trials are on the front."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.checkpoint.widths import LayerWidths, Widths
from builders.compress.plan import check
from builders.errors import SpecError
from builders.pipeline.front import search_page
from builders.pipeline.search import Found
from builders.pipeline.space import Choices, Tried, finalists, front, spread
from builders.spec import DistilSlice, PruneSlice, StepSlice, load_spec

WIDTHS = Widths(model_type="bert", hidden=384, head_size=32, layers=(LayerWidths(heads=12, ffn=1536),) * 6)
TINY = Widths(model_type="bert", hidden=32, head_size=8, layers=(LayerWidths(heads=4, ffn=64),) * 2)


@pytest.mark.parametrize("widths", [WIDTHS, TINY])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_choice_is_one_that_the_model_can_take(widths: Widths, tensor: int) -> None:
    choices = Choices.of(widths, tensor)
    tried = 0
    for layers in range(1, choices.layers + 1):
        for heads in range(choices.heads[0], choices.heads[1] + 1, choices.heads[0]):
            for ffn in range(choices.ffn[0], choices.ffn[1] + 1, choices.ffn[0]):
                for rank in range(0, choices.rank[1] + 1, choices.rank[0]):
                    steps = choices.steps({"layers": layers, "heads": heads, "ffn": ffn, "rank": rank})
                    left = check(steps, widths, tensor)
                    assert (len(left.layers), left.layers[0].heads, left.layers[0].ffn) == (layers, heads, ffn)
                    tried += 1
    assert tried >= 4
    assert choices.steps(choices.starts()[0]) == ()
    for start in choices.starts():
        check(choices.steps(start), widths, tensor)
        assert start["rank"] <= choices.rank[1]


def test_fewer_heads_than_ranks_are_refused() -> None:
    with pytest.raises(SpecError, match="got 8 for 4 heads and 64 neurons"):
        Choices.of(TINY, 8)


def test_layers_are_spread_from_the_first_to_the_last() -> None:
    assert spread(6, 3) == (0, 2, 5)
    assert spread(6, 1) == (0,)
    assert spread(6, 6) == (0, 1, 2, 3, 4, 5)


def _trial(number: int, speed: float, cosine: float, *missed: str) -> Tried:
    return Tried(number, (), cosine, cosine, speed, 1_000_000, missed)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), max_size=12))
def test_the_front_is_what_no_other_beats(found: list[tuple[int, int, bool]]) -> None:
    trials = [_trial(n, s, c / 10, *(["min_speedup"] if over else [])) for n, (s, c, over) in enumerate(found)]
    best, within = front(trials), [each for each in trials if not each.missed]
    for each in within:
        beaten = any(
            (other.speed >= each.speed and other.cosine > each.cosine)
            or (other.speed > each.speed and other.cosine >= each.cosine)
            for other in within
        )
        assert beaten == all((one.speed, one.cosine) != (each.speed, each.cosine) for one in best)
    assert [each.speed for each in best] == sorted((each.speed for each in best), reverse=True)


def test_finalists_that_are_trained_come_from_all_of_the_front() -> None:
    """Their cosines may be under the budget yet; the whole model is none of them."""
    step = StepSlice(prune=PruneSlice(what=("ffn",), ffn=64))
    whole = _trial(0, 1, 1.0)
    changed = [
        replace(_trial(n, 1 + n, 1 - n / 20, *(["min_mean_cosine"] if n > 2 else [])), steps=(step,))
        for n in range(1, 10)
    ]
    slow = replace(_trial(11, 0.5, 0.2, "min_speedup"), steps=(step,))
    trials = [whole, *changed, slow]
    assert [each.number for each in finalists(trials, 2, None)] == [2, 1], "within the budget, the fastest first"
    training = DistilSlice(minutes=2)
    found = finalists(trials, 3, training)
    assert [each.number for each in found] == [9, 5, 1]
    assert {each.steps for each in found} == {(step, StepSlice(distil=training))}
    assert found[0].told == "ffn 64; distil 2 min"
    assert len(finalists(trials[:3], 5, training)) == 2
    assert finalists([whole], 5, training) == [whole]


def test_the_page_is_sound_and_tells_all() -> None:
    """XML with nothing fetched and no script; a dot for each trial, and no fault where there is but one, or none."""
    spec = load_spec("minilm")
    trials = tuple(_trial(n, 1 + n / 4, 1 - n / 20, *(["min_mean_cosine"] if n > 6 else [])) for n in range(9))
    own = _trial(-1, 1.1, 0.9)
    text = search_page(spec, Found(trials, own, (), None, 4))
    root = ElementTree.fromstring(text.partition("\n")[2])
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert "script" not in names
    assert "http" not in text.replace("http://www.w3.org/1999/xhtml", "")
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert len(titles) == 1 + 10  # the page's own
    assert "9 trials, 5 of them in this run" in text
    assert "none is within the budget" in text
    for few in ((), trials[:1]):
        ElementTree.fromstring(search_page(spec, Found(few, None, (), None, 0)).partition("\n")[2])
