"""The time of an answer: one timer for all, and each hears of its own end alone."""

from __future__ import annotations

import asyncio

import pytest

from runtime.gateway.answer_time import AnswerTimes, InTime


async def _work(times: AnswerTimes, seconds: float) -> str:
    try:
        with InTime(times):
            await asyncio.sleep(seconds)
    except TimeoutError:
        return "late"
    return "done"


def test_those_who_take_too_long_are_ended_and_others_are_not() -> None:
    async def run() -> list[str]:
        times = AnswerTimes(0.2)
        first = asyncio.gather(*(_work(times, seconds) for seconds in (30, 0.01, 30)))
        await asyncio.sleep(0.1)
        second = asyncio.gather(*(_work(times, seconds) for seconds in (0.15, 30)))
        found = [*await first, *await second]
        assert not times.running
        return [*found, await _work(times, 30)]  # and again, where nothing was timed for a while

    assert asyncio.run(run()) == ["late", "done", "late", "done", "late", "late"]


def test_who_is_cancelled_from_outside_is_not_late() -> None:
    async def run() -> None:
        task = asyncio.create_task(_work(AnswerTimes(60), 30))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
