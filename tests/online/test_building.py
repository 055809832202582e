"""A candidate through the real pipeline, its speed held against the champion's as both are served."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.errors import QualityError
from online.loop.building import Champion, PipelineBuilds
from tests.online.loop_world import loop_spec, save_first


def test_a_slow_candidate_is_refused_before_it_is_published(tmp_path: Path) -> None:
    first, candidate = (save_first(tmp_path / name) for name in ("first", "candidate"))
    builds = PipelineBuilds(loop_spec(first), tmp_path / "build", lambda stage, message: None)
    assert builds.first().speed is None
    published = sorted(path.name for path in builds.repository.glob("*/*"))
    with pytest.raises(QualityError, match=r"the champion's speed \(.* to .*\); online.gate.min_speed=50 is asked for"):
        builds.build(candidate, [1], 2, Champion(None, 50))
    assert sorted(path.name for path in builds.repository.glob("*/*")) == published
    found = builds.build(candidate, [1], 2, Champion(candidate, 0.001)).speed
    assert found is not None
    assert 0 < found.low <= found.ratio <= found.high
