"""docs/spec.md says what the code says, of every key."""

from __future__ import annotations

import pytest

from builders.spec import Slice
from measure.spec_page import PAGE, described, render, slices


def test_the_committed_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


@pytest.mark.parametrize("kind", slices(), ids=lambda kind: kind.__name__)
def test_every_key_is_described(kind: type[Slice]) -> None:
    assert kind.__doc__
    assert not [key for key, field in kind.model_fields.items() if not described(field)]


def test_the_page_names_choices_bounds_and_who_reads_a_key() -> None:
    page = render()
    assert "| `cpu` | `fp32`, `bf16`, `int8`, `dynamic_int8`, `w8`, `w4`, `auto` | `auto` | all |" in page
    assert "| `calibration_samples` | whole number, at least 8, at most 4096 | `128` |" in page
    assert "| `max_perplexity_ratio` | number, at least 1 | `1.03` | language models |" in page
    assert "| `source` | text | **required** |" in page
